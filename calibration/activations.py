"""INT8 for the activations and weights of one graph: observe, plan, write, compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir

from blip2edge.calibration.agreement import compare_graphs
from blip2edge.calibration.batches import Feeds
from blip2edge.calibration.observe import run_probed
from blip2edge.calibration.qdq import Group, Plan, quantise_graph
from blip2edge.calibration.ranges import THRESHOLDS, Histogram
from blip2edge.calibration.results import CalibratedGraph, Made
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import Targets, find_targets
from blip2edge.manifest import Bundle, FileRecord, GraphRecord
from blip2edge.runtime.session import Array

INT8 = "int8"

Progress = Callable[[str, int, int], None]


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
    """

    parent: Bundle
    staging: Path
    feeds: Feeds
    method: str
    threads: int | None
    report: Progress


def quantise_activations(job: Job, record: GraphRecord) -> Made:
    """Writes one graph with INT8 activations and weights to the staging directory, and compares it."""
    start = time.perf_counter()
    name = record.spec.name
    source = job.parent.file(record.spec.file)
    model = ir.load(source)
    targets = find_targets(model)
    histograms = _observe(job, model, record, targets)
    plan = plan_by_histogram(targets, histograms, job.method)
    data = job.staging / f"{name}.onnx.data"
    with DataFile(data) as file:
        quantise_graph(model, plan, file, partial(job.report, f"{name}: write"))
    path = job.staging / record.spec.file
    ir.save(model, path)
    onnx.checker.check_model(str(path))
    compared = compare_graphs(
        record.spec,
        source,
        path,
        job.feeds,
        threads=job.threads,
        progress=partial(job.report, f"{name}: compare"),
    )
    seals = {path.name: FileRecord.of(path), data.name: file.record}
    summary = CalibratedGraph(
        name,
        INT8,
        sum(seal.size for seal in seals.values()),
        sum(job.parent.manifest.files[file].size for file in (record.spec.file, *record.data_files)),
        time.perf_counter() - start,
        sum(len(group.products) for group in plan.groups),
        {**targets.left, **plan.left},
        compared,
    )
    made = replace(record, precision=INT8, parity=(), data_files=(data.name,))
    return Made(made, seals, summary)


def _observe(job: Job, model: ir.Model, record: GraphRecord, targets: Targets) -> dict[str, Histogram]:
    """One histogram for each activation that a product reads."""
    histograms = {name: Histogram() for name in targets.by_activation()}

    def see(values: Mapping[str, Array]) -> None:
        for name, array in values.items():
            histograms[name].add(array)

    run_probed(
        model,
        record,
        list(histograms),
        job.feeds,
        job.parent.path,
        see,
        threads=job.threads,
        progress=partial(job.report, f"{record.spec.name}: ranges"),
    )
    return histograms


def plan_by_histogram(targets: Targets, histograms: Mapping[str, Histogram], method: str) -> Plan:
    """A range a tensor, each by itself.

    Args:
        targets: The products.
        histograms: By activation.
        method: A key of :data:`blip2edge.calibration.ranges.THRESHOLDS`.
    """
    plan = Plan()
    for activation, products in targets.by_activation().items():
        threshold = THRESHOLDS[method](histograms[activation])
        if threshold > 0:
            plan.groups.append(Group(activation, tuple(products), threshold))
        else:
            plan.left |= {product.node: "its input is always zero" for product in products}
    return plan
