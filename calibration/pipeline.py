"""Implements ``blip2edge calibrate``: makes an INT8 or INT4 bundle; if a step fails, nothing is published.

1. Record: choose the pictures, caption some of them with the original bundle, and save the inputs of each graph.
2. Quantize: choose the ranges of activations (``activations``), round the weights (``weights``), write each new graph.
3. Compare: the cosine of each graph's outputs, and the agreement of the captions with those of the original bundle.
4. Limit: with ``--drop-limit``, keep sensitive layers in floating point until the captions agree enough (``search``).
5. Publish: write the report, seal the files in the manifest, and rename the staging directory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.outputs.publishing import check_not_source, scratch, staged
from blip2edge.calibration.activations.headroom import headroom_json, measure_headroom
from blip2edge.calibration.activations.quantize import quantize_activations
from blip2edge.calibration.advice import difference_warnings, picture_warnings
from blip2edge.calibration.agreement import (
    RUNS,
    CaptionAgreement,
    GreedyCaption,
    caption_pictures,
    compare_captions,
)
from blip2edge.calibration.batches import Feeds, collect
from blip2edge.calibration.confidence.pipeline import add_confidence, check_fit, copy_with_confidence
from blip2edge.calibration.confidence.references import References
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.formats import (
    FP16,
    INT8_ACTIVATIONS,
    W8A8,
    FormatRule,
    GraphFormat,
    check_inputs,
    check_matches,
    check_nothing_to_quantize,
    choose_graph_formats,
)
from blip2edge.calibration.pictures import DEFAULT_COUNT, PictureSet, choose_pictures
from blip2edge.calibration.report.document import write_reports
from blip2edge.calibration.results import CalibrationReport, StagedGraph
from blip2edge.calibration.sealing import calibration_record, copied_graph, copy_rest, seal
from blip2edge.calibration.search.drop_limit import (
    CaptionScore,
    DropLimit,
    FullyQuantized,
    KeptLayers,
    check_drop_limit,
    choose_kept_layers,
    measure_layers,
)
from blip2edge.calibration.targets import find_targets
from blip2edge.calibration.weights.half import store_half
from blip2edge.calibration.weights.quantize import quantize_weights
from blip2edge.choices import RANGE_METHODS, WEIGHT_BITS
from blip2edge.errors import BackendError, BundleError, UsageError, option
from blip2edge.graph_files import load_graph
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.packages import require
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.bench.certificate import reference_outputs
from blip2edge.runtime.bench.memory import Notify, calibration_need, check_memory
from blip2edge.runtime.bench.meters import MemoryMeter

GraphMaker = Callable[[CalibrationContext, GraphRecord, GraphFormat], StagedGraph]
"""Function that writes a graph, in a given format, to the staging directory."""


@dataclass(frozen=True)
class PreparedSteps:
    """Results of those steps of a calibration that a search has already run.

    Attributes:
        captions: Captions of the first pictures by the original bundle.
        feeds: The recorded inputs.
        graph: Function that writes a graph, in a given format, to the staging directory.
        search: The object ``search`` of ``report.json``.
    """

    captions: Sequence[GreedyCaption]
    feeds: Feeds
    graph: GraphMaker
    search: Mapping[str, Any]


def calibrate(
    bundle: str | Path,
    output: str | Path,
    *,
    images: str | Path | None = None,
    method: str = "smooth",
    activations: Sequence[str] = INT8_ACTIVATIONS,
    weights: str | None = "int8",
    formats: Sequence[str | FormatRule] = (),
    drop_limit: float | None = None,
    cider: CaptionScore | None = None,
    references: References | None = None,
    count: int = DEFAULT_COUNT,
    force: bool = False,
    anyway: bool = False,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: ProgressCallback | None = None,
    notify: Notify | None = None,
    prepared: PreparedSteps | None = None,
) -> CalibrationReport:
    """Makes an INT8 or INT4 bundle from a floating-point bundle (the original bundle), fits a confidence, or does both.

    Args:
        bundle: The directory of the original bundle, in fp32 or fp16. If ``images`` is None, any precision is accepted.
        output: The directory of the new bundle.
        images: A folder of pictures or ``.tar`` shards; None to quantize nothing, and to fit a confidence only.
        method: How activation ranges are chosen, one of :data:`blip2edge.choices.RANGE_METHODS`.
        activations: Names of the graphs whose activations become INT8. Those of :data:`INT8_ACTIVATIONS` that the
            original bundle lacks have no effect.
        weights: The type of the weights of the other graphs, except the vision encoder: ``int8`` or ``int4`` (the token
            embedding table becomes ``int8``); None keeps them unchanged.
        formats: Formats of single graphs or matrices, which override ``activations`` and ``weights``:
            ``GRAPH=FORMAT`` or ``GRAPH:PATTERN=FORMAT`` (:mod:`blip2edge.calibration.formats`).
        drop_limit: Largest share of the captions that may differ from those of the original bundle, in percentage
            points: the most sensitive layers are kept in floating point until the captions are within the limit. None
            for no limit.
        cider: Function that computes the CIDEr score of captions. If it is given and every picture has a ``.txt`` of
            references, ``drop_limit`` limits the drop of this score.
        references: Pictures with known captions, on which the confidence of the new bundle is fitted; None for no
            confidence.
        count: Largest number of pictures.
        force: Whether to replace an existing bundle at ``output``.
        anyway: Whether to go on if this machine has too little memory.
        threads: CPU threads; None for all cores.
        limits: The largest picture that is decoded; larger pictures are skipped, with a warning.
        progress: Called with a stage's name, steps done and steps in all.
        notify: Called with a warning if this machine has probably too little memory.
        prepared: Results of steps that :func:`blip2edge.calibration.search.pipeline.search` has run; None to run all
            steps here.

    Raises:
        UsageError: ``method``, ``weights``, a format or a graph in ``activations`` is unknown, ``drop_limit`` does not
            apply to this model, or an option of the quantization is given without ``images``.
        BundleError: ``bundle`` is not a bundle, is in bf16, or was calibrated before.
        DataError: No picture can be read, or there are too few references.
        OutputError: ``output`` exists, or cannot be written.
        BackendError: onnxruntime is not installed.
    """
    target, start = Path(output), time.perf_counter()
    if images is None:
        given = {"method": method, "activations": activations, "weights": weights, "formats": formats}
        check_nothing_to_quantize(given | {"drop_limit": drop_limit, "count": count, "limits": limits})
        return _copied_bundle(bundle, target, references, force=force, threads=threads, progress=progress)
    parent = open_parent(bundle, method, weights)
    check_not_source(target, parent.path)
    check_fit(parent, references)
    unknown = sorted(set(activations) - set(INT8_ACTIVATIONS) - set(parent.manifest.graphs))
    if unknown:
        known = ", ".join(parent.manifest.graphs)
        raise UsageError(f"expected {option('int8_activations')} to be one of {known}, got {', '.join(unknown)}")
    rules = [FormatRule.parse(rule) if isinstance(rule, str) else rule for rule in formats]
    chosen = choose_graph_formats(parent.manifest.graphs, activations, weights, rules)
    check_drop_limit(drop_limit, parent.manifest.prompt is not None)
    check_matches(rules, partial(_weights_of, parent))
    if prepared is None:  # a search has checked it
        check_enough_memory(parent, anyway=anyway, notify=notify)
    report = progress or (lambda stage, done, total: None)
    with MemoryMeter() as meter, staged(target, force) as staging:
        pictures = choose_pictures(images, count, partial(report, "read the pictures"), limits)
        warnings = picture_warnings(pictures)
        feeds = Feeds(scratch(staging, "feeds")) if prepared is None else prepared.feeds
        context = CalibrationContext(parent, staging, feeds, method, threads, report, warnings.append, pictures.sha256)
        limit = None if drop_limit is None else DropLimit(drop_limit, cider)
        title = target.resolve().name
        graphs, agreement = _fill_staging(context, pictures, chosen, rules, limit, title, prepared)
        fitted = None
        if references is not None:
            fitted = add_confidence(staging, references, title=title, threads=threads, progress=progress)
        parent.check_unchanged()
    summaries = {name: graph.summary for name, graph in graphs.items()}
    warnings += difference_warnings(summaries, agreement, limited=drop_limit is not None)
    seconds = time.perf_counter() - start
    warnings += fitted.warnings if fitted is not None else ()
    return CalibrationReport(target, summaries, agreement, len(pictures), tuple(warnings), seconds, meter.peak, fitted)


def _copied_bundle(
    bundle: str | Path,
    target: Path,
    references: References | None,
    *,
    force: bool,
    threads: int | None,
    progress: ProgressCallback | None,
) -> CalibrationReport:
    """Copies a bundle and fits the confidence of the copy."""
    if references is None:
        raise UsageError(
            f"expected {option('images')}, {option('references')} or both, got neither",
            "give pictures to quantize with, or pictures with known captions to fit a confidence on",
        )
    with MemoryMeter() as meter:
        fitted, seconds = copy_with_confidence(
            bundle, target, references, force=force, threads=threads, progress=progress
        )
    return CalibrationReport(target, {}, None, 0, fitted.warnings, seconds, meter.peak, fitted)


def _fill_staging(
    context: CalibrationContext,
    pictures: PictureSet,
    formats: Mapping[str, GraphFormat],
    rules: Sequence[FormatRule],
    limit: DropLimit | None,
    title: str,
    prepared: PreparedSteps | None,
) -> tuple[dict[str, StagedGraph], CaptionAgreement | None]:
    """Writes the whole bundle to the staging directory: graphs, other files, reports and manifest.

    Returns:
        The graphs by name, and the agreement of the captions (None if the model generates no captions).
    """
    parent = context.parent
    make: GraphMaker = quantize_graph if prepared is None else prepared.graph
    if prepared is None:
        captions = _captions(context, parent.path, pictures, "caption with the original bundle")
        record_inputs(context, pictures, captions or ())
        check_inputs(rules, context.feeds.count)
    else:
        captions = prepared.captions
    graphs = {name: make(context, record, formats[name]) for name, record in parent.manifest.graphs.items()}
    copy_rest(parent, context.staging)
    agreement, kept = None, None
    if captions is None:
        seal(context, graphs).write(context.staging)
    elif limit is None:
        agreement = _agreement(context, pictures, captions, graphs)
    else:
        graphs, kept, agreement = _apply_limit(context, pictures, captions, graphs, limit)
    record = calibration_record(context, pictures, graphs, agreement)
    if kept is not None:
        record["sensitivity"] = kept.to_json()
    manifest = seal(context, graphs)
    reports = write_reports(
        context, title, list(pictures), record, graphs, agreement, None if prepared is None else prepared.search
    )
    replace(manifest, files={**manifest.files, **reports}, calibration=record).write(context.staging)
    reference_outputs.add_reference_outputs(context.staging, threads=context.threads, progress=context.progress)
    return graphs, agreement


def _agreement(
    context: CalibrationContext,
    pictures: PictureSet,
    captions: Sequence[GreedyCaption],
    graphs: Mapping[str, StagedGraph],
) -> CaptionAgreement:
    """Captions pictures with the new bundle, and compares the captions with those of the original bundle.

    Before that, the manifest is written to the staging directory.
    """
    seal(context, graphs).write(context.staging)
    ours = _captions(context, context.staging, pictures, "caption with the new")
    return compare_captions(captions, ours or ())


def _apply_limit(
    context: CalibrationContext,
    pictures: PictureSet,
    captions: Sequence[GreedyCaption],
    graphs: Mapping[str, StagedGraph],
    limit: DropLimit,
) -> tuple[dict[str, StagedGraph], KeptLayers, CaptionAgreement]:
    """Keeps sensitive layers in floating point until the loss is within the limit.

    Returns:
        The final graphs, the kept layers with the measured losses, and the final agreement of the captions.
    """
    quantized = FullyQuantized.save(context, graphs, context.feeds.directory.parent / "quantized")
    ranking = measure_layers(context, quantized, list(pictures), [caption.tokens for caption in captions])
    references = [picture.references() for picture in list(pictures)[: len(captions)]]
    if limit.cider is not None and not all(references):
        limit = DropLimit(limit.points)
    agreements: list[CaptionAgreement] = []

    def drop_of(candidate: Mapping[str, StagedGraph]) -> float:
        agreements.append(_agreement(context, pictures, captions, candidate))
        return limit.drop(agreements[-1], references)

    chosen, kept = choose_kept_layers(context, quantized, ranking, limit, drop_of)
    return chosen, kept, agreements[-1]


def record_inputs(context: CalibrationContext, pictures: PictureSet, captions: Sequence[GreedyCaption]) -> None:
    """Runs the original graphs on the pictures and records the inputs of each graph.

    The decoder runs on the prompt, followed by the tokens of the picture's caption.
    """
    collect(
        context.parent,
        pictures,
        context.feeds,
        texts=[caption.tokens for caption in captions],
        threads=context.threads,
        progress=partial(context.progress, "collect"),
    )


def quantize_graph(context: CalibrationContext, record: GraphRecord, form: GraphFormat) -> StagedGraph:
    """Writes one graph in a format to the staging directory, and measures the FP16 headroom of the original graph."""
    return replace(in_format(context, record, form), headroom=graph_headroom(context, record))


def in_format(context: CalibrationContext, record: GraphRecord, form: GraphFormat) -> StagedGraph:
    """Writes one graph in a format to the staging directory; a graph in ``float`` is copied."""
    if form.whole.kind == W8A8:
        if not context.feeds.count(record.spec.name):
            raise UsageError(
                f"{option('int8_activations')}: the graph {record.spec.name} does not run while pictures are "
                "captioned, so the ranges of its activations are not known",
                f"remove {record.spec.name} from the list",
            )
        return quantize_activations(context, record, form)
    if form.whole.kind == FP16 and record.precision == "fp32":
        return store_half(context, record)
    if form.whole.bits is None:
        return copied_graph(context, record)
    if not context.feeds.count(record.spec.name):
        form = form.without_inputs()
    return quantize_weights(context, record, form)


def graph_headroom(context: CalibrationContext, record: GraphRecord) -> dict[str, Any] | None:
    """Measures the FP16 headroom of the original graph; None if no inputs of the graph were recorded."""
    name = record.spec.name
    if not context.feeds.count(name):
        return None
    model = load_graph(context.parent.file(record.spec.file))
    progress = partial(context.progress, f"{name}: headroom")
    return headroom_json(
        measure_headroom(model, record, context.feeds, context.parent.path, threads=context.threads, progress=progress)
    )


def check_enough_memory(parent: Bundle, *, anyway: bool, notify: Notify | None) -> None:
    """Checks that this machine has enough memory to calibrate the bundle.

    If the memory is probably too small, ``notify`` is called with a warning, or BundleError is raised.
    """
    largest = max(map(parent.manifest.graph_bytes, parent.manifest.graphs.values()))
    check_memory(calibration_need(largest), BundleError, anyway=anyway, notify=notify)


def _weights_of(parent: Bundle, graph: str) -> list[str]:
    """Returns the names of the matrices of a graph that can have a format of their own."""
    model = load_graph(parent.file(parent.graph(graph).spec.file))
    return [product.weight for product in find_targets(model).products]


def open_parent(bundle: str | Path, method: str, weights: str | None) -> Bundle:
    """Opens the bundle to calibrate, and checks that it can be calibrated; raises the errors of :func:`calibrate`."""
    if method not in RANGE_METHODS:
        raise UsageError(f"expected {option('method')} to be one of {', '.join(RANGE_METHODS)}, got {method}")
    if weights is not None and weights not in WEIGHT_BITS:
        raise UsageError(f"expected {option('weights')} to be one of {', '.join(WEIGHT_BITS)}, got {weights}")
    require("onnxruntime", "calibration", BackendError)
    parent = Bundle.open(bundle)
    parent.require_graphs("calibration")
    if parent.manifest.precision == "bf16":
        raise BundleError(
            f"{parent.path} is in bf16, which ONNX Runtime does not run on a CPU",
            f"export the checkpoint with {option('precision')} fp32 or fp16, and calibrate the new bundle",
        )
    if parent.manifest.calibration:
        raise BundleError(
            f"{parent.path} is already calibrated, so its weights are already rounded",
            "calibrate the floating-point bundle that this bundle was made from",
        )
    return parent


def _captions(
    context: CalibrationContext, bundle: Path, pictures: PictureSet, stage: str
) -> Sequence[GreedyCaption] | None:
    """Captions the first :data:`RUNS` pictures; returns None if the model generates no captions."""
    if context.parent.manifest.prompt is None:
        return None
    return caption_pictures(
        bundle, list(pictures)[:RUNS], threads=context.threads, progress=partial(context.progress, stage)
    )
