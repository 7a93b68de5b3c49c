"""Implements ``calibrate --search``: finds formats with little loss, time and size, and publishes one combination.

1. Make: the graphs of each part (vision encoder, bridge, language model) are made once in each format (``choices``,
   ``variants``), with an optimized copy.
2. Measure: for each part and format alone, the time of its stages here (``measure``) or on a board (``predicted``), the
   bytes, and the change of the next token.
3. Combine: times and bytes of the parts are added, and the change of the next token is predicted as the sum.
4. Compare captions: the captions of some combinations are compared with those of the original bundle: combinations on
   the Pareto front of the predicted values, and those that ``calibrate`` makes without a search (``front``).
5. Publish: the chosen combination becomes the new bundle, the same as ``calibrate`` makes with the flags of this
   combination.

The result of each finished step is stored (``journal``), so that a killed search can be resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import MANIFEST, read_manifest
from blip2edge.bundle.outputs.locks import locked
from blip2edge.bundle.outputs.publishing import check_not_source, check_target
from blip2edge.calibration.agreement import RUNS, GreedyCaption, caption_pictures
from blip2edge.calibration.batches import Feeds
from blip2edge.calibration.confidence.references import References
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.formats import choose_graph_formats
from blip2edge.calibration.pictures import DEFAULT_COUNT, CalibrationPicture, PictureSet, choose_pictures
from blip2edge.calibration.pipeline import (
    PreparedSteps,
    calibrate,
    check_enough_memory,
    open_parent,
    record_inputs,
)
from blip2edge.calibration.results import CalibrationReport, StagedGraph
from blip2edge.calibration.search.choices import (
    PartGraphs,
)
from blip2edge.calibration.search.drop_limit import CaptionScore, DropLimit
from blip2edge.calibration.search.front import (
    FoundPoints,
)
from blip2edge.calibration.search.journal import SearchJournal, run_directory
from blip2edge.calibration.search.measure import (
    Workload,
)
from blip2edge.calibration.search.points import FormatSearch, SearchOptions
from blip2edge.calibration.search.variants import Optimizer, Variants
from blip2edge.errors import UsageError, option
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.packages import installed
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends.probe import processor
from blip2edge.runtime.bench.memory import Notify
from blip2edge.version import __version__

PUBLISHED = "published"
"""Name of a stored result of the search, written just before the bundle is published.

It holds the hash of the references, and the hash of the manifest that the output directory had before.
"""


def search(
    bundle: str | Path,
    output: str | Path,
    *,
    images: str | Path,
    options: SearchOptions | None = None,
    optimizer: Optimizer | None = None,
    method: str = "smooth",
    cider: CaptionScore | None = None,
    references: References | None = None,
    count: int = DEFAULT_COUNT,
    force: bool = False,
    anyway: bool = False,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: ProgressCallback | None = None,
    notify: Notify | None = None,
) -> tuple[CalibrationReport, FoundPoints]:
    """Searches the formats of a bundle's graphs, and publishes the chosen combination.

    Args:
        bundle: The directory of the original bundle, in fp32 or fp16.
        output: The directory of the new bundle. Until it is published, ``OUT.run`` beside it holds the state.
        images: A folder of pictures or ``.tar`` shards.
        options: Limits, board and size of the search; None for the defaults.
        optimizer: Makes the optimized copies that the runtime would use. None to time the exported (not optimized)
            graphs.
        method: How activation ranges are chosen.
        cider: Function that computes the CIDEr score of captions. If it is given and every picture has a ``.txt`` of
            references, the loss is the drop of this score.
        references: Pictures with known captions, to fit the confidence of the published bundle; None for no confidence.
        count: Largest number of pictures.
        force: Whether to replace an existing bundle, and the state of a search with another plan.
        anyway: Whether to go on if this machine has too little memory.
        threads: CPU threads of quantizing and captioning. Times are always measured with one thread.
        limits: The largest picture that is decoded.
        progress: Called with a stage's name, steps done and steps in all.
        notify: Called with a warning.

    Returns:
        The report of the published bundle, and all combinations of formats with their measured or predicted values.

    Raises:
        UsageError: The model generates no captions, or an option is outside its range.
        BundleError: No combination is within the limits, so nothing is published; or ``bundle`` is not a bundle, is in
            bf16, or was calibrated before.
        OutputError: The output exists, or the state belongs to a search with another plan.
    """
    target, run, options = Path(output), run_directory(Path(output)), options or SearchOptions()
    parent = open_parent(bundle, method, None)
    check_not_source(target, parent.path)
    if parent.manifest.prompt is None:
        raise UsageError(
            f"{option('search', on=True)} compares captions, but this model generates none",
            f"leave {option('search', on=True)} out",
        )
    check_enough_memory(parent, anyway=anyway, notify=notify)
    report = progress or (lambda stage, done, total: None)
    with locked(run) as part:
        journal = SearchJournal(run, part / "fresh")
        if not journal.has(PUBLISHED):  # else a killed run may have published the bundle
            check_target(target, force, MANIFEST)
        pictures = choose_pictures(images, count, partial(report, "read the pictures"), limits)
        scored = list(pictures)[: max(options.scored, RUNS)]
        limit = _caption_loss(scored, cider)
        plan = {**_plan(parent, pictures, options, method, optimizer), **_measure_plan(scored, limit, threads)}
        resumed = journal.begin(plan, force=force)
        feeds = Feeds(journal.scratch / "none")  # until the inputs are recorded
        context = CalibrationContext(
            parent, journal.scratch, feeds, method, threads, report, notify or (lambda line: None), pictures.sha256
        )
        work = _workload(context, journal, pictures, scored, limit, optimizer, copies=options.board is None)
        finder = FormatSearch(work, options)
        found = finder.run()
        chosen = finder.combinations[found.chosen.point.flags]
        if resumed and _is_published(target, work, found, references):  # a killed run has done it
            work.variants.publish_copies(target, chosen)
            done = _report_of(target, work, found, pictures)
            journal.clear()
            return done, found
        check_target(target, force, MANIFEST)
        prepared = PreparedSteps(
            work.captions[:RUNS], work.context.feeds, work.variants.prepared, search_json(found, options, work)
        )
        journal.replace(PUBLISHED, {"references": _hash_of(references), "before": _manifest_sha256(target)})
        done = calibrate(
            bundle, target, images=images, method=method, formats=found.rules, references=references, count=count,
            force=force, anyway=anyway, threads=threads, limits=limits, progress=progress, notify=notify,
            prepared=prepared,
        )  # fmt: skip
        work.variants.publish_copies(target, chosen)
        journal.clear()
    return done, found


def _plan(
    parent: Bundle, pictures: PictureSet, options: SearchOptions, method: str, optimizer: Optimizer | None
) -> dict[str, Any]:
    """Returns the values that decide the results of a search.

    The limits are not among the values: they only decide which result is published.
    """
    return {
        "bundle": parent.sha256,
        "pictures": pictures.sha256,
        "method": method,
        "board": None if options.board is None else options.board.name,
        "scored": options.scored,
        "measured": options.measured,
        "formats": list(options.formats),
        "optimized": optimizer is not None,
        "processor": processor(),
        "versions": {"blip2edge": __version__, "onnxruntime": installed("onnxruntime")},
    }


def _measure_plan(scored: Sequence[CalibrationPicture], limit: DropLimit, threads: int | None) -> dict[str, Any]:
    """Returns the values on which the stored losses depend: the measure, the reference captions, the CPU threads."""
    texts = json.dumps([picture.references() for picture in scored]) if limit.cider is not None else ""
    return {"loss": limit.measure, "captions": hashlib.sha256(texts.encode()).hexdigest(), "threads": threads}


def _caption_loss(scored: Sequence[CalibrationPicture], cider: CaptionScore | None) -> DropLimit:
    """Returns the measure of the loss: CIDEr if every picture has references, else the share of changed captions."""
    return DropLimit(0.0, cider if all(picture.references() for picture in scored) else None)


def _hash_of(references: References | None) -> str:
    return "" if references is None else references.sha256


def _manifest_sha256(target: Path) -> str:
    """Returns the hash of the manifest of a bundle; empty if there is no manifest."""
    manifest = target / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""


def _is_published(target: Path, work: Workload, found: FoundPoints, references: References | None) -> bool:
    """Returns whether an earlier run of this search was killed just after it had published the chosen formats.

    It is False if the earlier run fitted the confidence on other references.
    """
    marker = work.journal.stored(PUBLISHED)
    if marker is None or not (target / MANIFEST).is_file():
        return False
    if marker["references"] != _hash_of(references) or marker["before"] == _manifest_sha256(target):
        return False  # other references; or the run was killed before it replaced the output
    manifest = read_manifest(target)
    expected = {"parent_sha256": work.context.parent.sha256, "data_sha256": work.context.pictures_sha256}
    seals = {name: seal for graph in _staged(work, found).values() for name, seal in graph.seals.items()}
    return manifest.calibration.items() >= expected.items() and manifest.files.items() >= seals.items()


def _report_of(target: Path, work: Workload, found: FoundPoints, pictures: PictureSet) -> CalibrationReport:
    summaries = {name: graph.summary for name, graph in _staged(work, found).items()}
    return CalibrationReport(target, summaries, None, len(pictures), (), 0.0, 0)


def _staged(work: Workload, found: FoundPoints) -> dict[str, StagedGraph]:
    """Returns the records of the graphs of the chosen combination, by the graph's name."""
    formats = choose_graph_formats(work.context.parent.manifest.graphs, (), None, found.rules)
    return {name: work.variants.made(name, form) for name, form in formats.items()}


def _workload(
    context: CalibrationContext,
    journal: SearchJournal,
    pictures: PictureSet,
    scored: Sequence[CalibrationPicture],
    limit: DropLimit,
    optimizer: Optimizer | None,
    *,
    copies: bool,
) -> Workload:
    """Captions pictures with the original bundle, records the graphs' inputs, and returns the data for measurements."""

    def caption() -> list[Any]:
        progress = partial(context.progress, "caption with the original bundle")
        found = caption_pictures(context.parent.path, scored, threads=context.threads, progress=progress)
        return [[list(caption.tokens), caption.text] for caption in found]

    captions = [GreedyCaption(tuple(tokens), text) for tokens, text in journal.value("captions", caption)]

    def collect(folder: Path) -> None:
        record_inputs(replace(context, feeds=Feeds(folder)), pictures, captions[:RUNS])

    context = replace(context, feeds=Feeds(journal.folder("feeds", collect)))
    graphs = list(context.parent.manifest.graphs)
    parts = PartGraphs.of(graphs, [graph for graph in graphs if context.feeds.count(graph)])
    return Workload(Variants(context, journal, parts, optimizer, copies), scored, captions, limit)


def search_json(found: FoundPoints, options: SearchOptions, work: Workload) -> dict[str, Any]:
    """Returns the results of a search as a JSON object: ``search`` in ``report.json``."""
    board = options.board
    return {
        "processor": processor() if board is None else board.title,
        "time": "measured" if board is None else "predicted",
        "loss": work.limit.measure,
        "pictures": len(work.pictures),
        "tokens": work.tokens,
        "optimized": work.variants.runs_copies,
        "limits": {name: value for name, value in vars(options.limits).items() if value is not None},
        "rule": found.chosen.rule,
        "chosen": found.chosen.point.flags,
        "front": [point.flags for point in found.front],
        "points": [point.to_json() for point in found.points],
    }
