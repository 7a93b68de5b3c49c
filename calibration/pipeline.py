"""``blip2edge calibrate``: a bundle and pictures in, an INT8 bundle out, or nothing.

1. Read: the pictures are chosen, the parent captions some of them, and what each graph is given is spooled to disk.
2. Range: the activations of the vision encoder and the bridge are observed, and a plan says what becomes INT8.
3. Write: each graph's new nodes, its weights a tensor at a time.
4. Compare: cosine of each graph's outputs and agreement of the captions with the parent's stand in the manifest.
5. Publish: the manifest seals the files, and the staging directory is renamed.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

import blip2edge
from blip2edge.bundle.manifest import MANIFEST, STAMP, Bundle, FileRecord, GraphRecord, Manifest
from blip2edge.bundle.publishing import staged
from blip2edge.bundle.schema import BRIDGE, VISION
from blip2edge.calibration.activations import headroom
from blip2edge.calibration.activations.quantise import Job, quantise_activations
from blip2edge.calibration.activations.ranges import THRESHOLDS
from blip2edge.calibration.batches import Feeds, collect
from blip2edge.calibration.pictures import ADVISED, DEFAULT_COUNT, PictureSet, choose_pictures
from blip2edge.calibration.report.details import tell
from blip2edge.calibration.results import CalibratedGraph, CalibrationReport, Made
from blip2edge.calibration.search.agreement import Captions, caption_pictures, compare_captions
from blip2edge.calibration.search.choosing import (
    Candidates,
    Choice,
    DropLimit,
    Score,
    check_drop_limit,
    choose,
    measure_layers,
)
from blip2edge.calibration.weights.language_weights import BITS, RUNS, quantise_weights
from blip2edge.errors import BackendError, BundleError, UsageError, option
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.bench.meters import MemoryMeter

METHODS = (*THRESHOLDS, "smooth")
UNSEEN_BITS = 8
"""Of weights whose activations the pictures do not show (texts that are compared, a draft): four bits need them."""

W8A8 = (VISION, BRIDGE)
"""Graphs whose activations become INT8 too, unless told otherwise."""


def calibrate(
    bundle: str | Path,
    output: str | Path,
    *,
    images: str | Path,
    method: str = "smooth",
    activations: Sequence[str] = W8A8,
    weights: str | None = "int8",
    drop_limit: float | None = None,
    cider: Score | None = None,
    count: int = DEFAULT_COUNT,
    force: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> CalibrationReport:
    """Makes an INT8 bundle.

    Args:
        bundle: The parent, in fp32 or fp16.
        output: The bundle to make.
        images: A folder of pictures or ``.tar`` shards.
        method: How ranges are chosen, one of :data:`METHODS`.
        activations: Graphs whose activations become INT8 too; those that the parent lacks are passed over.
        weights: What the weights of the other graphs become, ``int8`` or ``int4``, and the token table with them
            (``int8``); None leaves them.
        drop_limit: Percent points of the captions that may differ from the parent's: the layers that suffer most
            stay as they are until it holds. None for no limit.
        cider: Scores captions; with it, and a ``.txt`` of references beside every picture, the limit is on CIDEr.
        count: Pictures at most.
        force: Replace what is at ``output``.
        threads: CPU threads; None for as many as there are cores.
        progress: Called with a stage's name, steps done and steps in all.

    Raises:
        UsageError: An unknown method, or unknown weights.
        BundleError: The parent is no bundle, is in bf16, or was calibrated before.
        DataError: No picture can be read.
        OutputError: ``output`` exists, or cannot be written.
        BackendError: onnxruntime is not installed.
    """
    target, start = Path(output), time.perf_counter()
    parent = _open_parent(bundle, method, weights)
    check_drop_limit(drop_limit, parent.manifest.prompt is not None)
    report = progress or (lambda stage, done, total: None)
    with MemoryMeter() as meter, staged(target, force) as staging:
        pictures = choose_pictures(images, count, partial(report, "read the pictures"))
        warnings = _warnings(pictures)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            feeds = Feeds(Path(folder) / "feeds")
            job = Job(parent, staging, feeds, method, threads, report, warnings.append, pictures.sha256)
            limit = None if drop_limit is None else DropLimit(drop_limit, cider)
            title = target.resolve().name
            graphs, agreement = _calibrated(job, pictures, activations, weights, limit, title)
    made, seconds = {name: item.summary for name, item in graphs.items()}, time.perf_counter() - start
    return CalibrationReport(target, made, agreement, len(pictures), tuple(warnings), seconds, meter.peak)


def _calibrated(
    job: Job,
    pictures: PictureSet,
    activations: Sequence[str],
    weights: str | None,
    limit: DropLimit | None,
    title: str,
) -> tuple[dict[str, Made], Captions | None]:
    """Fills the staging directory."""
    parent = job.parent
    said = _captions(job, parent.path, pictures, "caption with the parent")
    tokens = [caption[1] for caption in said or ()]
    collect(
        parent,
        pictures,
        job.feeds,
        texts=tokens,
        threads=job.threads,
        progress=partial(job.report, "collect"),
    )
    graphs = {
        name: replace(_made(job, record, activations, weights), headroom=_headroom(job, record))
        for name, record in parent.manifest.graphs.items()
    }
    _copy_rest(parent, job.staging)
    agreement, choice = None, None
    if said is None:
        _seal(job, graphs).write(job.staging)
    elif limit is None:
        agreement = _agreement(job, pictures, said, graphs)
    else:
        graphs, choice, agreement = _chosen(job, pictures, said, graphs, limit)
    record = _record(job, pictures, graphs, agreement)
    if choice is not None:
        record["sensitivity"] = choice.to_json()
    manifest = _seal(job, graphs)
    files = {**manifest.files, **tell(job, title, list(pictures), record, graphs, agreement)}
    replace(manifest, files=files, calibration=record).write(job.staging)
    return graphs, agreement


Said = list[tuple[str, tuple[int, ...]]]
"""Captions as texts and token ids."""


def _agreement(job: Job, pictures: PictureSet, said: Said, graphs: Mapping[str, Made]) -> Captions:
    """Seals what is in the staging directory, and compares its captions with the parent's."""
    _seal(job, graphs).write(job.staging)
    return compare_captions(said, _captions(job, job.staging, pictures, "caption with the new") or ())


def _chosen(
    job: Job, pictures: PictureSet, said: Said, graphs: Mapping[str, Made], limit: DropLimit
) -> tuple[dict[str, Made], Choice, Captions]:
    """Leaves layers as they are until the limit holds; the graphs, the record, and the captions in the end."""
    candidates = Candidates.keep(job, graphs, job.feeds.directory.parent / "whole")
    ranking = measure_layers(job, candidates, list(pictures), [tokens for _, tokens in said])
    references = [picture.references() for picture in list(pictures)[: len(said)]]
    if limit.cider is not None and not all(references):
        limit = DropLimit(limit.points)
    last: list[Captions] = []

    def drop_of(made: Mapping[str, Made]) -> float:
        last.append(_agreement(job, pictures, said, made))
        return limit.drop(last[-1], references)

    chosen, choice = choose(job, candidates, ranking, limit, drop_of)
    return chosen, choice, last[-1]


def _made(job: Job, record: GraphRecord, activations: Sequence[str], weights: str | None) -> Made:
    """What becomes of a graph."""
    if record.spec.name in activations:
        return quantise_activations(job, record)
    if record.spec.name == VISION or weights is None:
        return _copied(job, record)
    bits = BITS[weights] if job.feeds.count(record.spec.name) else UNSEEN_BITS
    return quantise_weights(job, record, bits)


def _headroom(job: Job, record: GraphRecord) -> dict[str, Any] | None:
    """How far the parent's tensors are from fp16's largest number; None where the graph was given nothing."""
    name = record.spec.name
    if not job.feeds.count(name):
        return None
    model = ir.load(job.parent.file(record.spec.file))
    progress = partial(job.report, f"{name}: headroom")
    return headroom.to_json(
        headroom.sweep(model, record, job.feeds, job.parent.path, threads=job.threads, progress=progress)
    )


def _open_parent(bundle: str | Path, method: str, weights: str | None) -> Bundle:
    if method not in METHODS:
        raise UsageError(f"{option('method')} is one of {', '.join(METHODS)}, not {method}")
    if weights is not None and weights not in BITS:
        raise UsageError(f"{option('weights')} is one of {', '.join(BITS)}, not {weights}")
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendError(
            "a calibration runs the bundle in onnxruntime, which is not installed",
            "install it: pip install 'blip2edge[cpu,export]'",
        )
    parent = Bundle.open(bundle)
    if parent.manifest.precision == "bf16":
        raise BundleError(
            f"{parent.path} is in bf16, which ONNX Runtime does not run on a CPU",
            f"export with {option('precision')} fp32 or fp16, and calibrate that",
        )
    if parent.manifest.calibration:
        raise BundleError(
            f"{parent.path} was calibrated before, and a range of rounded values is no range",
            "calibrate the bundle that it was made from",
        )
    return parent


def _warnings(pictures: PictureSet) -> list[str]:
    warnings = []
    if len(pictures) < ADVISED:
        warnings.append(
            f"{len(pictures)} pictures are fewer than the {ADVISED} advised: "
            "a value that none of them shows will saturate"
        )
    if pictures.skipped:
        warnings.append(f"{len(pictures.skipped)} pictures cannot be read, {pictures.skipped[0]} among them")
    return warnings


def _captions(job: Job, bundle: Path, pictures: PictureSet, stage: str) -> Said | None:
    if job.parent.manifest.prompt is None:
        return None
    some = list(pictures)[:RUNS]
    return caption_pictures(bundle, some, threads=job.threads, progress=partial(job.report, stage))


def _copied(job: Job, record: GraphRecord) -> Made:
    """A graph that stays as it is."""
    for file in record.files:
        shutil.copyfile(job.parent.file(file), job.staging / file)
    size = job.parent.manifest.graph_bytes(record)
    summary = CalibratedGraph(record.spec.name, record.precision, size, size, 0.0, 0, {}, {})
    return Made(record, {file: job.parent.manifest.files[file] for file in record.files}, summary)


def _copy_rest(parent: Bundle, staging: Path) -> None:
    """Everything that belongs to no graph: token table, tokenizers."""
    manifest = parent.manifest
    of_graphs = {file for record in manifest.graphs.values() for file in record.files}
    for file in manifest.files:
        if file not in of_graphs and not (staging / file).exists():
            shutil.copyfile(parent.file(file), staging / file)


def _seal(job: Job, graphs: Mapping[str, Made]) -> Manifest:
    seals = {file: seal for made in graphs.values() for file, seal in made.seals.items()}
    for path in sorted(job.staging.iterdir()):
        if path.name not in (*seals, MANIFEST, STAMP):
            seals[path.name] = FileRecord.of(path)
    manifest = job.parent.manifest
    return replace(
        manifest,
        graphs={name: made.record for name, made in graphs.items()},
        files=seals,
        versions={**manifest.versions, "calibrated_by": blip2edge.__version__},
    )


def _record(
    job: Job, pictures: PictureSet, graphs: Mapping[str, Made], agreement: Captions | None
) -> dict[str, Any]:
    """The manifest's ``calibration`` object."""
    return {
        "method": job.method,
        "pictures": len(pictures),
        "data_sha256": pictures.sha256,
        "parent_sha256": job.parent.sha256,
        "cosine": {
            name: {output: value.to_json() for output, value in made.summary.cosine.items()}
            for name, made in graphs.items()
            if made.summary.cosine
        },
        "weights": {
            name: told for name, made in graphs.items() if (told := made.summary.weights_json()) is not None
        },
        "left_in_float": {
            name: dict(made.summary.left) for name, made in graphs.items() if made.summary.left
        },
        "fp16": {
            name: {key: made.headroom[key] for key in ("lowest", "keep_fp32")}
            for name, made in graphs.items()
            if made.headroom is not None
        },
        "captions": None if agreement is None else agreement.to_json(),
    }
