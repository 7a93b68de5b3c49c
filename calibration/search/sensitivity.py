"""Which layers suffer: one at a time is quantised, and the decoder's next-token distributions are held to the parent's.

A layer is all matrices of a graph that share a layer's path (``language.layers.3``). Its loss is the Kullback-Leibler
divergence, in nats a token, of what the whole model says with that layer rounded and all else as in the parent, over
some pictures with the parent's captions read behind the prompt. So a layer of the vision encoder and one of the
language model are measured by one yardstick.
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
from blip2edge.calibration.activations.observe import open_probe
from blip2edge.calibration.activations.qdq import Plan, quantise_graph
from blip2edge.calibration.batches import PictureRunner
from blip2edge.calibration.pictures import Picture
from blip2edge.calibration.storage import Memory
from blip2edge.calibration.weights.blocks import restored
from blip2edge.calibration.weights.weight_only import all_logits, block_tensors, form_of
from blip2edge.progress import counted
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession

PICTURES = 8
"""How many are looked at for each layer."""

LAYER = re.compile(r"^(.*?\.\d+)\.")
"""What the weights of a layer have in common."""


@dataclass(frozen=True)
class Layer:
    """The quantised matrices of a layer.

    Attributes:
        graph: The graph that they are in.
        name: The layer's path, or the matrix where it is in no layer.
        weights: Their initializers.
    """

    graph: str
    name: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What a layer costs.

    Attributes:
        layer: The layer.
        loss: Divergence in nats a token.
    """

    layer: Layer
    loss: float

    def to_json(self) -> dict[str, Any]:
        """As it stands in the record."""
        return {"graph": self.layer.graph, "layer": self.layer.name, "loss": float(f"{self.loss:.4g}")}


def layers_of(graph: str, weights: Sequence[str]) -> list[Layer]:
    """Groups the weights of a graph by their layers, in order."""
    groups: dict[str, list[str]] = {}
    for weight in weights:
        match = LAYER.match(weight)
        groups.setdefault(match.group(1) if match else weight, []).append(weight)
    return [Layer(graph, name, tuple(members)) for name, members in groups.items()]


def divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Mean over tokens of ``Σ p (log p - log q)``: ``[..., V]`` of the parent and of another."""
    first, second = _log_softmax(reference), _log_softmax(logits)
    return float((np.exp(first) * (first - second)).sum(axis=-1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normal: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normal


class Yardstick:
    """The parent on some pictures, and the same with one graph replaced.

    Args:
        parent: The bundle.
        pictures: The pictures.
        texts: Token ids of each one's caption by the parent.
        threads: CPU threads.
    """

    def __init__(
        self, parent: Bundle, pictures: Sequence[Picture], texts: Sequence[Sequence[int]], threads: int | None
    ) -> None:
        self._parent = parent
        self._threads = threads
        self._given = [(picture.read(), text) for picture, text in zip(pictures, texts, strict=True)]
        self._order = list(parent.manifest.graphs)
        self._sessions: dict[str, Session] = {
            name: OnnxRuntimeSession(parent.file(record.spec.file), threads)
            for name, record in parent.manifest.graphs.items()
        }
        self._outputs: dict[str, list[dict[str, Array]]] = {name: [] for name in self._order}
        self._reference = self._logits(
            {name: _keeping(session, self._outputs[name]) for name, session in self._sessions.items()}
        )

    def loss(self, graph: str, session: Session) -> float:
        """The divergence with ``session`` in the place of a graph; what comes before it is not run again."""
        at = self._order.index(graph)
        sessions = dict(self._sessions)
        for name in self._order[:at]:
            sessions[name] = _replaying(self._sessions[name], self._outputs[name])
        found = self._logits({**sessions, graph: session})
        return float(np.mean([divergence(*pair) for pair in zip(self._reference, found, strict=True)]))

    def measure(self, layer: Layer, rounded: ir.Model) -> Sensitivity:
        """A layer's sensitivity.

        Args:
            layer: The layer.
            rounded: Its graph with that layer rounded, other weights external and in the parent's directory.
        """
        record = self._parent.graph(layer.graph)
        size = sum(self._parent.manifest.files[file].size for file in record.data_files)
        proto = ir.to_proto(rounded)
        probe = open_probe(proto, self._parent.path, size, self._threads)
        session = _in_memory(self._sessions[layer.graph], probe)
        return Sensitivity(layer, max(self.loss(layer.graph, session), 0.0))

    def _logits(self, sessions: Mapping[str, Session]) -> list[Array]:
        """Of every run of the decoder, over all pictures."""
        seen: list[Array] = []

        def open_graph(name: str) -> Session:
            return _listening(sessions[name], seen) if name == DECODER else sessions[name]

        run = PictureRunner(self._parent, open_graph, language=True)
        for content, text in self._given:
            run(content, text)
        return seen


class _Answering:
    """A session that looks like another and answers by a function."""

    def __init__(self, like: Session, answer: Callable[[Mapping[str, Array]], dict[str, Array]]) -> None:
        self.input_names, self.output_names = like.input_names, like.output_names
        self._answer = answer

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """See :class:`blip2edge.runtime.backends.base.Session`; gives all outputs, whichever are asked for."""
        del outputs
        return self._answer(inputs)

    def close(self) -> None:
        """See :class:`blip2edge.runtime.backends.base.Session`."""


def _keeping(session: Session, kept: list[dict[str, Array]]) -> Session:
    """A session whose outputs are kept."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = session.run(inputs)
        kept.append(found)
        return dict(found)

    return _Answering(session, answer)


def _replaying(session: Session, kept: Sequence[dict[str, Array]]) -> Session:
    """Gives what was kept, run by run."""
    coming = iter(kept)
    return _Answering(session, lambda inputs: dict(next(coming)))


def _listening(session: Session, seen: list[Array]) -> Session:
    """A decoder that is asked for the logits of every slot; they are noted."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = session.run(all_logits(inputs))
        seen.append(found["logits"])
        return found

    return _Answering(session, answer)


def _in_memory(like: Session, graph: Any) -> Session:
    """ONNX Runtime's session of a graph that lies in no file."""
    names = list(like.output_names)
    return _Answering(like, lambda inputs: dict(zip(names, graph.run(names, dict(inputs)), strict=True)))


def with_blocks(parent: Path, whole: Path, layer: Layer) -> ir.Model:
    """The parent's graph with the weights of one layer as the rounded graph ``whole`` has them."""
    model, rounded = ir.load(parent), ir.load(whole).graph.initializers
    for weight in layer.weights:
        integers, scales = block_tensors(rounded, weight)
        value = model.graph.initializers[weight]
        form = form_of(integers, scales)
        array = restored(integers.numpy().astype(np.int8), scales.numpy(), form)
        value.const_value = ir.tensor(array.astype(scales.numpy().dtype), name=weight)
    return model


def with_activations(parent: Path, plan: Plan, layer: Layer) -> ir.Model:
    """The parent's graph with the products of one layer as a plan has them."""
    model = ir.load(parent)
    quantise_graph(model, only(plan, layer.weights), Memory())
    return model


def only(plan: Plan, weights: Sequence[str]) -> Plan:
    """The part of a plan that is about some weights."""
    groups = []
    for group in plan.groups:
        products = tuple(product for product in group.products if product.weight in weights)
        if products:
            groups.append(replace(group, products=products))
    return Plan(groups)


def rank(
    yardstick: Yardstick,
    models: Sequence[tuple[Layer, Callable[[], ir.Model]]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """Measures layers, one at a time; the worst first.

    Args:
        yardstick: What measures.
        models: Each layer, and what makes its graph.
        progress: Called with layers done and layers in all.
    """
    found = [yardstick.measure(layer, model()) for layer, model in counted(models, len(models), progress)]
    return sorted(found, key=lambda item: -item.loss)
