"""Implements ``--drop-limit``: keeps sensitive layers in floating point until the captions change little enough.

1. Everything is quantized, and the sensitivity of each layer is measured (``sensitivity.py``).
2. The most sensitive 1, 2, 4, ... layers are kept in the original precision, until the loss is within the limit. The
   loss is the share of captions that differ from those of the original bundle, or the drop of CIDEr.
3. A binary search finds the smallest sufficient number of layers, between the last number that was too small and the
   first that was enough.

If all layers are kept, the captions are those of the original bundle.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from blip2edge.bundle.schema import EMBEDDINGS_FILE
from blip2edge.calibration.activations.qdq import ActivationPlan
from blip2edge.calibration.activations.quantize import write_planned
from blip2edge.calibration.agreement import CaptionAgreement
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.pictures import CalibrationPicture
from blip2edge.calibration.results import StagedGraph
from blip2edge.calibration.search.sensitivity import (
    PICTURES,
    DivergenceMeter,
    QuantizedLayer,
    Sensitivity,
    group_by_layer,
    rank_layers,
    restrict_plan,
    with_quantized_activations,
    with_rounded_weights,
)
from blip2edge.calibration.targets import find_targets
from blip2edge.calibration.weights.quantize import rewrite_weights
from blip2edge.errors import UsageError, option
from blip2edge.graph_files import load_graph

CaptionScore = Callable[[Sequence[str], Sequence[Sequence[str]]], float]
"""Function that computes CIDEr from captions and the reference captions of each picture; 1 is 100 points."""


@dataclass(frozen=True)
class DropLimit:
    """The limit on the loss, that is, on how much quantization may change the captions.

    Attributes:
        points: Largest loss, in percentage points.
        cider: Function that computes the CIDEr score of captions; None to count captions that differ.
    """

    points: float
    cider: CaptionScore | None = None

    @property
    def measure(self) -> str:
        """Name of the measured loss: ``cider`` (drop of the score) or ``captions`` (share of captions that differ)."""
        return "captions" if self.cider is None else "cider"

    def drop(self, captions: CaptionAgreement, references: Sequence[Sequence[str]]) -> float:
        """Computes the loss of a calibrated bundle's captions in percentage points.

        Args:
            captions: The captions of the calibrated bundle and of the original bundle.
            references: Reference captions of each picture; used only if the measure is CIDEr.
        """
        if self.cider is None:
            return 100.0 * (1.0 - captions.same)
        return 100.0 * (self.cider(captions.parent, references) - self.cider(captions.ours, references))


@dataclass
class KeptLayers:
    """The layers that stay in floating point, and the measured losses that led to this choice.

    Attributes:
        limit: The limit on the loss.
        ranking: Sensitivity of every layer, the most sensitive first.
        drops: Measured loss in percentage points, by the number of layers kept.
        count: Number of layers that are kept in the end: the first ones of ``ranking``.
    """

    limit: DropLimit
    ranking: Sequence[Sensitivity]
    drops: dict[int, float] = field(default_factory=dict)
    count: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns limit, losses and layers as a JSON object, for ``calibration.sensitivity`` in the manifest."""
        return {
            "limit": self.limit.points,
            "measure": self.limit.measure,
            "drop_with_all_quantised": self.drops[0],
            "drop": self.drops[self.count],
            "tried": {str(count): drop for count, drop in sorted(self.drops.items())},
            "left": [item.to_json() for item in self.ranking[: self.count]],
            "layers": [item.to_json() for item in self.ranking],
        }


@dataclass(frozen=True)
class FullyQuantized:
    """The graphs with every layer quantized; the search restores some layers to floating point.

    Attributes:
        graphs: The graphs, by name.
        directory: Directory with copies of the token embedding table and of the graphs with weight-only quantization.
    """

    graphs: Mapping[str, StagedGraph]
    directory: Path

    @classmethod
    def save(cls, context: CalibrationContext, graphs: Mapping[str, StagedGraph], directory: Path) -> FullyQuantized:
        """Copies the quantized files, because the search overwrites them in the staging directory.

        Args:
            context: The calibration; its staging directory holds the graphs.
            graphs: The fully quantized graphs, by name.
            directory: Directory for the copies; it is created.
        """
        directory.mkdir()
        files = {file for graph in graphs.values() if graph.summary.matrices for file in graph.record.files}
        if (context.staging / EMBEDDINGS_FILE).is_file():
            files.add(EMBEDDINGS_FILE)
        for file in files:
            shutil.copyfile(context.staging / file, directory / file)
        return cls(graphs, directory)

    def layers(self) -> list[QuantizedLayer]:
        """Returns all quantized layers, in the order of the graphs."""
        found = []
        for name, graph in self.graphs.items():
            weights = list(graph.summary.matrices) if graph.plan is None else graph.plan.weights()
            found += group_by_layer(name, weights)
        return found


def check_drop_limit(limit: float | None, captions: bool) -> None:
    """Checks the value of ``--drop-limit``.

    Args:
        limit: The limit in percentage points; None for no limit.
        captions: Whether the model generates captions.

    Raises:
        UsageError: The limit is not from 0 to 100, or the model generates no captions.
    """
    if limit is None:
        return
    if not 0 <= limit <= 100:
        raise UsageError(f"{option('drop_limit')} must be from 0 to 100 percentage points, not {limit:g}")
    if not captions:
        raise UsageError(
            f"{option('drop_limit')} compares captions, but this model generates none",
            f"leave {option('drop_limit')} out",
        )


def measure_layers(
    context: CalibrationContext,
    quantized: FullyQuantized,
    pictures: Sequence[CalibrationPicture],
    texts: Sequence[Sequence[int]],
) -> list[Sensitivity]:
    """Measures the sensitivity of every quantized layer on some pictures.

    Args:
        context: The calibration.
        quantized: The fully quantized graphs.
        pictures: The pictures; the first :data:`PICTURES` are used.
        texts: Token ids of the original bundle's caption of each picture.

    Returns:
        The sensitivities, the most sensitive layer first.
    """
    meter = DivergenceMeter(context.parent, pictures[:PICTURES], texts[:PICTURES], context.threads)

    def model_of(layer: QuantizedLayer) -> Callable[[], ir.Model]:
        source = context.parent.file(context.parent.graph(layer.graph).spec.file)
        plan = quantized.graphs[layer.graph].plan
        if plan is not None:
            return partial(with_quantized_activations, source, plan, layer)
        return partial(with_rounded_weights, source, quantized.directory / source.name, layer)

    models = [(layer, model_of(layer)) for layer in quantized.layers()]
    return rank_layers(meter, models, partial(context.progress, "sensitivity"))


def choose_kept_layers(
    context: CalibrationContext,
    quantized: FullyQuantized,
    ranking: Sequence[Sensitivity],
    limit: DropLimit,
    drop_of: Callable[[Mapping[str, StagedGraph]], float],
) -> tuple[dict[str, StagedGraph], KeptLayers]:
    """Finds how many of the most sensitive layers must be kept in floating point so that the loss is within the limit.

    Args:
        context: The calibration; its staging directory holds the fully quantized graphs.
        quantized: The fully quantized graphs.
        ranking: Sensitivity of every layer, the most sensitive first.
        limit: The limit on the loss.
        drop_of: Measures the loss of the graphs in the staging directory, in percentage points.

    Returns:
        The final graphs by name, and the kept layers with the measured losses.
    """
    kept = KeptLayers(limit, ranking)
    graphs = dict(quantized.graphs)
    written = 0

    def holds_with(count: int) -> bool:
        nonlocal graphs, written
        if count or written:  # at first, the staging directory holds the graphs with no layer kept
            graphs = _rewritten(context, quantized, ranking[:count])
        written = count
        kept.drops[count] = drop_of(graphs)
        return kept.drops[count] <= limit.points

    enough = 0 if holds_with(0) else None
    low, tried = 0, 1
    while enough is None:
        if holds_with(tried) or tried == len(ranking):
            enough = tried
        else:
            low, tried = tried, min(2 * tried, len(ranking))
    while enough - low > 1:
        middle = (low + enough) // 2
        if holds_with(middle):
            enough = middle
        else:
            low = middle
    if written != enough:
        holds_with(enough)
    kept.count = enough
    return graphs, kept


def _rewritten(
    context: CalibrationContext, quantized: FullyQuantized, worst: Sequence[Sensitivity]
) -> dict[str, StagedGraph]:
    """Writes all graphs again, with the layers ``worst`` in the original precision.

    If ``worst`` contains all layers, the original token embedding table is restored too.
    """
    table = quantized.directory / EMBEDDINGS_FILE
    if table.is_file():
        all_kept = len(worst) == len(quantized.layers())
        source = context.parent.file(EMBEDDINGS_FILE) if all_kept else table
        shutil.copyfile(source, context.staging / EMBEDDINGS_FILE)
    out = {}
    for name, graph in quantized.graphs.items():
        kept_float = {
            weight: f"kept for the drop limit: quantized alone, it changes the next token by {item.loss:.2g} nats"
            for item in worst
            if item.layer.graph == name
            for weight in item.layer.weights
        }
        if graph.plan is not None:
            rewritten = _with_plan(context, graph, graph.plan, kept_float)
        elif graph.summary.matrices:
            rewritten = rewrite_weights(context, graph, quantized.directory, kept_float)
        else:
            rewritten = graph
        out[name] = replace(rewritten, headroom=graph.headroom)
    return out


def _with_plan(
    context: CalibrationContext, graph: StagedGraph, plan: ActivationPlan, kept_float: Mapping[str, str]
) -> StagedGraph:
    """Writes a graph with INT8 activations, except for the matrix multiplications that are kept in floating point."""
    start = time.perf_counter()
    record = context.parent.graph(graph.record.spec.name)
    model = load_graph(context.parent.file(record.spec.file))
    weights = [weight for weight in plan.weights() if weight not in kept_float]
    part = restrict_plan(plan, weights)
    part.kept_float = {**plan.kept_float, **kept_float}
    details = [detail for detail in graph.details if set(detail["products"]) & set(weights)]
    return replace(write_planned(context, record, model, find_targets(model), part, start), details=details)
