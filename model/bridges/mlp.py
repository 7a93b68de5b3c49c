"""LLaVA's bridge: two linear layers, applied to each patch alone (Liu et al., arXiv 2310.03744, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MLPConfig:
    """Config of a bridge (LLaVA) that makes one visual token from every patch, with linear layers.

    Attributes:
        input_size: Width of a patch embedding.
        hidden_size: Width after each layer, which is the language model's width.
        num_patches: Number of patches, and of visual tokens, per picture.
    """

    input_size: int
    hidden_size: int
    num_patches: int
    activation: str = "gelu"
    bias: bool = True

    kind = "mlp"

    @property
    def num_visual_tokens(self) -> int:
        """Number of visual tokens per picture."""
        return self.num_patches

    def to_hf(self) -> dict[str, Any]:
        """Returns the keys of a LLaVA ``config.json`` that describe the bridge."""
        return {
            "projector_hidden_act": self.activation,
            "multimodal_projector_bias": self.bias,
            "image_seq_length": self.num_patches,
        }
