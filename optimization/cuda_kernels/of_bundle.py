"""Reads the layout of a bundle's decoder for the CUDA kernels, or says why there are none."""

from __future__ import annotations

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import CROSS_KV, DECODER, TEXT_ENCODER
from blip2edge.errors import BundleError, option
from blip2edge.graph_files import load_graph
from blip2edge.optimization.cuda_kernels.layout import layout_of_graph
from blip2edge.runtime.backends.base import check_precision
from blip2edge.runtime.cuda.copy_files import NAME
from blip2edge.runtime.cuda.layout import DecoderLayout


def layout_of_bundle(bundle: Bundle) -> DecoderLayout:
    """Reads the layout of a bundle's decoder from its graph.

    Raises:
        BundleError: There are no kernels for this decoder.
        BackendError: There are no kernels for this precision.
    """
    check_precision(NAME, bundle.manifest.precision)
    crossing = [graph for graph in (TEXT_ENCODER, CROSS_KV) if graph in bundle.manifest.graphs]
    if crossing:
        raise BundleError(
            f"expected a decoder of the OPT or Llama kind, got that of {bundle.manifest.family}, which has "
            f"cross-attention (graph {crossing[0]}); there are no CUDA kernels for T5 and other such decoders",
            f"use {option('backend')} cuda",
        )
    if bundle.manifest.cache is None:
        raise BundleError(f"{bundle.path} describes no KV cache in its bundle.json", "export the checkpoint again")
    graph = load_graph(bundle.file(bundle.graph(DECODER).spec.file))
    return layout_of_graph(graph, bundle.manifest.cache, bundle.manifest.max_positions)
