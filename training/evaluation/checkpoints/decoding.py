"""Decodes texts with checkpoints in torch, in batches and with a KV cache, on the device of the weights.

The rules of decoding (greedy, beams, sampling, limits of length, stop strings) are those of the runtime, in
:class:`blip2edge.runtime.captioning.pipeline.TextGenerator`. This module contains the language model for that class: a
decoder whose state keeps keys and values as tensors, so that a step computes only the new token of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CROSS_MASK
from blip2edge.model.config import LanguageConfig
from blip2edge.model.interfaces import DecoderModule
from blip2edge.model.language.registry import language_of
from blip2edge.model.layers import KeyValue
from blip2edge.runtime.captioning.pipeline import LanguageModel
from blip2edge.runtime.decoding.state import Decoder, RowState, SlotState
from blip2edge.runtime.text.prompt import Prompt, cross_attention_mask


@dataclass
class CrossSource:
    """The keys and values to which the decoder's cross-attention attends.

    Attributes:
        key_values: Keys and values ``[B, H, E, d]`` of each layer with cross-attention; empty without such layers.
        mask: int64 ``[B, E]``, 1 for valid states; None if all states are valid, or if each token has its own mask.
    """

    key_values: list[KeyValue]
    mask: Tensor | None = None

    def select(self, rows: Tensor) -> CrossSource:
        """Returns the keys and values of some rows of the batch; ``rows`` are the rows' numbers, int64 ``[B']``."""
        chosen = [(key[rows], value[rows]) for key, value in self.key_values]
        return CrossSource(chosen, None if self.mask is None else self.mask[rows])


class TorchDecoder(Decoder):
    """Runs a language model in torch, with the interface of :class:`blip2edge.runtime.decoding.state.Decoder`.

    Args:
        language: The language model, in eval mode.
        agree: Function that returns the logits of the first process in all processes, if several processes decode the
            same texts together; None for one process. All processes then make equally many steps.
    """

    def __init__(self, language: DecoderModule, agree: Callable[[Tensor], Tensor] | None = None) -> None:
        self.language = language
        self.agree = agree

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights, on which all computation runs."""
        return self.language.embed_tokens.weight.device

    def embed(self, token_ids: Any) -> Any:
        """Returns the embeddings ``[..., D]`` of token ids, a tensor on the device of the weights."""
        return self.language.embed(torch.as_tensor(token_ids, dtype=torch.int64, device=self.device))

    def start(
        self, prompts: Sequence[Tensor], source: CrossSource, cross_mask: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], TorchState]:
        """Runs the decoder on whole prompts, padded on the left, and fills the KV cache.

        Args:
            prompts: One embedded prompt ``[S_i, D]`` for each row; lengths may differ.
            source: Keys and values for the cross-attention.
            cross_mask: int64 ``[B, S, E]``, 1 for the states that each token attends to; None if all tokens of a row
                attend to the same states.

        Returns:
            The logits ``[B, V]`` after each prompt, and the decoder's state.
        """
        embeds = pad_sequence(list(prompts), batch_first=True, padding_side="left")
        longest = embeds.shape[1]
        mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], np.int64)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        state = TorchState(self, mask, positions[:, -1], source, cross_mask)
        return state.run(embeds, positions, 1)[:, 0], state  # type: ignore[arg-type]  # tensors in place of arrays


class TorchState(SlotState):
    """The decoding state of a batch; the keys and values stay on the device."""

    decoder: TorchDecoder

    def __init__(
        self,
        decoder: TorchDecoder,
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        source: CrossSource,
        cross_mask: NDArray[np.int64] | None,
    ) -> None:
        super().__init__(decoder, mask, positions, cross_mask)
        self._past: list[KeyValue] | None = None
        self._source = source
        self._origin = np.arange(len(positions))  # the row of the first batch that each row's source belongs to

    def make_room(self, steps: int) -> None:
        """Extends the attention mask by ``steps`` valid slots in each row, for new tokens."""
        self.mask = np.concatenate([self.mask, np.ones((self.batch_size, steps), np.int64)], axis=1)

    def select_cache(self, rows: NDArray[np.int64]) -> None:
        """Replaces row i of the KV cache by a copy of the old row ``rows[i]``, for every i."""
        chosen = torch.as_tensor(rows, device=self.decoder.device)
        self._past = [(key[chosen], value[chosen]) for key, value in self._past or ()]
        origin = self._origin[rows]
        if not np.array_equal(origin, self._origin):  # beams of one picture share its source
            self._source = self._source.select(chosen)
        self._origin = origin

    def select(self, rows: NDArray[np.int64]) -> None:
        """Replaces row i of the state by a copy of the old row ``rows[i]``, and removes slots that no row uses."""
        super().select(rows)
        unused = int(self.mask.any(axis=0).argmax())
        if unused:
            self.mask = self.mask[:, unused:]
            self._past = [(key[:, :, unused:], value[:, :, unused:]) for key, value in self._past or ()]

    def run_graph(self, inputs: dict[str, Array]) -> NDArray[np.float32]:
        """Runs the language model and keeps the new keys and values; returns logits ``[B, K, V]`` of K tokens."""
        device = self.decoder.device
        given = {name: torch.as_tensor(value, device=device) for name, value in inputs.items()}
        own_mask = given.pop(CROSS_MASK, self._source.mask)
        cross = {} if not self._source.key_values else {"cross": self._source.key_values, CROSS_MASK: own_mask}
        logits, self._past = self.decoder.language(**given, past=self._past, **cross)
        agree = self.decoder.agree
        found: NDArray[np.float32] = (logits.float() if agree is None else agree(logits.float())).cpu().numpy()
        return found

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Not supported: checkpoints are decoded without a draft model."""
        raise NotImplementedError

    def join(self, other: Any) -> None:
        """Not supported: a batch of a checkpoint is decoded until its last text is finished."""
        raise NotImplementedError


class TorchLanguage(LanguageModel):
    """The language model of a checkpoint: computes the first logits and the decoding state of prompts with pictures.

    Args:
        language: The language model, in eval mode.
        config: Config of the language model.
        start: Id of the decoder's first token, for an encoder-decoder model; None for 0.
        agree: Function that returns the logits of the first process in all processes, if several processes decode the
            same texts together; None for one process.
    """

    decoder: TorchDecoder

    def __init__(
        self,
        language: DecoderModule,
        config: LanguageConfig,
        start: int | None = None,
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        encodes = config.is_encoder_decoder
        super().__init__(TorchDecoder(language, agree), (start or 0,) if encodes else ())
        self._language = language
        self._cross = config.cross
        self._encoder_inputs = language_of(config.kind).encoder_inputs if encodes else ()

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Any]) -> tuple[NDArray[np.float32], RowState]:
        """Runs the prompts of a batch, with their pictures.

        Args:
            prompts: One prompt for each row.
            pictures: Tensors by name: ``image_embeds [B, P, Dv]`` and ``visual_tokens [B, Q, D]``.

        Returns:
            The logits ``[B, V]`` after each prompt, and the decoding state.
        """
        if self._encoder_inputs:
            return self._encode(prompts, pictures)
        source, cross_mask = CrossSource([]), None
        if self._cross is not None:
            states = pictures[self._cross.source]
            source = CrossSource(self._language.cross_key_values(states))
            if prompts[0].attends_to:
                most = max(prompt.images for prompt in prompts)
                cross_mask = cross_attention_mask([prompt.attends_to for prompt in prompts], most, states.shape[1])
        return self.decoder.start(self._embedded(prompts, pictures), source, cross_mask)

    def _encode(self, prompts: Sequence[Prompt], pictures: Mapping[str, Any]) -> tuple[NDArray[np.float32], RowState]:
        """Runs the encoder on the prompts, padded on the right, then the decoder on the start token."""
        reads_ids = "input_ids" in self._encoder_inputs
        rows = [self._ids(prompt.ids) for prompt in prompts] if reads_ids else self._embedded(prompts, pictures)
        padded = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
        given = {"inputs_embeds": padded, "input_ids": padded, "attention_mask": mask, **pictures}
        states = self._language.encode(*(given[name] for name in self._encoder_inputs))
        source = CrossSource(self._language.cross_key_values(states), mask)
        start = self.decoder.embed(self.initial)
        return self.decoder.start([start] * len(prompts), source)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.decoder.device)

    def _embedded(self, prompts: Sequence[Prompt], pictures: Mapping[str, Any]) -> list[Tensor]:
        """Returns the embedded prompt of each row, ``[S_i, D]``: token embeddings, and visual tokens for a picture."""
        rows = []
        for row, prompt in enumerate(prompts):
            parts = [self.decoder.embed(prompt.segments[0])]
            for segment in prompt.segments[1:]:
                parts += [pictures["visual_tokens"][row].to(parts[0].dtype), self.decoder.embed(segment)]
            rows.append(torch.cat(parts))
        return rows
