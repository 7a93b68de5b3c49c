"""DINOv3's ViT (Siméoni et al., arXiv 2508.10104): DINOv2's blocks with rotary positions of the patches.

The angles come from the coordinates of a patch's centre, from -1 to 1 along each side of the picture, so that the
weights do not depend on the picture's size. Class token and registers are not rotated. Rotary positions in two
dimensions are from Heo et al., arXiv 2403.13298.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.errors import CheckpointError
from blip2edge.model.config_json import Fields, key
from blip2edge.model.interfaces import VisionModule
from blip2edge.model.language.llama import rotate
from blip2edge.model.layers import MLP, FeedForward, attend, merge_heads, split_heads, stack
from blip2edge.model.vision.dinov2 import ScaledBlock
from blip2edge.model.vision.features import PatchEncoderConfig


@dataclass(frozen=True)
class Dinov3Config(PatchEncoderConfig):
    """Config of a DINOv3 ViT, with the defaults of transformers' DINOv3ViTConfig.

    Attributes:
        theta: Base of the wavelengths of the rotary positions.
        query_bias, key_bias, value_bias, output_bias, mlp_bias: Which matrices have biases.
        gated: Whether the feed-forward is gated.
        registers: Number of registers; published models have four.
    """

    hidden_size: int = key("hidden_size", 384)
    intermediate_size: int = key("intermediate_size", 1536)
    num_heads: int = key("num_attention_heads", 6)
    norm_eps: float = key("layer_norm_eps", 1e-5)
    theta: float = key("rope_theta", 100.0)
    query_bias: bool = key("query_bias", True)
    key_bias: bool = key("key_bias", False)
    value_bias: bool = key("value_bias", True)
    output_bias: bool = key("proj_bias", True)
    mlp_bias: bool = key("mlp_bias", True)
    gated: bool = key("use_gated_mlp", False)
    registers: int = 0

    model_type = "dinov3_vit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size // self.num_heads % 4:
            raise CheckpointError(
                f"config.json: vision_config: heads of {self.hidden_size // self.num_heads} channels cannot be rotated "
                "in two dimensions; expected a multiple of 4"
            )
        if not self.mlp_bias:
            raise CheckpointError(
                "config.json: vision_config: mlp_bias is false, which is not supported; expected true"
            )

    @property
    def prefix(self) -> int:
        """Number of embeddings before the patches: the class token and the registers."""
        return 1 + self.registers

    @classmethod
    def from_hf(cls, values: Any, **given: Any) -> Dinov3Config:
        """Reads the ``vision_config`` of a DINOv3 ViT; ``given`` are values of fields that the section lacks.

        Raises:
            CheckpointError: A key has a wrong value.
        """
        f = Fields(cls.section, values)
        depth = f.integer("num_hidden_layers", cls.num_layers)
        registers = 0 if f.values.get(REGISTERS, 0) == 0 else f.integer(REGISTERS, None)
        return super().from_hf(values, registers=registers, **cls.read_features(values, depth), **given)

    def to_hf(self) -> dict[str, Any]:
        """Returns the section of ``config.json`` that :meth:`from_hf` reads."""
        return super().to_hf() | {REGISTERS: self.registers}


REGISTERS = "num_register_tokens"


class PatchRotary(nn.Module):
    """Computes the rotary positions of class token, registers and patches, always in FP32.

    Export keeps this module in FP32; it finds the module by its name in the model, ``rotary``.
    """

    def __init__(self, config: Dinov3Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines, FP32 ``[P, d / 2]``; the angles of class token and registers are 0."""
        config, side = self.config, self.config.image_size // self.config.patch_size
        width = config.hidden_size // config.num_heads
        exponents = torch.arange(0, width // 4, device=device).to(torch.float32) * (4 / width)
        speeds = 2 * math.pi / config.theta**exponents  # [d / 4]
        places = (torch.arange(0, side, device=device).to(torch.float32) + 0.5) * (2 / side) - 1
        angles = places[:, None] * speeds  # [side, d / 4]
        down = angles[:, None, :].expand(side, side, -1)
        across = angles[None, :, :].expand(side, side, -1)
        patches = torch.cat([down, across], dim=-1).reshape(side * side, -1)  # [P, d / 2]
        still = torch.zeros(config.prefix, width // 2, device=device)
        both = torch.cat([still, patches], dim=0)
        return both.cos(), both.sin()


class RotaryAttention(nn.Module):
    """Self-attention over patches, with rotated queries and keys."""

    def __init__(self, config: Dinov3Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.scale = (width // config.num_heads) ** -0.5
        self.query = nn.Linear(width, width, bias=config.query_bias)
        self.key = nn.Linear(width, width, bias=config.key_bias)
        self.value = nn.Linear(width, width, bias=config.value_bias)
        self.projection = nn.Linear(width, width, bias=config.output_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps ``[B, P, D]`` to the same shape; ``cos`` and ``sin`` are ``[P, d / 2]``."""
        query, key, value = (split_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return self.projection(merge_heads(attend(query, key, value, scale=self.scale)))


class Dinov3Vision(VisionModule):
    """DINOv3's ViT."""

    config: Dinov3Config

    def __init__(self, config: Dinov3Config) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.registers = nn.Parameter(torch.zeros(1, config.registers, width)) if config.registers else None
        self.rotary = PatchRotary(config)
        self.layers = stack(self._block(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.post_norm else None

    @staticmethod
    def _block(config: Dinov3Config) -> ScaledBlock:
        width, inner, activation = config.hidden_size, config.intermediate_size, config.activation
        mlp = (
            FeedForward(width, inner, activation, True, bias=True)
            if config.gated
            else MLP(width, inner, width, activation)
        )
        return ScaledBlock(width, config.norm_eps, RotaryAttention(config), mlp)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps ``pixel_values [B, 3, H, W]`` to ``image_embeds [B, P, D]``: class token, registers, then patches."""
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        before = [self.class_embedding] if self.registers is None else [self.class_embedding, self.registers]
        x = torch.cat([*(one.expand(x.shape[0], -1, -1) for one in before), x], dim=1)
        rotation = tuple(part.to(x.dtype) for part in self.rotary(x.device))
        for block in self.layers:
            x = block(x, *rotation)
        if self.post_norm is not None:
            x = self.post_norm(x)
        return self.config.select(x)


def resized_dinov3(module: VisionModule, size: int) -> VisionModule:
    """Makes an encoder for pictures of another size, with the same weights: the positions are computed, not learned.

    Args:
        module: A :class:`Dinov3Vision`; it is not changed.
        size: Side of the pictures in pixels.
    """
    config: Any = module.config
    with torch.device("meta"):
        resized = Dinov3Vision(replace(config, image_size=size))
    resized.load_state_dict(module.state_dict(), assign=True)
    return resized.train(module.training)
