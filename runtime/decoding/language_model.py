"""Language models (a decoder, or a text encoder and a decoder): from prompts to the first logits and a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

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
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.decoding.kv.growing import GrowingDecoder
from blip2edge.runtime.decoding.kv.in_place import LENGTHS, InPlaceDecoder
from blip2edge.runtime.decoding.state import RowState
from blip2edge.runtime.text.prompt import Prompt, cross_attention_mask


@runtime_checkable
class HasDecoder(Protocol):
    """A loaded decoder graph of a backend with its own KV cache."""

    def decoder(self, table: TokenTable) -> Decoder:
        """The decoder over this graph."""
        ...


class Decoder(Protocol):
    """A decoder with any form of KV cache."""

    @property
    def table(self) -> TokenTable:
        """The token table."""
        ...

    @property
    def embeds_dtype(self) -> np.dtype[Any]:
        """Of its input embeddings."""
        ...

    @property
    def max_rows(self) -> int | None:
        """The largest batch; None for no limit."""
        ...

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], RowState]:
        """See :meth:`blip2edge.runtime.decoding.kv.growing.GrowingDecoder.prefill`."""
        ...


class LanguageModel(Protocol):
    """A decoder, or an encoder and a decoder."""

    @property
    def decoder(self) -> Decoder:
        """The decoder."""
        ...

    @property
    def table(self) -> TokenTable:
        """Embeddings of the prompt's tokens."""
        ...

    @property
    def initial(self) -> tuple[int, ...]:
        """Ids that every text begins with (encoder-decoder models); empty where it continues the prompt."""
        ...

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:
        """Tensors of the pictures that do not depend on the prompts, by name: cross-attention keys and values.

        They may be passed to :meth:`prefill` among ``pictures``, to save computing them again.
        """
        ...

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> tuple[NDArray[np.float32], RowState]:
        """Runs the prompts of a batch.

        Args:
            prompts: One a row.
            pictures: Outputs of vision encoder and bridge by name: ``image_embeds [B, P, Dv]``, and
                ``visual_tokens [B, Q, D]`` where there is a bridge; optionally with their :meth:`context`.

        Returns:
            Logits ``[B, V]`` of the first token, and the state.
        """
        ...


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
    """A bundle's token table, in the dtype of the decoder's embeddings."""
    dtype = bundle.graph(DECODER).spec.inputs[0].dtype
    return TokenTable(bundle.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, dtype)


def decoder_of(bundle: Bundle, session: Session) -> Decoder:
    """A bundle's decoder over a loaded graph; the graph decides the form of the KV cache.

    Raises:
        BundleError: The manifest has no cache.
    """
    manifest, spec = bundle.manifest, bundle.graph(DECODER).spec
    if manifest.cache is None:
        raise BundleError(
            f"{bundle.path} has a decoder, but its bundle.json describes no KV cache", "export the checkpoint again"
        )
    table = token_table(bundle)
    if isinstance(session, HasDecoder):
        return session.decoder(table)
    if isinstance(session, OnnxRuntimeSession) and LENGTHS in session.input_names:
        return InPlaceDecoder(session, spec, manifest.cache, table, manifest.max_positions)
    return GrowingDecoder(session, spec, manifest.cache, table)


class DecoderOnly:
    """A decoder that continues its prompt; it may cross-attend to the picture (BLIP), or to several (Flamingo).

    Args:
        decoder: The decoder.
        cross_kv: The loaded ``cross_kv`` graph; None without cross-attention.
        source: The input of that graph, a key of ``pictures``.
    """

    initial: tuple[int, ...] = ()

    def __init__(self, decoder: Decoder, cross_kv: Session | None, source: str) -> None:
        self.decoder = decoder
        self.cross_kv = cross_kv
        self.source = source

    @property
    def table(self) -> TokenTable:
        """The token table."""
        return self.decoder.table

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:
        """See :class:`LanguageModel`: cross-attention keys and values."""
        if self.cross_kv is None:
            return {}
        names = self.cross_kv.output_names
        if all(name in pictures for name in names):
            return {name: pictures[name] for name in names}
        return self.cross_kv.run({self.source: pictures[self.source]})

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> tuple[NDArray[np.float32], RowState]:
        """See :class:`LanguageModel`."""
        context = self.context(pictures)
        if prompts[0].attends_to:
            most = max(prompt.images for prompt in prompts)
            keys = pictures[self.source].shape[1]
            context[CROSS_MASK] = cross_attention_mask([prompt.attends_to for prompt in prompts], most, keys)
        return self.decoder.prefill(_embedded(self.table, prompts, pictures), context)


class EncoderDecoder:
    """A text encoder and a decoder (T5): the encoder takes the prompt, and the decoder starts a new text.

    Args:
        decoder: The decoder; it cross-attends to the encoder's states.
        encoder: The loaded ``text_encoder`` graph.
        takes: Names of its inputs: ``inputs_embeds``, or ``input_ids`` where it has its own token table; with
            ``image_embeds`` where it cross-attends to the picture.
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
        self.decoder = decoder
        self.encoder = encoder
        self.takes = takes
        self.cross_kv = cross_kv
        self.initial = (start_token_id,)

    @property
    def table(self) -> TokenTable:
        """The token table of the decoder, and of an encoder that takes embeddings."""
        return self.decoder.table

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ARG002 - the protocol's
        """See :class:`LanguageModel`: empty, as the encoder takes pictures and prompt together."""
        return {}

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> tuple[NDArray[np.float32], RowState]:
        """See :class:`LanguageModel`; the logits are those after the start token."""
        batch = len(prompts)
        rows = (
            [np.array(prompt.ids, np.int64) for prompt in prompts]
            if "input_ids" in self.takes
            else _embedded(self.table, prompts, pictures)
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
        start = self.table.rows(self.initial)
        return self.decoder.prefill([start] * batch, context)


def _embedded(table: TokenTable, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> list[Array]:
    """One ``[S_i, D]`` a row: token embeddings, and the visual tokens in the picture's place."""
    visual = pictures.get("visual_tokens")
    return [prompt.embed(table, None if visual is None else visual[row]) for row, prompt in enumerate(prompts)]
