"""``blip2edge eval``: scores a checkpoint or a bundle on generated scenes or on data from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.bundle.schema import BackendName
from blip2edge.choices import Ranking, Split
from blip2edge.errors import DataError, UsageError, option
from blip2edge.model.checkpoint.stored.files import local_checkpoint
from blip2edge.progress import ProgressCallback
from blip2edge.training.data.detect import detect_data
from blip2edge.training.data.entries import BrokenSamples, Entry, by_picture
from blip2edge.training.data.folder import read_pictures
from blip2edge.training.data.registry import read_entries
from blip2edge.training.evaluation.few_shots import Examples
from blip2edge.training.evaluation.models import JUDGES, MatchModel, ModelOptions, without_captions
from blip2edge.training.evaluation.open_model import check_prompt, open_clip, open_model
from blip2edge.training.evaluation.reader import TEMPLATE, Reader, check_template, open_reader
from blip2edge.training.evaluation.scoring import Figures, ScoringOptions, score_entries, score_scenes

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from blip2edge.runtime.decoding.options import CaptionOptions

SCENES = "scenes"
SCENES_COUNT = 1000  # pictures, by default
MAX_BROKEN = 100


def evaluate(
    model: str | Path,
    *,
    data: str | Path = SCENES,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    max_broken: int = MAX_BROKEN,
    split: Split = "heldout",
    count: int | None = None,
    metrics: Sequence[str] = (),
    prompt: str | None = None,
    top: int | None = None,
    ranking: Ranking = "probability",
    ask: bool = False,
    clip: str | Path | None = None,
    reader: str | Path | None = None,
    reader_prompt: str | None = None,
    shots: int = 0,
    shots_from: str | Path | None = None,
    predictions: bool = False,
    backend: BackendName = "auto",
    threads: int | None = None,
    batch_size: int = 16,
    require_signature: str | Path | None = None,
    progress: ProgressCallback | None = None,
    **generation: Unpack[CaptionOptions],
) -> Figures:
    """Scores a checkpoint or a bundle.

    Args:
        model: The directory of a checkpoint or of a bundle.
        data: ``scenes``, generated pictures; or COCO's JSON of captions or of VQA questions, a folder of pictures with
            texts, tar shards, or a recipe with a section ``[data]``.
        images: Directory of a JSON file's pictures; None for the directory of the file.
        annotations: File of the answers to VQA's questions; None for the file in the directory of the questions.
        max_broken: Largest number of missing or broken samples.
        split: Which scenes: ``heldout``, with pairs of objects that training never shows, or ``train``.
        count: Number of pictures; None for 1000 scenes, or for all pictures of a file.
        metrics: Names of metrics; empty for all that the model and the data support.
        prompt: Prompt of the captions; None for the model's default prompt.
        top: In retrieval, the number of nearest texts (and pictures) that the matching head ranks again. 0: none. None:
            16, or 128 with the ranking ``lavis``.
        ranking: Score by which the matching head ranks: ``probability`` is the head's probability; ``lavis`` is the
            head's logit plus the cosine.
        ask: Whether POPE's questions are given to the model; otherwise its captions answer them.
        clip: A bundle or checkpoint that compares pictures with texts (CLIP), for CLIPScore of the captions. With it, a
            folder of pictures without texts can be scored too.
        reader: A bundle or a checkpoint whose language model answers the questions of the data from the captions alone.
        reader_prompt: The reader's prompt, with ``{caption}`` and ``{question}``; None for the default.
        shots: Number of examples before each caption or question, for a model that takes several pictures in one text.
        shots_from: Data that the few-shot examples are drawn from; None for the other pictures of `data`.
        predictions: Whether the result contains ``predictions``, the generated texts in COCO's result format.
        backend: Name of a bundle's backend, or ``auto``; for a checkpoint, which runs in torch, ``auto``, ``cpu`` or
            ``cuda``.
        threads: CPU threads; None for all cores.
        batch_size: Number of pictures in one batch.
        require_signature: Public key; the bundles of `model`, `clip` and `reader` must have a signature that this key
            verifies.
        progress: Called with ("scoring", pictures done, all pictures).
        **generation: Fields of ``GenerationOptions``; ``draft`` and ``abstain_below`` need a bundle.

    Returns:
        The scores by name, as ``blip2edge eval --json`` prints them.

    Raises:
        UsageError: An option is out of range, or the model or the data do not support it.
        BundleError: ``model`` is neither a checkpoint nor a bundle.
        DataError: The data cannot be read, or more than `max_broken` samples are broken.
        CheckpointError: A checkpoint is missing or cannot be read.
        BackendError: The backend is not installed, or does not run on this machine.
    """
    judges = {"clip": clip, "reader": reader}
    _check_combinations(str(data), count, metrics, judges, reader_prompt)
    for judge in (clip, reader):
        if judge is not None:
            local_checkpoint(judge)  # one that is missing is refused before a model is loaded
    entries: tuple[list[Entry], BrokenSamples] | None = None
    if data != SCENES:
        entries = _read(str(data), images, annotations, max_broken, count, alone=clip is not None)
    shared = ModelOptions(backend, threads, batch_size, require_signature=require_signature)
    scored = open_model(Path(model), replace(shared, generation=dict(generation)))
    captions = entries is None or reader is not None or not any(entry.question for entry in entries[0][:1])
    if scored.captioner is not None and captions:
        check_prompt(scored.captioner, Path(model), prompt)
    opened = _judges(clip, reader, reader_prompt, shared)
    if predictions and (entries is None or scored.captioner is None):
        raise UsageError(
            f"{option('predictions')} needs a captioner and a data set from files", f"leave {option('predictions')} out"
        )
    report = progress or (lambda stage, done, total: None)
    examples = _examples(shots, shots_from, None if entries is None else entries[0], max_broken)
    wanted = ScoringOptions(
        tuple(metrics), prompt, top, ranking, ask, *opened, examples, lambda done, total: report("scoring", done, total)
    )
    if entries is None:
        return score_scenes(scored, count or SCENES_COUNT, split, wanted)
    figures = score_entries(scored, *entries, wanted)
    return figures if predictions else {key: value for key, value in figures.items() if key != "predictions"}


def _check_combinations(
    data: str,
    count: int | None,
    metrics: Sequence[str],
    judges: Mapping[str, str | Path | None],
    reader_prompt: str | None,
) -> None:
    """Refuses options that do not fit together, before the data is read and a model is loaded.

    Args:
        data: Name or path of the data.
        count: Number of pictures.
        metrics: Names of metrics; empty for all.
        judges: The models that score captions, by the name of their option (``clip``, ``reader``); a metric has the
            same name.
        reader_prompt: Prompt of the reader.

    Raises:
        UsageError: ``count`` is below 2 for scenes, a metric needs a model that is not given, a model is given without
            its metric, or ``reader_prompt`` is given without ``reader``.
    """
    if data == SCENES and count is not None and count < 2:
        raise UsageError(f"expected {option('count')} to be at least 2 pictures, got {count}")
    for name, judge in judges.items():
        if name in metrics and judge is None:
            raise UsageError(
                f"the metric {name} needs a model that scores captions, and {option(name)} is not given",
                f"name the model: {JUDGES[name]}",
            )
        if judge is not None and metrics and name not in metrics:
            raise UsageError(
                f"{option(name)} is given, but {option('metrics')} has no {name}",
                f"add {name} to {option('metrics')}, or leave {option(name)} out",
            )
    if reader_prompt is not None:
        if judges["reader"] is None:
            raise UsageError(
                f"{option('reader_prompt')} needs {option('reader')}",
                f"name the model that reads: {option('reader')} MODEL",
            )
        check_template(reader_prompt)


def _examples(
    shots: int, shots_from: str | Path | None, entries: list[Entry] | None, max_broken: int
) -> Examples | None:
    """Reads the data from which few-shot examples are drawn; returns None if `shots` is 0.

    Raises:
        UsageError: `shots_from` is given, but `shots` is 0.
    """
    if not shots:
        if shots_from is not None:
            raise UsageError(
                f"{option('shots_from')} needs {option('shots')}", f"give the number of examples: {option('shots')} K"
            )
        return None
    if shots_from is not None:
        entries = _read(str(shots_from), None, None, max_broken, None, alone=False)[0]
    return Examples(entries or [], shots)


def _judges(
    clip: str | Path | None, reader: str | Path | None, reader_prompt: str | None, options: ModelOptions
) -> tuple[MatchModel | None, Reader | None]:
    """Opens the models that score captions: the model for CLIPScore, and the reader. Each may be None.

    Raises:
        UsageError: A model is of the wrong kind, or a signature is required and a model is a checkpoint.
    """
    matcher = None if clip is None else open_clip(Path(clip), options)
    read = None if reader is None else open_reader(Path(reader), options, reader_prompt or TEMPLATE)
    return matcher, read


def _read(
    data: str,
    images: str | Path | None,
    annotations: str | Path | None,
    max_broken: int,
    count: int | None,
    *,
    alone: bool,
) -> tuple[list[Entry], BrokenSamples]:
    """Reads the samples of the first `count` pictures; returns them and the broken samples.

    If `alone` is True, pictures may have no texts.
    """
    config, base = detect_data(data, _text(images), _text(annotations), max_broken)
    if config.kind == "folder":
        broken = BrokenSamples(data, config.max_broken)
        pictures = read_pictures(base / config.path, broken)
        if pictures and alone:
            return pictures[:count], broken
        if pictures:
            raise without_captions(DataError, data, len(pictures), len(pictures))
    found, broken = read_entries(config, base=base)
    entries = list(found)
    if count is not None:
        entries = [entry for shown in by_picture(entries)[:count] for entry in shown.entries]
    return entries, broken


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
