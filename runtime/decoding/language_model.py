"""Loads a bundle's language model (decoder, or text encoder and decoder), and runs prompts up to the first logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import (
    CROSS_KV,
    CROSS_MASK,
    DECODER,
    EMBEDDINGS_FILE,
    EMBEDDINGS_TENSOR,
    TEXT_ENCODER,
)
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import BundleError
from blip2edge.runtime.backends.base import BindingSession, InPlaceSession, Session
from blip2edge.runtime.decoding.kv.growing import GrowingDecoder
from blip2edge.runtime.decoding.kv.in_place import LENGTHS, InPlaceDecoder
from blip2edge.runtime.decoding.state import Decoder, RowState
from blip2edge.runtime.text.prompt import Prompt, cross_attention_mask


@runtime_checkable
class HasDecoder(Protocol):
    """A loaded decoder graph whose backend has a KV cache of its own (TensorRT)."""

    def decoder(self, table: TokenTable) -> Decoder:
        """Makes the decoder that runs this graph; ``table`` is the token embedding table."""
        ...


class LanguageModel:
    """A language model: the decoder, and the graphs that compute its inputs from prompts and pictures.

    Args:
        decoder: The decoder graph with its KV cache.
        initial: Ids that every text begins with (encoder-decoder models); empty if a text continues its prompt.
    """

    def __init__(self, decoder: Decoder, initial: tuple[int, ...] = ()) -> None:
        self.decoder = decoder
        self.initial = initial

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:
        """Computes the keys and values of cross-attention to the pictures, by name; empty without cross-attention.

        They do not depend on the prompts. If they are passed to :meth:`prefill` in ``pictures``, they are not computed
        again.
        """
        del pictures
        return {}

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> tuple[NDArray[np.float32], RowState]:
        """Runs the prompts of a batch.

        Args:
            prompts: The prompt of each row.
            pictures: Outputs of vision encoder and bridge by name: ``image_embeds [B, P, Dv]``, and
                ``visual_tokens [B, Q, D]`` if there is a bridge; optionally with the tensors of :meth:`context`.

        Returns:
            Logits ``[B, V]`` of the first token, and the decoder's state.
        """
        raise NotImplementedError


def load_language_model(bundle: Bundle, open_graph: Callable[[str], Session]) -> LanguageModel:
    """Loads a bundle's language model.

    Args:
        bundle: An opened bundle.
        open_graph: Loads a graph by name.
    """
    manifest = bundle.manifest
    decoder = decoder_of(bundle, open_graph(DECODER))
    cross_kv = open_graph(CROSS_KV) if CROSS_KV in manifest.graphs else None
    if TEXT_ENCODER not in manifest.graphs or cross_kv is None:
        source = bundle.graph(CROSS_KV).spec.inputs[0].name if cross_kv is not None else ""
        return DecoderOnly(decoder, cross_kv, source)
    start = manifest.generation["decoder_start_token_id"]
    takes = tuple(tensor.name for tensor in bundle.graph(TEXT_ENCODER).spec.inputs)
    return EncoderDecoder(decoder, open_graph(TEXT_ENCODER), takes, cross_kv, start)


def token_table(bundle: Bundle) -> TokenTable:
    """Returns the token embedding table of a bundle, in the dtype of the decoder's input embeddings."""
    dtype = bundle.graph(DECODER).spec.inputs[0].dtype
    return TokenTable(bundle.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, dtype)


def decoder_of(bundle: Bundle, session: Session) -> Decoder:
    """Makes the decoder for a bundle's loaded decoder graph; the graph's inputs determine the kind of KV cache.

    Raises:
        BundleError: The manifest describes no KV cache.
    """
    manifest, spec = bundle.manifest, bundle.graph(DECODER).spec
    if manifest.cache is None:
        raise BundleError(
            f"{bundle.path} has a decoder, but its bundle.json describes no KV cache", "export the checkpoint again"
        )
    table = token_table(bundle)
    if isinstance(session, HasDecoder):
        return session.decoder(table)
    if isinstance(session, (InPlaceSession, BindingSession)) and LENGTHS in session.input_names:
        return InPlaceDecoder(session, spec, manifest.cache, table, manifest.max_positions)
    return GrowingDecoder(session, spec, manifest.cache, table)


class DecoderOnly(LanguageModel):
    """A language model that continues its prompt; in BLIP and Flamingo it reads the pictures by cross-attention.

    Args:
        decoder: The decoder.
        cross_kv: The loaded ``cross_kv`` graph; None without cross-attention.
        source: Name of the input of the ``cross_kv`` graph: ``image_embeds`` or ``visual_tokens``.
    """

    def __init__(self, decoder: Decoder, cross_kv: Session | None, source: str) -> None:
        super().__init__(decoder)
        self.cross_kv = cross_kv
        self.source = source

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:
        """Computes the cross-attention keys and values; see :class:`LanguageModel`."""
        if self.cross_kv is None:
            return {}
        names = self.cross_kv.output_names
        if all(name in pictures for name in names):
            return {name: pictures[name] for name in names}
        return self.cross_kv.run({self.source: pictures[self.source]})

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> tuple[NDArray[np.float32], RowState]:
        """Runs the prompts; returns logits ``[B, V]`` and the decoder's state; see :class:`LanguageModel`."""
        context = self.context(pictures)
        if prompts[0].attends_to:
            most = max(prompt.images for prompt in prompts)
            keys = pictures[self.source].shape[1]
            context[CROSS_MASK] = cross_attention_mask([prompt.attends_to for prompt in prompts], most, keys)
        return self.decoder.prefill(_embedded(self.decoder.table, prompts, pictures), context)


class EncoderDecoder(LanguageModel):
    """A text encoder and a decoder (T5): the prompt is the encoder's input, and the decoder starts a new text.

    Args:
        decoder: The decoder; it cross-attends to the text encoder's outputs.
        encoder: The loaded ``text_encoder`` graph.
        takes: Names of the encoder's inputs: ``inputs_embeds``, or ``input_ids`` if the graph has its own token
            embeddings; also ``image_embeds`` if the encoder cross-attends to the picture.
        cross_kv: The loaded ``cross_kv`` graph.
        start_token_id: First id of every text.
    """

    def __init__(
        self,
        decoder: Decoder,
        encoder: Session,
        takes: Sequence[str],
        cross_kv: Session,
        start_token_id: int,
    ) -> None:
        super().__init__(decoder, (start_token_id,))
        self.encoder = encoder
        self.takes = takes
        self.cross_kv = cross_kv

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> tuple[NDArray[np.float32], RowState]:
        """Runs the text encoder on the prompts, and the decoder on the start token; see :class:`LanguageModel`."""
        batch = len(prompts)
        rows = (
            [np.array(prompt.ids, np.int64) for prompt in prompts]
            if "input_ids" in self.takes
            else _embedded(self.decoder.table, prompts, pictures)
        )
        longest = max(map(len, rows))
        dtype = np.dtype(np.int64) if "input_ids" in self.takes else self.decoder.embeds_dtype
        padded = np.zeros((batch, longest, *rows[0].shape[1:]), dtype)
        mask = np.zeros((batch, longest), np.int64)
        for row, values in enumerate(rows):  # padded on the right: the encoder's slots are positions
            padded[row, : len(values)] = values
            mask[row, : len(values)] = 1
        given = {"inputs_embeds": padded, "input_ids": padded, "attention_mask": mask, **pictures}
        states = self.encoder.run({name: given[name] for name in self.takes})["encoder_states"]
        context = {**self.cross_kv.run({"encoder_states": states}), "cross_attention_mask": mask}
        start = self.decoder.table.rows(self.initial)
        return self.decoder.prefill([start] * batch, context)


def _embedded(table: TokenTable, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> list[Array]:
    """Returns the embedded prompt of each row ``[S_i, D]``; visual tokens replace the placeholders of the picture."""
    visual = pictures.get("visual_tokens")
    return [prompt.embed(table, None if visual is None else visual[row]) for row, prompt in enumerate(prompts)]
