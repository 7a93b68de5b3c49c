"""LLaVA's bridge: each patch passes two linear layers on its own (Liu et al., arXiv 2310.03744, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MLPConfig:
    """A bridge that keeps every patch.

    Attributes:
        input_size: Width of a patch.
        hidden_size: Width after each layer: the language model's.
        num_patches: Patches per picture, and so its visual tokens.
    """

    input_size: int
    hidden_size: int
    num_patches: int
    activation: str = "gelu"
    bias: bool = True

    kind = "mlp"

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens per picture."""
        return self.num_patches

    def to_hf(self) -> dict[str, Any]:
        """The keys of a LLaVA ``config.json`` that describe it."""
        return {
            "projector_hidden_act": self.activation,
            "multimodal_projector_bias": self.bias,
            "image_seq_length": self.num_patches,
        }
