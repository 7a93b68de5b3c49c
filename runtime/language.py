"""Language models as the captioner sees them: prompts in, first logits and a state to go on from out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blip2edge.contract import CROSS_KV, DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR, TEXT_ENCODER
from blip2edge.manifest import Bundle
from blip2edge.runtime.decoder import Decoder, DecoderState
from blip2edge.runtime.embeddings import TokenTable
from blip2edge.runtime.session import Array, Session


class LanguageModel(Protocol):
    """A decoder, or an encoder and a decoder."""

    @property
    def table(self) -> TokenTable:
        """Rows for the prompt's tokens."""
        ...

    @property
    def initial(self) -> tuple[int, ...]:
        """Ids that every caption begins with; empty where it goes on from the prompt."""
        ...

    def prefill(self, prompts: Sequence[Array]) -> tuple[NDArray[np.float32], DecoderState]:
        """Reads prompts ``[S_i, D]``; logits ``[B, V]`` of the first token, and the state."""
        ...


def load_language_model(bundle: Bundle, open_graph: Callable[[str], Session]) -> LanguageModel:
    """Loads a bundle's language model.

    Args:
        bundle: An opened bundle.
        open_graph: Loads a graph by name.
    """
    manifest = bundle.manifest
    spec = bundle.graph(DECODER).spec
    table = TokenTable(bundle.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, spec.inputs[0].dtype)
    decoder = Decoder(open_graph(DECODER), spec, manifest.cache, table)
    if TEXT_ENCODER not in manifest.graphs:
        return decoder
    start = manifest.generation["decoder_start_token_id"]
    return EncoderDecoder(decoder, open_graph(TEXT_ENCODER), open_graph(CROSS_KV), start)


class EncoderDecoder:
    """A text encoder before a decoder (T5): the prompt goes to the encoder, the caption begins by itself.

    Args:
        decoder: The decoder, which looks at the encoder's states.
        encoder: The loaded ``text_encoder`` graph.
        cross_kv: The loaded ``cross_kv`` graph.
        start_token_id: What every caption begins with.
    """

    def __init__(self, decoder: Decoder, encoder: Session, cross_kv: Session, start_token_id: int) -> None:
        self.decoder = decoder
        self.encoder = encoder
        self.cross_kv = cross_kv
        self.initial = (start_token_id,)

    @property
    def table(self) -> TokenTable:
        """The token table, the same for prompt and caption."""
        return self.decoder.table

    def prefill(self, prompts: Sequence[Array]) -> tuple[NDArray[np.float32], DecoderState]:
        """See :meth:`Decoder.prefill`; the logits are those behind the start token."""
        batch, longest = len(prompts), max(len(prompt) for prompt in prompts)
        embeds = np.zeros((batch, longest, self.table.width), self.decoder.embeds_dtype)
        mask = np.zeros((batch, longest), np.int64)
        for row, prompt in enumerate(prompts):  # padded on the right: the encoder's slots are positions
            embeds[row, : len(prompt)] = prompt
            mask[row, : len(prompt)] = 1
        states = self.encoder.run({"inputs_embeds": embeds, "attention_mask": mask})["encoder_states"]
        context = {**self.cross_kv.run({"encoder_states": states}), "cross_attention_mask": mask}
        start = self.table.rows(self.initial)
        return self.decoder.prefill([start] * batch, context)
