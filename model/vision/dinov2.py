"""DINOv2's vision encoder, with and without registers (Oquab et al., arXiv 2304.07193; Darcet et al., 2309.16588).

A ViT whose blocks scale each channel of attention and feed-forward before the addition (LayerScale: Touvron et al.,
arXiv 2103.17239). The giant model has a gated feed-forward. Registers are learned tokens between the class token and
the patches; they have no position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.model.config_json import Fields, key, layered
from blip2edge.model.interfaces import VisionModule
from blip2edge.model.layers import MLP, stack
from blip2edge.model.vision.features import PatchEncoderConfig
from blip2edge.model.vision.vit import PatchAttention

PLAIN, WITH_REGISTERS = "dinov2", "dinov2_with_registers"
REGISTER_DEFAULTS = {"patch_size": 16}
"""Defaults of transformers' Dinov2WithRegistersConfig where they differ from Dinov2Config."""


@dataclass(frozen=True)
class Dinov2Config(PatchEncoderConfig):
    """Config of DINOv2, with the defaults of transformers' Dinov2Config.

    Attributes:
        mlp_ratio: Width inside the feed-forward divided by ``hidden_size``.
        qkv_bias: Whether queries, keys and values have biases.
        gated: Whether the feed-forward is gated. The width inside a gated feed-forward is two thirds of
            ``mlp_ratio * hidden_size``, rounded up to a multiple of 8.
        registers: Number of registers.
    """

    patch_size: int = key("patch_size", 14)
    intermediate_size: int = 0  # not a key: see inner
    mlp_ratio: int = key("mlp_ratio", 4)
    qkv_bias: bool = key("qkv_bias", True)
    gated: bool = key("use_swiglu_ffn", False)
    registers: int = 0

    @property
    def kind(self) -> str:
        """The encoder's ``model_type``, a key in ``vision/registry.py``."""
        return WITH_REGISTERS if self.registers else PLAIN

    @property
    def prefix(self) -> int:
        """Number of embeddings before the patches: the class token and the registers."""
        return 1 + self.registers

    @property
    def inner(self) -> int:
        """Width inside the feed-forward."""
        whole = self.hidden_size * self.mlp_ratio
        return (int(whole * 2 / 3) + 7) // 8 * 8 if self.gated else whole

    @classmethod
    def from_hf(cls, values: Any, **given: Any) -> Dinov2Config:
        """Reads the ``vision_config`` of a DINOv2 without registers.

        ``given`` are values of fields that the section lacks.

        Raises:
            CheckpointError: A key has a wrong value.
        """
        depth = Fields(cls.section, values).integer("num_hidden_layers", cls.num_layers)
        return super().from_hf(values, **cls.read_features(values, depth), **given)

    @classmethod
    def with_registers(cls, values: Any) -> Dinov2Config:
        """Reads the ``vision_config`` of a DINOv2 with registers."""
        registers = Fields(cls.section, values).integer("num_register_tokens", 4)
        return cls.from_hf(layered(values, REGISTER_DEFAULTS), registers=registers)

    def to_hf(self) -> dict[str, Any]:
        """Returns the ``vision_config`` that :meth:`from_hf` or :meth:`with_registers` reads."""
        registers = {"num_register_tokens": self.registers} if self.registers else {}
        return {"model_type": self.kind} | super().to_hf() | registers


class GatedMLP(nn.Module):
    """A gated feed-forward, ``down(silu(gate) * up)``, with one matrix for gate and up (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, P, D]`` to the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ScaledBlock(nn.Module):
    """A pre-norm block whose attention and feed-forward are scaled, channel by channel, before they are added.

    Args:
        width: Width of the states.
        eps: Epsilon of the norms.
        attention: Maps ``[B, P, D]`` and further arguments to ``[B, P, D]``.
        mlp: Maps ``[B, P, D]`` to the same shape.
    """

    def __init__(self, width: int, eps: float, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = attention
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, *positions: Tensor) -> Tensor:
        """Maps ``[B, P, D]`` to the same shape; ``positions`` are passed to the attention."""
        x = x + self.attention(self.norm1(x), *positions) * self.scale1
        return x + self.mlp(self.norm2(x)) * self.scale2


class Dinov2Vision(VisionModule):
    """DINOv2's vision encoder."""

    config: Dinov2Config

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + config.num_patches, width))
        self.registers = nn.Parameter(torch.zeros(1, config.registers, width)) if config.registers else None
        self.layers = stack(self._block(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.post_norm else None

    @staticmethod
    def _block(config: Dinov2Config) -> ScaledBlock:
        width = config.hidden_size
        mlp = GatedMLP(width, config.inner) if config.gated else MLP(width, config.inner, width, config.activation)
        return ScaledBlock(width, config.norm_eps, PatchAttention(config, config.qkv_bias), mlp)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps ``pixel_values [B, 3, H, W]`` to ``image_embeds [B, P, D]``: class token, registers, then patches."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(patches.shape[0], -1, -1)
        x = torch.cat([classes, patches], dim=1) + self.position_embedding
        if self.registers is not None:
            registers = self.registers.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for block in self.layers:
            x = block(x)
        if self.post_norm is not None:
            x = self.post_norm(x)
        return self.config.select(x)


def resized_dinov2(module: VisionModule, size: int) -> VisionModule:
    """Makes an encoder for pictures of another size: the positions of the patches are interpolated, as in transformers.

    transformers does this in every forward; the result is the same each time, so here it is done once. The published
    models have positions for pictures of 518 pixels, and their preprocessing makes pictures of 224.

    Args:
        module: A :class:`Dinov2Vision`; it is not changed.
        size: Side of the pictures in pixels.
    """
    config: Any = module.config
    changed = replace(config, image_size=size)
    state = dict(module.state_dict())
    table = state["position_embedding"]
    before, after = (one.image_size // one.patch_size for one in (config, changed))
    grid = table[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(
        grid, size=(after, after), mode="bicubic", align_corners=False, antialias=config.registers > 0
    )
    patches = patches.permute(0, 2, 3, 1).reshape(1, after * after, -1)
    state["position_embedding"] = torch.cat([table[:, :1], patches], dim=1)
    with torch.device("meta"):
        resized = Dinov2Vision(changed)
    resized.load_state_dict(state, assign=True)
    return resized.train(module.training)
