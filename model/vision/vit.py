"""The vision encoder: a ViT as in EVA-CLIP or as in OpenAI's CLIP.

Dosovitskiy et al., arXiv 2010.11929; the bias for queries and values, but not for keys, comes from BEiT (arXiv
2106.08254) and EVA (arXiv 2211.07636). LAVIS calls the last norm ``ln_vision``, transformers ``post_layernorm``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2edge.model.config import TransformerConfig, VisionConfig
from blip2edge.model.interfaces import VisionModule
from blip2edge.model.layers import MLP, attend, merge_heads, split_heads, stack
from blip2edge.model.vision.token_merging import Pairs, TokenMatching, merge, merged_counts


class PatchAttention(nn.Module):
    """Self-attention over patches, with one matrix for queries, keys and values."""

    def __init__(self, config: TransformerConfig, qkv_bias: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.scale = (width // config.num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)  # [B, P, D] -> [B, P, 3D]
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps ``[B, P, D]`` to the same shape; ``bias`` is added to the scores ``[B, H, P, P]`` (broadcast)."""
        return self.with_keys(x, bias)[0]

    def with_keys(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Same as :meth:`forward`; also returns the keys ``[B, H, P, d]``."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.projection(merge_heads(attend(query, key, value, bias, self.scale))), key


class Block(nn.Module):
    """A pre-norm transformer block: attention, then MLP. ``qkv_bias`` adds biases to queries, keys and values."""

    def __init__(self, config: TransformerConfig, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = PatchAttention(config, qkv_bias)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_size, config.activation)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps ``[B, P, D]`` to the same shape; ``bias`` is added to the scores ``[B, H, P, P]`` (broadcast)."""
        x = x + self.attention(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))

    def merging(
        self, x: Tensor, sizes: Tensor, matching: TokenMatching, count: int, bias: Tensor | None
    ) -> tuple[Tensor, Pairs]:
        """Same as :meth:`forward`, but merges ``count`` patches between attention and MLP.

        Args:
            x: States ``[B, 1 + n, D]``, the class token first.
            sizes: ``[B, n]``, number of patches that each slot represents.
            matching: Chooses the pairs of patches to merge.
            count: Number of patches to merge away.
            bias: Added to the attention scores, computed from `sizes`; None if all sizes are 1.

        Returns:
            States ``[B, 1 + n - count, D]``, and the merged pairs, which include the new `sizes` of the slots.
        """
        attended, keys = self.attention.with_keys(self.norm1(x), bias)
        pairs: Pairs = matching(keys, sizes, count)
        x = merge(x + attended, pairs)
        return x + self.mlp(self.norm2(x)), pairs


class VisionTransformer(VisionModule):
    """Vision encoder (ViT): one embedding for each patch; if the class token is kept, its embedding is first."""

    config: VisionConfig

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.class_embedding = nn.Parameter(torch.zeros(width if config.clip else (1, 1, width)))
        positions = (config.num_positions, width)
        self.position_embedding = nn.Parameter(torch.zeros(positions if config.clip else (1, *positions)))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=not config.clip)
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.clip else None
        self.layers = stack(Block(config, config.qkv_bias) for _ in range(config.num_layers))
        self.matching = TokenMatching() if config.merge_tokens else None
        self.post_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.post_norm else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps ``pixel_values [B, 3, H, W]`` to ``image_embeds [B, P, D]``.

        ``P = 1 + (H / patch)²``, or one less without the class token. With token merging, P is smaller by the
        patches merged in all layers.
        """
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, P - 1, D]
        classes = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = torch.cat([classes, patches], dim=1) + self.position_embedding
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        if self.matching is None:
            for block in self.layers:
                x = block(x)
        else:
            x = self._merging_layers(x, self.matching)
        if self.post_norm is not None:
            x = self.post_norm(x)
        return x if self.config.keep_class else x[:, 1:]

    def _merging_layers(self, x: Tensor, matching: TokenMatching) -> Tensor:
        """Runs all layers and merges patches in each layer: maps ``[B, 1 + n, D]`` to the remaining embeddings."""
        sizes, bias = torch.ones_like(x[:, 1:, 0]), None
        counts = merged_counts(x.shape[1] - 1, len(self.layers), self.config.merge_tokens)
        for block, count in zip(self.layers, counts, strict=True):
            x, pairs = block.merging(x, sizes, matching, count, bias)
            sizes, bias = pairs.sizes, pairs.bias
        return x
