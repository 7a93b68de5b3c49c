"""Loads a bundle's decoder, with the kind of KV cache that its graph has."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import BundleError
from blip2edge.runtime.backends.base import BindingSession, InPlaceSession, Session
from blip2edge.runtime.decoding.kv.growing import GrowingDecoder
from blip2edge.runtime.decoding.kv.in_place import LENGTHS, InPlaceDecoder
from blip2edge.runtime.decoding.state import Decoder


@runtime_checkable
class HasDecoder(Protocol):
    """A loaded decoder graph whose backend has a KV cache of its own (TensorRT)."""

    def decoder(self, table: TokenTable) -> Decoder:
        """Makes the decoder that runs this graph; ``table`` is the token embedding table."""
        ...


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
