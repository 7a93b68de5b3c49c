"""The captioner in PyTorch. Training and export use it, and exported graphs are checked against it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2edge.model.bridges.registry import build_bridge
from blip2edge.model.bridges.text_head import TextHead
from blip2edge.model.config import CaptionerConfig, QFormerConfig
from blip2edge.model.language.registry import language_of
from blip2edge.model.vision.registry import build_vision


class CaptionerModel(nn.Module):
    """A captioner: vision encoder, bridge, language model, and the Q-Former's text head if the checkpoint has one."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = build_vision(config.vision)
        self.bridge = build_bridge(config.bridge, config.language)
        self.language = language_of(config.language.kind).build(config.language)
        self.draft: TextHead | None = None
        if config.draft is not None and isinstance(config.bridge, QFormerConfig):
            self.draft = TextHead(config.draft, config.bridge)

    def visual_tokens(self, pixel_values: Tensor, *instruction: Tensor) -> Tensor:
        """Maps ``pixel_values [B, 3, H, W]`` to visual tokens ``[B, Q, D]``, with vision encoder and bridge.

        If the bridge reads an instruction, ``instruction`` is token ids and mask, int64 ``[B, T]`` each.
        """
        return self.bridge(self.vision(pixel_values), *instruction)

    def forward(self, visual_tokens: Tensor, token_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Computes the logits of a given text after its visual tokens (teacher forcing).

        Args:
            visual_tokens: Output of :meth:`visual_tokens`, ``[B, Q, D]``.
            token_ids: Token ids of the text, int64 ``[B, S]``; the first is BOS.
            token_mask: int64 ``[B, S]``, 1 where a token is valid; None for all.

        Returns:
            Logits after each token of the text, ``[B, S, V]``.
        """
        batch, queries = visual_tokens.shape[:2]
        embeds = torch.cat([visual_tokens, self.language.embed(token_ids)], dim=1)
        text = torch.ones_like(token_ids) if token_mask is None else token_mask
        mask = torch.cat([text.new_ones(batch, queries), text], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        text_slots = torch.arange(queries, embeds.shape[1], device=embeds.device).expand(batch, -1)
        logits, _ = self.language(embeds, mask, positions, text_slots)
        return logits
