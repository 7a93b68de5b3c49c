"""Writes one graph with INT8 activations and weights: observes, chooses ranges, writes, compares the outputs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.outputs.locks import tidy
from blip2edge.bundle.user_cache import NoHomeError
from blip2edge.calibration.activations.cache import cache_path, load_observations, save_observations
from blip2edge.calibration.activations.choose_ranges import choose_ranges
from blip2edge.calibration.activations.histogram import BINS
from blip2edge.calibration.activations.observer import Observation, Observations, Observer
from blip2edge.calibration.activations.probe import observe_tensors
from blip2edge.calibration.activations.qdq import ActivationPlan, QuantizedActivation, insert_qdq
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.formats import FLOAT, KEPT, GraphFormat
from blip2edge.calibration.results import StagedGraph
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import Targets, find_targets
from blip2edge.errors import DataError
from blip2edge.graph_files import load_graph

INT8 = "int8"
REPORT_BINS = 64  # bins of a histogram in the report


def quantize_activations(context: CalibrationContext, record: GraphRecord, form: GraphFormat) -> StagedGraph:
    """Writes one graph with INT8 activations and weights to the staging directory.

    The outputs of the new graph are compared with those of the original graph.

    Args:
        context: The calibration.
        record: The graph's entry in the manifest of the original bundle.
        form: The format of the graph. A matrix multiplication stays in floating point if ``form`` gives its weight the
            format ``float``.
    """
    start = time.perf_counter()
    name = record.spec.name
    model = load_graph(context.parent.file(record.spec.file))
    targets = find_targets(model)
    observations = _observations(context, model, record, targets)
    kept = {product.node: KEPT for product in targets.products if form.of(product.weight).kind == FLOAT}
    quantized = replace(targets, products=tuple(one for one in targets.products if one.node not in kept))
    plan = choose_ranges(model, quantized, observations, context.method, partial(context.progress, f"{name}: choose"))
    plan.kept_float |= kept
    staged = write_planned(context, record, model, targets, plan, start)
    return replace(staged, details=activation_details(plan, observations))


def write_planned(
    context: CalibrationContext,
    record: GraphRecord,
    model: ir.Model,
    targets: Targets,
    plan: ActivationPlan,
    start: float,
) -> StagedGraph:
    """Writes one graph as a plan describes it, and compares its outputs with those of the original graph.

    The graph is written to the staging directory.

    Files that an earlier call wrote for this graph are overwritten.

    Args:
        context: The calibration.
        record: The graph's entry in the manifest of the original bundle.
        model: The original graph, freshly loaded; changed in place.
        targets: The matrix multiplications of the graph that can be quantized.
        plan: The activations that become INT8.
        start: ``time.perf_counter()`` when work on the graph began.
    """
    name = record.spec.name
    data = context.staging / f"{name}.onnx.data"
    with DataFile(data) as file:
        insert_qdq(model, plan, file, partial(context.progress, f"{name}: write"))
    staged = context.stage(
        model,
        record,
        INT8,
        {data.name: file.record},
        start=start,
        products=sum(len(activation.products) for activation in plan.activations),
        kept_float={**targets.kept_float, **plan.kept_float},
    )
    return replace(staged, plan=plan)


def activation_details(plan: ActivationPlan, observations: Observations) -> list[dict[str, Any]]:
    """Makes the report's entries of the INT8 activations.

    Returns:
        One object per activation:

        - ``activation``: its name; ``products``: names of the weights that it is multiplied with.
        - ``maximum``, ``threshold``: of |x|, after the division of the channels if there is one.
        - ``change``: power of the rounding error, divided by the power of the outputs.
        - ``division``: ``none``, ``folded`` (into the previous layer) or ``node``.
        - ``largest_channel``, ``median_channel``: maximum and median of the channels' largest |x|, before the division.
        - ``histogram``: counts of |x| in :data:`REPORT_BINS` equal bins from 0 to ``histogram_end``.
    """
    return [_detail(activation, observations[activation.name]) for activation in plan.activations]


def _detail(activation: QuantizedActivation, observation: Observation) -> dict[str, Any]:
    largest, histogram = observation.channel_max, observation.histogram
    divided = largest if activation.divisor is None else largest / activation.divisor
    return {
        "activation": activation.name,
        "products": [product.weight for product in activation.products],
        "maximum": float(divided.max()),
        "threshold": activation.threshold,
        "change": activation.output_error,
        "division": "none" if activation.divisor is None else "folded" if activation.fold else "node",
        "largest_channel": float(largest.max()),
        "median_channel": float(np.median(largest)),
        "histogram": histogram.counts.reshape(REPORT_BINS, -1).sum(axis=1).tolist(),
        "histogram_end": histogram.width * BINS,
    }


def _observations(context: CalibrationContext, model: ir.Model, record: GraphRecord, targets: Targets) -> Observations:
    """Returns the observations of a graph's activations: reads them from the cache, or runs the graph."""
    names = list(targets.by_activation())
    try:
        path = cache_path(context.parent, record, context.feeds_sha256)
    except NoHomeError as error:
        context.warn(f"there is no calibration cache: {error.problem}")
        return _observe(context, model, record, names)
    try:
        cached = load_observations(path, names)
    except DataError as error:
        context.warn(f"the calibration cache is not used and is written again: {error.problem}")
        cached = None
    if cached is not None:
        tidy(path)
        return cached
    observations = _observe(context, model, record, names)
    try:
        save_observations(path, observations)
    except OSError as error:  # without a cache the next calibration takes longer, and nothing else changes
        context.warn(f"the calibration cache {path} cannot be written ({error.strerror or error})")
    return observations


def _observe(context: CalibrationContext, model: ir.Model, record: GraphRecord, names: Sequence[str]) -> Observations:
    """Runs a graph on all its recorded inputs; returns the observations of the activations ``names``."""
    runs = context.feeds.count(record.spec.name)
    observers = {name: Observer(runs, seed) for seed, name in enumerate(names)}

    def update(values: Mapping[str, Array]) -> None:
        for name, array in values.items():
            observers[name].update(array)

    observe_tensors(
        model,
        record,
        names,
        context.feeds,
        context.parent.path,
        update,
        threads=context.threads,
        progress=partial(context.progress, f"{record.spec.name}: ranges"),
    )
    return {name: observer.result() for name, observer in observers.items()}
