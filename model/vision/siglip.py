"""SigLIP's vision encoder, which SigLIP 2 of a fixed resolution shares (Zhai et al., arXiv 2303.15343; 2502.14786).

A ViT with pre-norm blocks, biases everywhere and no class token. The attention pooling head of the published
checkpoints is not used, because a bridge attends to the patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.model.config_json import Fields, key
from blip2edge.model.interfaces import VisionModule
from blip2edge.model.layers import stack
from blip2edge.model.vision.features import PatchEncoderConfig
from blip2edge.model.vision.vit import Block


@dataclass(frozen=True)
class SiglipConfig(PatchEncoderConfig):
    """Config of SigLIP's vision encoder, with the defaults of transformers' SiglipVisionConfig.

    Attributes:
        keep_first: Whether the first patch stays. transformers' LLaVA drops it with the strategy ``default``, as if it
            were a class token.
    """

    activation: str = key("hidden_act", "gelu_pytorch_tanh")
    keep_first: bool = True

    model_type = "siglip_vision_model"

    @property
    def num_embeds(self) -> int:
        """Number of output embeddings: the patches."""
        return self.num_patches - (not self.keep_first)

    @classmethod
    def from_hf(cls, values: Any, **given: Any) -> SiglipConfig:
        """Reads a SigLIP ``vision_config``; ``given`` are values of fields that the section lacks.

        Raises:
            CheckpointError: A key has a wrong value.
        """
        depth = Fields(cls.section, values).integer("num_hidden_layers", cls.num_layers)
        return super().from_hf(values, **cls.read_features(values, depth), **given)


class SiglipVision(VisionModule):
    """SigLIP's vision encoder without its pooling head."""

    config: SiglipConfig

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(config.num_patches, width))
        self.layers = stack(Block(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.post_norm else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps ``pixel_values [B, 3, H, W]`` to ``image_embeds [B, P, D]``, one for each patch."""
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position_embedding
        for block in self.layers:
            x = block(x)
        if self.post_norm is not None:
            x = self.post_norm(x)
        return x if self.config.keep_first else x[:, 1:]
