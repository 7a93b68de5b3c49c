"""Opens the graphs of a bundle so that a run on one picture also gives the attention weights of its bridge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import BRIDGE, DECODER, IMAGE_FEATURES, QUERY_IDS, VISION, GraphSpec
from blip2edge.calibration.activations.probe import open_tensors
from blip2edge.errors import BundleError, UsageError, option
from blip2edge.explanation.attention import AttentionLayer, LayerWeights, attention_layers, check_lengths, layer_weights
from blip2edge.explanation.grid import patch_grid
from blip2edge.graph_files import load_graph
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.captioning.assemble import text_parts
from blip2edge.runtime.captioning.encoder import checked_queries
from blip2edge.runtime.images.preprocess import Preprocessing

QUERY_GRAPHS = {BRIDGE: "visual_tokens", IMAGE_FEATURES: "image_features"}
"""Graphs that can have queries, each with the name of the output that has one vector for each query.

A bundle has at most one of these graphs.
"""


class Probe:
    """Runs the vision encoder and the bridge of a bundle on one picture, and returns the attention weights.

    Args:
        bundle: The bundle.
        graph: The graph with the queries, one of :data:`QUERY_GRAPHS`.
        layers: The layers of this graph in which queries attend to the picture.
        others: Inputs of the graph besides ``image_embeds``, by name.
        threads: CPU threads; None for all cores.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: str,
        layers: Sequence[AttentionLayer],
        others: dict[str, Array],
        threads: int | None,
    ) -> None:
        self.bundle, self.graph, self.layers = bundle, graph, layers
        self.preprocessing = Preprocessing.from_json(bundle.manifest.preprocessing)
        self.instruction: str | None = None
        vision, record = bundle.graph(VISION), bundle.graph(graph)
        self._dtype = NUMPY_DTYPES[vision.spec.inputs[0].dtype]
        self.grid = patch_grid(load_graph(bundle.file(vision.spec.file)), vision.spec)
        self._vision = OnnxRuntimeSession(bundle.file(vision.spec.file), threads)
        self.others = others
        model = load_graph(bundle.file(record.spec.file))
        size = sum(bundle.file(name).stat().st_size for name in record.data_files)
        tensors = [*(layer.tensor for layer in layers), QUERY_GRAPHS[graph]]
        self._bridge = open_tensors(model, tensors, bundle.path, size, threads)

    def __call__(self, picture: Image.Image) -> tuple[list[LayerWeights], Array, int]:
        """Runs the graphs on an upright RGB picture.

        Returns:
            The attention weights of each layer, the visual tokens ``[Q, D]``, and the number of heads.
        """
        pixels = self.preprocessing.batch([picture]).astype(self._dtype, copy=False)
        embeds = self._vision.run({"pixel_values": pixels})["image_embeds"]
        outputs = self._bridge.run({"image_embeds": embeds, **self.others})
        found = [outputs[layer.tensor] for layer in self.layers]
        check_lengths(self.layers, found, embeds.shape[1])
        grid = self.grid
        weights = [
            layer_weights(layer, one, embeds.shape[1], grid.rows, grid.columns)
            for layer, one in zip(self.layers, found, strict=True)
        ]
        return weights, outputs[QUERY_GRAPHS[self.graph]][0], found[0].shape[1]


def open_bridge(
    bundle: Bundle, prompt: str | None, queries: int | None, threads: int | None, *, gated: bool
) -> Probe | None:
    """Opens the graphs of a bundle; returns None if the bundle has gates, but no queries that attend to the picture.

    Args:
        bundle: The bundle.
        prompt: The instruction; None for the bundle's default.
        queries: Number of queries, for a bridge that works with several numbers (elastic); None for all.
        threads: CPU threads; None for all cores.
        gated: Whether the bundle's decoder has gates.

    Raises:
        BundleError: No queries attend to patches, or the patches are merged.
        PromptError: The prompt does not fit the model.
        UsageError: ``prompt`` or ``queries`` is given, but the bundle takes none.
    """
    manifest = bundle.manifest
    graph = next((name for name in QUERY_GRAPHS if name in manifest.graphs), None)
    layers: list[AttentionLayer] = []
    if graph is not None:
        layers = attention_layers(load_graph(bundle.file(bundle.graph(graph).spec.file)))
    if graph is None or not layers:
        if gated and prompt is None and queries is None:
            return None
        raise BundleError(
            f"{bundle.path} ({manifest.family}) has no queries that attend to patches: {_way_of_patches(bundle)}",
            "explain a bundle with a Q-Former, a perceiver or an attention pool",
        )
    if manifest.merging is not None:
        raise BundleError(
            f"{bundle.path} merges patches in its vision encoder, so that an embedding has no place in the picture",
            f"export the checkpoint without {option('merge_tokens')}, and explain that bundle",
        )
    others, instruction = _other_inputs(bundle, bundle.graph(graph).spec, prompt, checked_queries(bundle, queries))
    probe = Probe(bundle, graph, layers, others, threads)
    probe.instruction = instruction
    return probe


def _way_of_patches(bundle: Bundle) -> str:
    """Returns a clause for an error: how the model of a bundle without queries uses the patches."""
    if DECODER not in bundle.manifest.graphs:
        return "it compares the class token with the text"
    if BRIDGE in bundle.manifest.graphs:
        return "its bridge makes one visual token from each patch"
    return "its language model attends to all patches"


def _other_inputs(
    bundle: Bundle, spec: GraphSpec, prompt: str | None, queries: int | None
) -> tuple[dict[str, Array], str | None]:
    """Returns the bridge's inputs besides ``image_embeds`` for one picture, and the instruction in them (or None)."""
    found: dict[str, Array] = {}
    elastic, text = bundle.manifest.elastic, bundle.manifest.prompt
    if elastic is not None and any(tensor.name == QUERY_IDS for tensor in spec.inputs):
        found[QUERY_IDS] = np.arange(queries or elastic.max_queries, dtype=np.int64)[None]
    if text is not None and text.instruction_positions:
        parts = text_parts(bundle)
        instruction = parts.prompts.with_default(prompt)
        if parts.instructions is not None:
            arrays = parts.instructions([instruction])
            return found | {name: array[:1] for name, array in arrays.items()}, str(instruction)
    if prompt is not None:
        raise UsageError(
            f"{bundle.path} does not take {option('prompt')}: its bridge reads the picture only",
            f"leave {option('prompt')} out",
            field="prompt",
        )
    return found, None
