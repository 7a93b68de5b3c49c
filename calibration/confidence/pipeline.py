"""Adds a confidence to a bundle: a function, fitted on references, that gives the probability that a caption is right.

References are pictures with known captions or answers. The bundle's model captions them, and the fit is written to the
manifest and the reports.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import read_manifest
from blip2edge.bundle.manifest_fields import CAPTION
from blip2edge.bundle.outputs.publishing import check_not_source, staged
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.calibration.confidence.figures import figures
from blip2edge.calibration.confidence.fit import FittedMap, fit_map
from blip2edge.calibration.confidence.page import with_section
from blip2edge.calibration.confidence.references import Reference, References
from blip2edge.calibration.report.files import REPORT, REPORT_PAGE, SCHEMA
from blip2edge.errors import Blip2EdgeError, DataError, ImageError, option, plural
from blip2edge.progress import ProgressCallback
from blip2edge.reading import read_json
from blip2edge.runtime.bench.certificate.reference_outputs import default_prompt
from blip2edge.runtime.captioning.assemble import captioning_prompt
from blip2edge.runtime.captioning.captioner import Captioner, CaptionResult
from blip2edge.runtime.decoding.confidence import ConfidenceMap, decoding_options, features, task_of
from blip2edge.runtime.decoding.sampling import warn_of_unused

LEAST, ADVISED = 20, 500
"""Smallest number of pictures for a fit, and the number below which a fit gives a warning."""

ADVISED_EACH = 20
"""A fit gives a warning if fewer generated texts than this are right, or if fewer than this are wrong."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ConfidenceReport:
    """The fitted confidence of a bundle.

    Attributes:
        task: ``caption`` or ``ask``.
        pictures: Number of references of the fit (pictures, or questions about pictures).
        kind: Name of the chosen function from log-probabilities to confidence, for example ``isotonic, sum``.
        figures: Values measured in ten-fold cross-validation on the references, as ``figures`` returns them.
        warnings: Warnings, one line each.
    """

    task: str
    pictures: int
    kind: str
    figures: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def add_confidence(
    directory: Path,
    references: References,
    *,
    title: str,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> ConfidenceReport:
    """Fits the confidence of a bundle that is being made, and writes the fit to the bundle's manifest and reports.

    Args:
        directory: The bundle, whose manifest is written.
        references: Pictures with known captions, and the options of the fit.
        title: The bundle's name in the report.
        threads: CPU threads; None for all cores.
        progress: Called with a stage's name, pictures done and pictures in all.

    Raises:
        DataError: There are fewer than :data:`LEAST` usable pictures, or captions and questions are mixed.
        UsageError: The bundle generates no captions, or an option is outside its range.
    """
    report = progress or (lambda stage, done, total: None)
    asks = _check(references)
    with Captioner.load(directory, backend="cpu", threads=threads) as captioner:
        options = captioner.options(**references.options)
        warn_of_unused(options, references.options)
        prompt = references.prompt if references.prompt is not None else default_prompt(captioner.prompts)
        task = task_of(captioner.prompts.question("x"), captioner.prompts.spec) if asks else CAPTION
        pairs, broken = [], []
        for item, result in _generated(
            captioner, references, prompt, lambda done, total: report("caption the references", done, total)
        ):
            if isinstance(result, ImageError):
                broken.append(f"{item.name}: {result.problem}")
            elif isinstance(result, Blip2EdgeError):
                raise result
            else:
                pairs.append((features(result.token_logprobs), item.is_right(result.text), item.identity))
    if len(pairs) < LEAST:
        raise DataError(
            f"expected at least {LEAST} readable pictures with references, got {len(pairs)}"
            + "".join(f"; {line}" for line in (*references.warnings, *_unreadable(broken))),
            f"give more to {option('references')}; {ADVISED} or more are advised",
        )
    rows, right = np.array([row for row, *_ in pairs]), np.array([good for _, good, _ in pairs])
    fitted = fit_map(rows, right, [identity for *_, identity in pairs])
    manifest = read_manifest(directory)
    found = ConfidenceMap(
        task=task,
        prompt=None if asks else prompt,
        options=decoding_options(options),
        precisions={name: graph.precision for name, graph in manifest.graphs.items()},
        max_new_tokens=options.max_new_tokens,
        offset=fitted.score.offset,
        weights=fitted.score.weights,
        knots=fitted.score.knots,
        bounds=fitted.bounds,
    )
    record = {**found.to_json(), **_about(fitted, right, references.rule)}
    written = {**manifest.confidence, task: record}
    reports = _write_reports(directory, title, written)
    replace(manifest, confidence=written, files={**manifest.files, **reports}).write(directory)
    warnings = (*references.warnings, *_warnings(right, broken))
    return ConfidenceReport(task, len(pairs), fitted.kind, record["figures"], warnings)


def copy_with_confidence(
    bundle: str | Path,
    output: str | Path,
    references: References,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[ConfidenceReport, float]:
    """Copies a bundle of any precision, unchanged, and adds a confidence to the copy.

    Args:
        bundle: The bundle; if it has a confidence for the other task, the copy keeps it.
        output: Directory of the copy.
        references: Pictures with known captions, and the options of the fit.
        force: Whether to replace an existing bundle at ``output``.
        threads: CPU threads; None for all cores.
        progress: Called with a stage's name, pictures done and pictures in all.

    Returns:
        The report of the fit, and the wall time of copy and fit in seconds.

    Raises:
        BundleError: ``bundle`` is not a bundle, or has engines only.
        OutputError: ``output`` exists, or cannot be written.
        DataError: There are fewer than :data:`LEAST` usable pictures, or captions and questions are mixed.
        UsageError: The bundle generates no captions, or an option is outside its range.
    """
    target, start = Path(output), time.perf_counter()
    parent = Bundle.open(bundle)
    parent.require_graphs("calibration")
    check_not_source(target, parent.path)
    check_fit(parent, references)
    with staged(target, force) as staging:
        for file in parent.manifest.files:
            shutil.copyfile(parent.file(file), staging / file)
        parent.manifest.write(staging)
        report = add_confidence(staging, references, title=target.resolve().name, threads=threads, progress=progress)
        parent.check_unchanged()
    return report, time.perf_counter() - start


def check_fit(bundle: Bundle, references: References | None) -> None:
    """Checks, before the work starts, that a confidence of a bundle can be fitted on the references.

    If ``references`` is None, nothing is checked.

    Raises:
        BundleError: The bundle generates no captions.
        DataError: Only some of the references have questions.
    """
    if references is not None:
        captioning_prompt(bundle)
        _check(references)


def _check(references: References) -> bool:
    """Returns whether the references have questions; raises DataError if only some of them have a question."""
    asked = {bool(item.question) for item in references.items}
    if len(asked) > 1:
        raise DataError("expected captions or questions as references, got both", "run the command once for each")
    return True in asked


def _generated(
    captioner: Captioner, references: References, prompt: str | None, progress: Progress
) -> Iterator[tuple[Reference, CaptionResult | Blip2EdgeError]]:
    """Yields each reference with its generated text or its error.

    Only the pictures of one batch are in memory at a time.
    """
    items, size = references.items, references.batch_size
    for first in range(0, len(items), size):
        batch = items[first : first + size]
        opened: list[tuple[Reference, Any]] = []
        for item in batch:
            try:
                opened.append((item, item.open()))
            except ImageError as error:
                yield item, error
        prompts = [captioner.prompts.question(item.question) if item.question else prompt for item, _ in opened]
        results = captioner.caption_many(
            [picture for _, picture in opened],
            prompts=prompts,
            batch_size=size,
            return_exceptions=True,
            **references.options,
        )
        yield from zip((item for item, _ in opened), results, strict=True)
        progress(first + len(batch), len(items))


def _about(fitted: FittedMap, right: Any, rule: str) -> dict[str, Any]:
    """Returns how the map was fitted and the measured values, for the manifest and the report."""
    return {
        "kind": fitted.kind,
        "right_if": rule,
        "pictures": len(right),
        "right": int(right.sum()),
        "brier": dict(fitted.brier),
        "figures": figures(fitted.held_out, right),
    }


def _warnings(right: Any, broken: Sequence[str]) -> tuple[str, ...]:
    found = []
    if len(right) < ADVISED:
        found.append(f"at least {ADVISED} pictures with references are advised, got {len(right)}: the map is uncertain")
    least = min(int(right.sum()), int((~right).sum()))
    if least < ADVISED_EACH:
        kind = "right" if int(right.sum()) == least else "wrong"
        found.append(
            f"only {least} of {len(right)} texts are {kind}: what separates them from the others is uncertain; add "
            "pictures on which the model is sometimes right and sometimes wrong, as those of the application are"
        )
    return (*found, *_unreadable(broken))


def _unreadable(broken: Sequence[str]) -> tuple[str, ...]:
    """Returns the warning about pictures that cannot be read; empty if there are none."""
    return (f"{plural(len(broken), 'picture')} cannot be read; the first is {broken[0]}",) if broken else ()


def _write_reports(directory: Path, title: str, confidence: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Adds the confidence to ``report.json`` and ``report.html``, or creates these files.

    Returns:
        Hash and size of each of the two files, by name.
    """
    data, page = directory / REPORT, directory / REPORT_PAGE
    values: dict[str, Any] = {"schema_version": SCHEMA}
    if data.is_file():
        values = read_json(data, DataError)
    data.write_text(json.dumps({**values, "confidence": dict(confidence)}, allow_nan=False) + "\n", encoding="utf-8")
    before = page.read_text(encoding="utf-8") if page.is_file() else None
    page.write_text(with_section(before, title, confidence), encoding="utf-8")
    return {path.name: FileRecord.of(path) for path in (data, page)}
