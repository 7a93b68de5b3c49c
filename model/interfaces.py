"""Base classes of the language models and of the matchers: the methods that training and export call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from blip2edge.model.layers import KeyValue, gather_positions

LayerStep = Callable[[int, Tensor, KeyValue | None], tuple[Tensor, KeyValue]]
"""Runs one layer: its index, ``x [B, S, D]`` and its cache, to ``[B, S, D]`` and the extended cache."""


class DecoderModule(nn.Module):
    """A language model: takes embeddings and the KV cache, gives logits and the extended cache.

    A model implements :meth:`start` and :meth:`logits`. One :meth:`forward` serves prefill, decoding and verification:
    the cache is an argument, not a state.
    """

    embed_tokens: nn.Embedding
    layers: Sequence[nn.Module]

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 ``[B, S]`` to ``[B, S, D]``."""
        return self.embed_tokens(token_ids)

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the encoder on its inputs (``Language.encoder_inputs``); returns states ``[B, E, D]``.

        Only encoder-decoder models have it.
        """
        raise NotImplementedError

    def cross_key_values(self, source: Tensor) -> list[KeyValue]:
        """``[B, E, Ds]`` to two of ``[B, H, E, d]`` per layer with cross-attention.

        Only models with cross-attention have it.
        """
        raise NotImplementedError

    def start(
        self, x: Tensor, mask: Tensor, positions: Tensor, cross: Sequence[KeyValue], cross_mask: Tensor | None, /
    ) -> tuple[Tensor, LayerStep]:
        """The input of the first layer, and what runs a layer; the arguments are those of :meth:`forward`."""
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """``[B, K, D]`` after the last layer to logits ``[B, K, V]``."""
        raise NotImplementedError

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_indices: Tensor | None = None,
        past: Sequence[KeyValue] | None = None,
        cross: Sequence[KeyValue] = (),
        cross_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Runs all layers.

        Args:
            inputs_embeds: ``[B, S, D]``.
            attention_mask: int64 ``[B, P + S]``, 1 where a slot is valid.
            position_ids: int64 ``[B, S]``, counted from 0.
            logits_indices: int64 ``[B, K]``, which of the S slots need logits; None for all.
            past: A pair of ``[B, H, P, d]`` per layer, with the heads of the cache; None for an empty one.
            cross: Keys and values of cross-attention, two of ``[B, H, E, d]`` per layer that has it, from
                :meth:`cross_key_values`; empty without cross-attention.
            cross_attention_mask: int64 ``[B, E]``, 1 where a state is valid, or ``[B, S, E]``, 1 where a token
                attends to a state (:data:`blip2edge.bundle.schema.CROSS_MASKS`); None for all.

        Returns:
            ``logits [B, K, V]`` and a pair of ``[B, H, P + S, d]`` per layer.
        """
        x, step = self.start(inputs_embeds, attention_mask, position_ids, cross, cross_attention_mask)
        presents: list[KeyValue] = []
        for index in range(len(self.layers)):
            x, present = step(index, x, None if past is None else past[index])
            presents.append(present)
        return self.logits(gather_positions(x, logits_indices)), presents


class MatcherModule(nn.Module):
    """Compares a picture with a text."""

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """``[B, P, Dv]`` to K unit vectors per picture, ``[B, K, F]``; only the one nearest to a text counts."""
        raise NotImplementedError

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and their mask, int64 ``[B, S]`` each, padded on the right, to unit vectors ``[B, F]``."""
        raise NotImplementedError

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[B, 2]``: do not match, match. Only models with an ITM head have it."""
        raise NotImplementedError
