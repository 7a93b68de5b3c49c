"""INT8 for the activations and weights of one graph: observe, plan, write, compare."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.integrity import FileRecord
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.calibration.activations.cache import cache_path, load_observations, save_observations
from blip2edge.calibration.activations.observations import Observation, Observations, Observer
from blip2edge.calibration.activations.observe import run_probed
from blip2edge.calibration.activations.qdq import Group, Plan, quantise_graph
from blip2edge.calibration.activations.ranges import BINS, THRESHOLDS
from blip2edge.calibration.activations.smoothing import change_of, plan_by_output
from blip2edge.calibration.batches import Feeds
from blip2edge.calibration.results import CalibratedGraph, Made
from blip2edge.calibration.search.agreement import Cosine, compare_graphs
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import Targets, find_targets
from blip2edge.progress import ProgressCallback

INT8 = "int8"
BARS = 64  # of a histogram in the report


@dataclass
class Job:
    """What the steps of a calibration share.

    Attributes:
        parent: The bundle that is calibrated.
        staging: Where the new one is written.
        feeds: What each graph is given.
        method: How ranges are chosen.
        threads: CPU threads.
        report: Called with a stage's name, steps done and steps in all.
        warn: Called with a line.
        pictures_sha256: Of the pictures, in order.
    """

    parent: Bundle
    staging: Path
    feeds: Feeds
    method: str
    threads: int | None
    report: ProgressCallback
    warn: Callable[[str], None]
    pictures_sha256: str

    @property
    def feeds_sha256(self) -> str:
        """Of all that the graphs are given: the pictures, and the bundle that they go through."""
        return hashlib.sha256(f"{self.parent.sha256} {self.pictures_sha256}".encode()).hexdigest()

    def write(self, model: ir.Model, record: GraphRecord) -> None:
        """Writes a graph to the staging directory, and checks that it is one."""
        path = self.staging / record.spec.file
        ir.save(model, path)
        onnx.checker.check_model(str(path))

    def compare(self, record: GraphRecord) -> dict[str, Cosine]:
        """A graph of the staging directory against the parent's; nothing where it was given nothing."""
        if not self.feeds.count(record.spec.name):
            return {}
        return compare_graphs(
            record.spec,
            self.parent.file(record.spec.file),
            self.staging / record.spec.file,
            self.feeds,
            threads=self.threads,
            progress=partial(self.report, f"{record.spec.name}: compare"),
        )


def quantise_activations(job: Job, record: GraphRecord) -> Made:
    """Writes one graph with INT8 activations and weights to the staging directory, and compares it."""
    start = time.perf_counter()
    model = ir.load(job.parent.file(record.spec.file))
    targets = find_targets(model)
    observations = _observations(job, model, record, targets)
    plan = _plan(job, model, record, targets, observations)
    made = write_planned(job, record, model, targets, plan)
    summary = replace(made.summary, seconds=time.perf_counter() - start)
    return replace(made, summary=summary, details=details_of(plan, observations), plan=plan)


def write_planned(job: Job, record: GraphRecord, model: ir.Model, targets: Targets, plan: Plan) -> Made:
    """Writes one graph by a plan, over what may be there, and compares it with the parent's.

    Args:
        job: The calibration.
        record: The parent's entry.
        model: The parent's graph, freshly loaded; it is changed.
        targets: Its products.
        plan: What becomes INT8.
    """
    name = record.spec.name
    data = job.staging / f"{name}.onnx.data"
    with DataFile(data) as file:
        quantise_graph(model, plan, file, partial(job.report, f"{name}: write"))
    path = job.staging / record.spec.file
    job.write(model, record)
    seals = {path.name: FileRecord.of(path), data.name: file.record}
    summary = CalibratedGraph(
        name=name,
        precision=INT8,
        bytes=sum(seal.size for seal in seals.values()),
        parent_bytes=job.parent.manifest.graph_bytes(record),
        seconds=0.0,
        products=sum(len(group.products) for group in plan.groups),
        left={**targets.left, **plan.left},
        cosine=job.compare(record),
    )
    return Made(replace(record, precision=INT8, parity=(), data_files=(data.name,)), seals, summary)


def details_of(plan: Plan, observations: Observations) -> list[dict[str, Any]]:
    """What a report shows of each activation that became INT8.

    Returns:
        An object each: ``activation``, ``products`` (weights that read it), ``maximum`` and ``threshold`` of |x|
        (with a division, of the divided values), ``change`` (power that rounding adds to the outputs), ``division``
        (``none``, ``folded`` into what is before, or ``node``), ``largest_channel`` and ``median_channel`` of the
        undivided |x|, and ``histogram``: counts of |x| in :data:`BARS` equal bins up to ``histogram_end``.
    """
    return [_detail(group, observations[group.activation]) for group in plan.groups]


def _detail(group: Group, observation: Observation) -> dict[str, Any]:
    reach, histogram = observation.reach, observation.histogram
    divided = reach if group.divisor is None else reach / group.divisor
    return {
        "activation": group.activation,
        "products": [product.weight for product in group.products],
        "maximum": float(divided.max()),
        "threshold": group.threshold,
        "change": group.change,
        "division": "none" if group.divisor is None else "folded" if group.fold else "node",
        "largest_channel": float(reach.max()),
        "median_channel": float(np.median(reach)),
        "histogram": histogram.counts.reshape(BARS, -1).sum(axis=1).tolist(),
        "histogram_end": histogram.width * BINS,
    }


def _observations(job: Job, model: ir.Model, record: GraphRecord, targets: Targets) -> Observations:
    """From the cache, or by running the graph."""
    names = list(targets.by_activation())
    path = cache_path(job.parent, record, job.feeds_sha256)
    try:
        kept = load_observations(path, names)
    except ValueError as error:
        job.warn(f"the calibration cache {path} is not used and is written anew: {error}")
        kept = None
    if kept is not None:
        return kept
    found = _observe(job, model, record, names)
    try:
        save_observations(path, found)
    except OSError as error:  # a full or read-only cache costs time, and nothing else
        job.warn(f"the calibration cache {path} cannot be written ({error.strerror or error})")
    return found


def _observe(job: Job, model: ir.Model, record: GraphRecord, names: Sequence[str]) -> Observations:
    """Runs a graph on everything that it is given."""
    runs = job.feeds.count(record.spec.name)
    observers = {name: Observer(runs, seed) for seed, name in enumerate(names)}

    def see(values: Mapping[str, Array]) -> None:
        for name, array in values.items():
            observers[name].see(array)

    run_probed(
        model,
        record,
        names,
        job.feeds,
        job.parent.path,
        see,
        threads=job.threads,
        progress=partial(job.report, f"{record.spec.name}: ranges"),
    )
    return {name: observer.result() for name, observer in observers.items()}


def _plan(
    job: Job, model: ir.Model, record: GraphRecord, targets: Targets, observations: Observations
) -> Plan:
    if job.method in THRESHOLDS:
        return plan_by_histogram(model, targets, observations, job.method)
    return plan_by_output(
        model, targets, observations, progress=partial(job.report, f"{record.spec.name}: choose")
    )


def plan_by_histogram(model: ir.Model, targets: Targets, observations: Observations, method: str) -> Plan:
    """A range a tensor, each by itself.

    Args:
        model: The graph.
        targets: The products.
        observations: By activation.
        method: A key of :data:`blip2edge.calibration.activations.ranges.THRESHOLDS`.
    """
    plan = Plan()
    for activation, products in targets.by_activation().items():
        observation = observations[activation]
        threshold = THRESHOLDS[method](observation.histogram)
        if threshold > 0:
            change = change_of(model, products, observation, threshold)
            plan.groups.append(Group(activation, tuple(products), threshold, change=change))
        else:
            plan.left |= {product.node: "its input is always zero" for product in products}
    return plan
