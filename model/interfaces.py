"""What a model's parts have in common, whatever they are made of: what is trained, traced and run by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from blip2edge.model.layers import KeyValue


class DecoderModule(nn.Module):
    """A language model, embeddings in, logits and the grown cache out: what every kind of them has.

    The decoder contract, ``forward``:

        inputs_embeds: ``[B, S, D]``.
        attention_mask: int64 ``[B, P + S]``, 1 where a slot is valid.
        position_ids: int64 ``[B, S]``, counted from 0.
        logits_indices: int64 ``[B, K]``, which of the S slots need logits; None for all.
        past: A pair of ``[B, H, P, d]`` a layer, with the heads of the cache; None for an empty one.
        cross: Where it looks at more than its text: two of ``[B, H, E, d]`` a layer that looks, from
            :meth:`cross_key_values`.
        cross_attention_mask: int64 ``[B, E]``, 1 where a state is valid, or ``[B, S, E]``, 1 where a slot looks
            (:data:`blip2edge.bundle.schema.CROSS_MASKS`); None for all.

    It gives ``logits [B, K, V]`` and a pair of ``[B, H, P + S, d]`` a layer.
    """

    embed_tokens: nn.Embedding
    layers: Sequence[nn.Module]

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 ``[B, S]`` to ``[B, S, D]``."""
        return self.embed_tokens(token_ids)

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """What its encoder reads (``Language.encoder_inputs``) to states ``[B, E, D]``; of those that have one."""
        raise NotImplementedError

    def cross_key_values(self, source: Tensor) -> list[KeyValue]:
        """``[B, E, Ds]`` to two of ``[B, H, E, d]`` a layer that looks at more than the text; where one does."""
        raise NotImplementedError


class MatcherModule(nn.Module):
    """What compares a picture with a text."""

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """``[B, P, Dv]`` to ``[B, K, F]`` of length 1; the one that is nearest to the text counts."""
        raise NotImplementedError

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Int64 ``[B, S]`` twice, padded on the right, to ``[B, F]`` of length 1."""
        raise NotImplementedError

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[B, 2]``: apart, together; of those that have such a head."""
        raise NotImplementedError
