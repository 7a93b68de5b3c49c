"""Measures the sensitivity of each layer: how much the next token changes if only that layer is quantized.

A layer contains the matrices of a graph whose names share a layer's path (``language.layers.3``). The loss of a layer
is the Kullback-Leibler divergence from the original model, in nats per token, of the next-token distribution of the
whole model if only this layer is quantized. It is measured on some pictures, with the captions of the original model
after the prompt. So layers of the vision encoder and of the language model are compared by the same measure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import DECODER
from blip2edge.calibration.activations.probe import open_probe
from blip2edge.calibration.activations.qdq import ActivationPlan, insert_qdq
from blip2edge.calibration.batches import PictureRunner, SubstituteSession
from blip2edge.calibration.pictures import CalibrationPicture
from blip2edge.calibration.storage import InMemoryStore
from blip2edge.calibration.weights.blocks import restored
from blip2edge.calibration.weights.weight_only import all_logits, block_tensors, form_of
from blip2edge.graph_files import load_graph
from blip2edge.progress import counted
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession

PICTURES = 8
"""Number of pictures on which each layer is measured."""

LAYER = re.compile(r"^(.*?\.\d+)\.")
"""Finds, in a weight's name, the path of the layer to which the weight belongs."""


@dataclass(frozen=True)
class QuantizedLayer:
    """The quantized matrices of a layer.

    Attributes:
        graph: The graph's name.
        name: The layer's path, or the name of a matrix that is in no layer.
        weights: Names of the matrices' initializers.
    """

    graph: str
    name: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of a layer: how much the model's logits change if only this layer is quantized.

    Attributes:
        layer: The layer.
        loss: Divergence of the logits from those of the original model, in nats per token.
    """

    layer: QuantizedLayer
    loss: float

    def to_json(self) -> dict[str, Any]:
        """Returns the sensitivity as a JSON object for the manifest and ``report.json``."""
        return {"graph": self.layer.graph, "layer": self.layer.name, "loss": float(f"{self.loss:.4g}")}


def group_by_layer(graph: str, weights: Sequence[str]) -> list[QuantizedLayer]:
    """Groups the weights of a graph by their layers, in order; a weight in no layer is a group of its own."""
    groups: dict[str, list[str]] = {}
    for weight in weights:
        match = LAYER.match(weight)
        groups.setdefault(match.group(1) if match else weight, []).append(weight)
    return [QuantizedLayer(graph, name, tuple(members)) for name, members in groups.items()]


def divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Computes the Kullback-Leibler divergence: the mean over tokens of ``Σ p (log p - log q)``.

    Args:
        reference: Logits of the original model, ``[..., V]``; p is their softmax.
        logits: Logits of another model, ``[..., V]``; q is their softmax.

    Returns:
        The divergence in nats per token.
    """
    first, second = _log_softmax(reference), _log_softmax(logits)
    return float((np.exp(first) * (first - second)).sum(axis=-1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normal: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normal


class DivergenceMeter:
    """Measures, over some pictures, how much the logits change if some of the original graphs are replaced.

    Args:
        parent: The bundle before calibration.
        pictures: The pictures.
        texts: Token ids of the original bundle's caption of each picture.
        threads: CPU threads; None for all cores.
    """

    def __init__(
        self,
        parent: Bundle,
        pictures: Sequence[CalibrationPicture],
        texts: Sequence[Sequence[int]],
        threads: int | None,
    ) -> None:
        self._parent = parent
        self._threads = threads
        self._given = list(zip(pictures, texts, strict=True))
        self._order = list(parent.manifest.graphs)
        self._sessions: dict[str, Session] = {
            name: OnnxRuntimeSession(parent.file(record.spec.file), threads)
            for name, record in parent.manifest.graphs.items()
        }
        self._outputs: dict[str, list[dict[str, Array]]] = {name: [] for name in self._order}
        self._reference = self._logits(
            {name: _recording(session, self._outputs[name]) for name, session in self._sessions.items()}
        )

    def loss(self, replaced: Mapping[str, Session], bundle: Bundle | None = None) -> float:
        """Measures the divergence from the original model if some graphs are replaced.

        Graphs that run before the first replaced graph are not run again.

        Args:
            replaced: The sessions that replace those of the original graphs, by the graph's name.
            bundle: The bundle with the token embedding table; None for the original bundle.

        Returns:
            The divergence in nats per token.
        """
        sessions = dict(self._sessions)
        for name in self._order[: min(map(self._order.index, replaced))]:
            sessions[name] = _replaying(self._sessions[name], self._outputs[name])
        found = self._logits({**sessions, **replaced}, bundle)
        return float(np.mean([divergence(*pair) for pair in zip(self._reference, found, strict=True)]))

    def measure(self, layer: QuantizedLayer, quantized: ir.Model) -> Sensitivity:
        """Measures the sensitivity of a layer.

        Args:
            layer: The layer.
            quantized: The graph in which only this layer is quantized; the other weights are in the directory of the
                original bundle.
        """
        record = self._parent.graph(layer.graph)
        size = sum(self._parent.manifest.files[file].size for file in record.data_files)
        session = open_probe(ir.to_proto(quantized), self._parent.path, size, self._threads)
        return Sensitivity(layer, max(self.loss({layer.graph: session}), 0.0))

    def _logits(self, sessions: Mapping[str, Session], bundle: Bundle | None = None) -> list[Array]:
        """Returns the logits of every run of the decoder, over all pictures."""
        logits: list[Array] = []

        def open_graph(name: str) -> Session:
            return _all_logits(sessions[name], logits) if name == DECODER else sessions[name]

        run = PictureRunner(bundle or self._parent, open_graph, language=True)
        for picture, text in self._given:
            run(picture.image(), text)
        return logits


def _recording(session: Session, record: list[dict[str, Array]]) -> Session:
    """Returns a session that runs ``session`` and appends the outputs to a list."""

    def compute(inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = session.run(inputs)
        record.append(found)
        return dict(found)

    return SubstituteSession(session, compute)


def _replaying(session: Session, record: Sequence[dict[str, Array]]) -> Session:
    """Returns a session that computes nothing and returns recorded outputs, run by run."""
    remaining = iter(record)
    return SubstituteSession(session, lambda inputs: dict(next(remaining)))


def _all_logits(session: Session, logits: list[Array]) -> Session:
    """Returns a decoder session that computes the logits of every position and appends them to a list."""

    def compute(inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = session.run(all_logits(inputs))
        logits.append(found["logits"])
        return found

    return SubstituteSession(session, compute)


def with_rounded_weights(parent: Path, quantized: Path, layer: QuantizedLayer) -> ir.Model:
    """Returns the original graph with the rounded weights of one layer, which are read from the quantized graph."""
    model, rounded = load_graph(parent), load_graph(quantized).graph.initializers
    for weight in layer.weights:
        integers, scales = block_tensors(rounded, weight)
        value = model.graph.initializers[weight]
        form = form_of(integers, scales)
        array = restored(integers.numpy().astype(np.int8), scales.numpy(), form)
        value.const_value = ir.tensor(array.astype(scales.numpy().dtype), name=weight)
    return model


def with_quantized_activations(parent: Path, plan: ActivationPlan, layer: QuantizedLayer) -> ir.Model:
    """Returns the original graph with the activations and weights of one layer in INT8, as ``plan`` describes."""
    model = load_graph(parent)
    insert_qdq(model, restrict_plan(plan, layer.weights), InMemoryStore())
    return model


def restrict_plan(plan: ActivationPlan, weights: Sequence[str]) -> ActivationPlan:
    """Returns a plan with only those matrix multiplications of ``plan`` whose weight is in ``weights``."""
    activations = []
    for activation in plan.activations:
        products = tuple(product for product in activation.products if product.weight in weights)
        if products:
            activations.append(replace(activation, products=products))
    return ActivationPlan(activations)


def rank_layers(
    meter: DivergenceMeter,
    models: Sequence[tuple[QuantizedLayer, Callable[[], ir.Model]]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """Measures the sensitivity of layers, one layer at a time.

    Args:
        meter: Measures the divergence.
        models: Each layer, with a function that makes the graph in which only this layer is quantized.
        progress: Called with layers done and layers in all.

    Returns:
        The sensitivities, the most sensitive layer first.
    """
    found = [meter.measure(layer, model()) for layer, model in counted(models, len(models), progress)]
    return sorted(found, key=lambda item: -item.loss)
