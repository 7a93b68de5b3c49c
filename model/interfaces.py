"""Base classes of vision encoders, language models and matchers: the methods that training and export call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from blip2edge.model.config import VisionEncoderConfig
from blip2edge.model.layers import KeyValue, gather_positions

LayerStep = Callable[[int, Tensor, KeyValue | None], tuple[Tensor, KeyValue]]
"""A function that runs one layer.

Its arguments are the layer's index, the layer's input ``[B, S, D]``, and the layer's cached keys and values. It returns
the layer's output ``[B, S, D]``, and the cached keys and values followed by those of the S new slots.
"""


class VisionModule(nn.Module):
    """A vision encoder: maps pictures to embeddings."""

    config: VisionEncoderConfig

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps ``pixel_values [B, 3, H, W]`` to ``image_embeds [B, P, D]``."""
        raise NotImplementedError


class DecoderModule(nn.Module):
    """A language model: maps embeddings and the KV cache to logits and the extended cache.

    A subclass implements :meth:`start` and :meth:`logits`. The same :meth:`forward` runs prefill, decode steps and the
    verification of draft tokens: the cache is an argument, and no state is stored in the module.
    """

    embed_tokens: nn.Embedding
    layers: Sequence[nn.Module]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Returns the embeddings ``[B, S, D]`` of token ids, int64 ``[B, S]``."""
        return self.embed_tokens(token_ids)

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the encoder of an encoder-decoder model; returns its states ``[B, E, D]``.

        The arguments are the tensors that ``Language.encoder_inputs`` names for this model. Other models do not
        implement this method.
        """
        raise NotImplementedError

    def cross_key_values(self, source: Tensor) -> list[KeyValue]:
        """Computes keys and values ``[B, H, E, d]`` of each layer with cross-attention, from E states ``[B, E, Ds]``.

        Only models with cross-attention implement this method.
        """
        raise NotImplementedError

    def start(
        self, x: Tensor, mask: Tensor, positions: Tensor, cross: Sequence[KeyValue], cross_mask: Tensor | None, /
    ) -> tuple[Tensor, LayerStep]:
        """Returns the input of the first layer, and a function that runs one layer.

        The arguments are these arguments of :meth:`forward`, in this order: ``inputs_embeds``, ``attention_mask``,
        ``position_ids``, ``cross`` and ``cross_attention_mask``.
        """
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """Maps the last layer's output at K slots, ``[B, K, D]``, to logits ``[B, K, V]`` over V tokens."""
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
            inputs_embeds: Embeddings of the new tokens, ``[B, S, D]``.
            attention_mask: int64 ``[B, P + S]``, 1 where a slot is valid.
            position_ids: Positions of the new tokens, int64 ``[B, S]``, counted from 0.
            logits_indices: int64 ``[B, K]``, indices of the slots to compute logits for; None for all S.
            past: KV cache: keys and values ``[B, H, P, d]`` of each layer; None for an empty cache.
            cross: Keys and values ``[B, H, E, d]`` of each layer with cross-attention, from :meth:`cross_key_values`;
                empty without cross-attention.
            cross_attention_mask: int64 ``[B, E]``, 1 where a state is valid, or ``[B, S, E]``, 1 where a token
                attends to a state (:data:`blip2edge.bundle.schema.CROSS_MASKS`); None for all.

        Returns:
            Logits ``[B, K, V]``, and the extended cache: keys and values ``[B, H, P + S, d]`` of each layer.
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
        """Computes K unit vectors per picture, ``[B, K, F]``; a text is compared with the nearest of them."""
        raise NotImplementedError

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes unit vectors ``[B, F]`` of texts: ids and mask are int64 ``[B, S]``, padded on the right."""
        raise NotImplementedError

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes the logits ``[B, 2]`` of "do not match" and "match". Only models with an ITM head implement it."""
        raise NotImplementedError
