"""Language models as the captioner sees them: prompts in, first logits and a state to go on from out."""

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
from blip2edge.runtime.decoding.kv.growing import Decoder
from blip2edge.runtime.decoding.kv.in_place import LENGTHS, SharedDecoder
from blip2edge.runtime.decoding.state import RowState
from blip2edge.runtime.text.prompt import Prompt, look_mask


@runtime_checkable
class OpensDecoder(Protocol):
    """A loaded decoder graph of a backend that has a decoder of its own."""

    def decoder(self, table: TokenTable) -> AnyDecoder:
        """The decoder."""
        ...


class AnyDecoder(Protocol):
    """A decoder, however it keeps its keys and values."""

    @property
    def table(self) -> TokenTable:
        """The token table."""
        ...

    @property
    def embeds_dtype(self) -> np.dtype[Any]:
        """Of the embeddings that it takes."""
        ...

    @property
    def most_rows(self) -> int | None:
        """The most rows that it takes at once; None for no such bound."""
        ...

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], RowState]:
        """See :meth:`blip2edge.runtime.decoding.kv.growing.Decoder.prefill`."""
        ...


class LanguageModel(Protocol):
    """A decoder, or an encoder and a decoder."""

    @property
    def decoder(self) -> AnyDecoder:
        """The decoder."""
        ...

    @property
    def table(self) -> TokenTable:
        """Rows for the prompt's tokens."""
        ...

    @property
    def initial(self) -> tuple[int, ...]:
        """Ids that every caption begins with; empty where it goes on from the prompt."""
        ...

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:
        """What it computes of pictures whatever the prompts are, by names of its own; empty for nothing.

        Who prefills with the same pictures again may hand it in among them.
        """
        ...

    def prefill(
        self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]
    ) -> tuple[NDArray[np.float32], RowState]:
        """Reads a batch.

        Args:
            prompts: One a row.
            pictures: What the graphs before it made of the pictures, by the name of the output:
                ``image_embeds [B, P, Dv]``, and ``visual_tokens [B, Q, D]`` where there is a bridge; perhaps
                with their :meth:`context`.

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
        return Continuation(decoder, cross_kv, source)
    start = manifest.generation["decoder_start_token_id"]
    takes = tuple(tensor.name for tensor in bundle.graph(TEXT_ENCODER).spec.inputs)
    return EncoderDecoder(decoder, open_graph(TEXT_ENCODER), takes, cross_kv, start)


def decoder_of(bundle: Bundle, session: Session) -> AnyDecoder:
    """A bundle's decoder over a loaded graph, portable or with a shared cache.

    Raises:
        BundleError: The bundle tells nothing of the cache.
    """
    manifest, spec = bundle.manifest, bundle.graph(DECODER).spec
    if manifest.cache is None:
        raise BundleError(
            f"{bundle.path} has no cache, though it has a decoder", "export the checkpoint again"
        )
    table = TokenTable(bundle.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, spec.inputs[0].dtype)
    if isinstance(session, OpensDecoder):
        return session.decoder(table)
    if isinstance(session, OnnxRuntimeSession) and LENGTHS in session.input_names:
        return SharedDecoder(session, spec, manifest.cache, table, manifest.max_positions)
    return Decoder(session, spec, manifest.cache, table)


class Continuation:
    """A decoder that goes on from its prompt; it may also look at the picture (BLIP), or at several (Flamingo).

    Args:
        decoder: The decoder.
        cross_kv: The loaded ``cross_kv`` graph; None where the decoder looks at its text alone.
        source: What that graph reads, a key of ``pictures``.
    """

    initial: tuple[int, ...] = ()

    def __init__(self, decoder: AnyDecoder, cross_kv: Session | None, source: str) -> None:
        self.decoder = decoder
        self.cross_kv = cross_kv
        self.source = source

    @property
    def table(self) -> TokenTable:
        """The token table."""
        return self.decoder.table

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:
        """See :class:`LanguageModel`: the pictures' keys and values."""
        if self.cross_kv is None:
            return {}
        names = self.cross_kv.output_names
        if all(name in pictures for name in names):
            return {name: pictures[name] for name in names}
        return self.cross_kv.run({self.source: pictures[self.source]})

    def prefill(
        self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]
    ) -> tuple[NDArray[np.float32], RowState]:
        """See :class:`LanguageModel`."""
        context = self.context(pictures)
        if prompts[0].looks:
            most = max(prompt.pictures for prompt in prompts)
            keys = pictures[self.source].shape[1]
            context[CROSS_MASK] = look_mask([prompt.looks for prompt in prompts], most, keys)
        return self.decoder.prefill(_embedded(self.table, prompts, pictures), context)


class EncoderDecoder:
    """A text encoder before a decoder (T5): the prompt goes to the encoder, the caption begins by itself.

    Args:
        decoder: The decoder, which looks at the encoder's states.
        encoder: The loaded ``text_encoder`` graph.
        takes: Its inputs' names: ``inputs_embeds``, or ``input_ids`` where it has a token table of its own; with
            ``image_embeds`` where it looks at the picture.
        cross_kv: The loaded ``cross_kv`` graph.
        start_token_id: What every caption begins with.
    """

    def __init__(
        self,
        decoder: AnyDecoder,
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
        """The decoder's token table, and the encoder's where that takes embeddings."""
        return self.decoder.table

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ARG002 - the protocol's
        """See :class:`LanguageModel`: nothing, as the encoder reads pictures and prompt together."""
        return {}

    def prefill(
        self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]
    ) -> tuple[NDArray[np.float32], RowState]:
        """See :class:`LanguageModel`; the logits are those behind the start token."""
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
    """A ``[S_i, D]`` a row: the table's rows, and the visual tokens where the prompt has a picture."""
    visual = pictures.get("visual_tokens")
    return [
        prompt.embed(table, None if visual is None else visual[row]) for row, prompt in enumerate(prompts)
    ]
