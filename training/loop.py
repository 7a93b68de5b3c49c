"""A whole training run: recipe in, checkpoint directory out."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from blip2edge import __version__
from blip2edge.errors import ConfigError, OutputError
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint import load_checkpoint
from blip2edge.progress import ProgressCallback
from blip2edge.training.batches import CaptionBatch, Collator, pixel_values, scene_batches
from blip2edge.training.captioning import CheckpointCaptioner
from blip2edge.training.config import TrainingConfig, config_hash, load_config
from blip2edge.training.evaluate import CaptionMany, evaluate_scenes
from blip2edge.training.miniature import build_miniature, write_checkpoint
from blip2edge.training.optim import Log, fit, freeze
from blip2edge.training.pretrain import DenseLabels, dense_labels, language_loss, make_dense_head, vision_loss
from blip2edge.training.scenes import Scene
from blip2edge.training.stages import match_scale, prepare_stage2, stage2_loss

# Each phase reads a series of scenes of its own; the offsets keep them apart for any seed of the recipe.
_VISION, _LANGUAGE, _STAGE2, _PHASES = 0, 1, 2, 3
RECORD = "training.json"  # beside the weights: how they came about


def _silent(_: str) -> None:
    """Takes a line and drops it."""


def _series(config: TrainingConfig, phase: int) -> int:
    """The series of scenes of a phase."""
    return config.seed * _PHASES + phase


def pretrain_vision(
    model: CaptionerModel,
    config: TrainingConfig,
    log: Log = _silent,
    progress: ProgressCallback | None = None,
) -> list[float]:
    """Trains the picture encoder on dense labels, then freezes it.

    Args:
        model: Changed in place.
        config: The recipe.
        log: Takes one line at a time.
        progress: Called with (phase, steps done, steps).

    Returns:
        The loss of every step.
    """
    patch = config.model.patch_size
    torch.manual_seed(config.seed)  # the head, which is dropped at the end, is drawn by torch
    head = make_dense_head(config.model.vision.hidden_size)

    def batches() -> Iterator[tuple[Tensor, DenseLabels]]:
        for batch in scene_batches(config.vision.batch_size, seed=_series(config, _VISION)):
            yield pixel_values(batch), dense_labels(batch, patch)

    loss = vision_loss(model.vision, head, config.vision.shape_weight)
    losses = fit("vision", [model.vision, head], batches(), loss, config.vision, log, progress)
    freeze(model.vision)
    return losses


def pretrain_language(
    model: CaptionerModel,
    tokenizer: Tokenizer,
    config: TrainingConfig,
    log: Log = _silent,
    progress: ProgressCallback | None = None,
) -> list[float]:
    """Trains the language model on captions behind a prefix, then freezes it.

    Args:
        model: Changed in place.
        tokenizer: Of the same vocabulary.
        config: The recipe.
        log: Takes one line at a time.
        progress: Called with (phase, steps done, steps).

    Returns:
        The loss of every step.
    """
    series = _series(config, _LANGUAGE)
    draw = torch.Generator().manual_seed(series)
    loss = language_loss(model.language, config.language, draw)  # type: ignore[arg-type]  # an OPTDecoder
    batches = _captions(tokenizer, config, config.language.batch_size, series)
    losses = fit(
        "language", [model.language], (texts for _, texts in batches), loss, config.language, log, progress
    )
    freeze(model.language)
    return losses


def train_bridge(
    model: CaptionerModel,
    tokenizer: Tokenizer,
    config: TrainingConfig,
    log: Log = _silent,
    progress: ProgressCallback | None = None,
) -> list[float]:
    """Stage 2 proper: only the bridge changes.

    Args:
        model: Changed in place.
        tokenizer: Of the same vocabulary.
        config: The recipe.
        log: Takes one line at a time.
        progress: Called with (phase, steps done, steps).

    Returns:
        The loss of every step.
    """
    match_scale(model)
    prepare_stage2(model)
    captions = _captions(tokenizer, config, config.stage2.batch_size, _series(config, _STAGE2))
    batches = ((pixel_values(batch), texts) for batch, texts in captions)
    losses = fit(
        "stage2",
        [model.bridge],
        batches,
        lambda batch: stage2_loss(model, *batch),
        config.stage2,
        log,
        progress,
    )
    model.eval()
    return losses


def _captions(
    tokenizer: Tokenizer, config: TrainingConfig, batch_size: int, series: int
) -> Iterator[tuple[list[Scene], CaptionBatch]]:
    """Endless batches of training scenes with their texts."""
    collate = Collator(tokenizer, config.data, config.model.num_query_tokens)
    rng = np.random.default_rng(series)
    for batch in scene_batches(batch_size, seed=series):
        yield batch, collate(batch, rng)


def _take_pretrained(model: CaptionerModel, directory: str) -> None:
    """Copies picture encoder and language model from a checkpoint.

    Raises:
        ConfigError: Its parts have other sizes than the recipe's.
    """
    given = load_checkpoint(directory)
    if (given.config.vision, given.config.language) != (model.config.vision, model.config.language):
        raise ConfigError(
            f"[stage2] pretrained: the parts of {directory} have other sizes than this recipe's [model]",
            "give the sizes of that checkpoint in [model], or leave pretrained empty",
        )
    model.vision.load_state_dict(given.vision.state_dict())
    model.language.load_state_dict(given.language.state_dict())


def _train_phases(
    config: TrainingConfig, log: Log, progress: ProgressCallback | None
) -> tuple[CaptionerModel, Tokenizer, dict[str, Any]]:
    """Runs the phases of a recipe; returns model, tokenizer and the figures of each phase."""
    model, tokenizer = build_miniature(config)
    figures: dict[str, Any] = {}

    def note(phase: str, losses: list[float], start: float) -> None:
        last = losses[-max(1, len(losses) // 20) :]
        figures[phase] = {
            "steps": len(losses),
            "final_loss": round(sum(last) / len(last), 5),
            "seconds": round(time.monotonic() - start, 1),
        }

    start = time.monotonic()
    if config.stage2.pretrained:
        _take_pretrained(model, config.stage2.pretrained)
    else:
        note("vision", pretrain_vision(model, config, log, progress), start)
        start = time.monotonic()
        note("language", pretrain_language(model, tokenizer, config, log, progress), start)
        start = time.monotonic()
    note("stage2", train_bridge(model, tokenizer, config, log, progress), start)
    return model, tokenizer, figures


def train_stage2(
    config_path: str | Path,
    out_dir: str | Path,
    *,
    log: Log | None = None,
    progress: ProgressCallback | None = None,
    force: bool = False,
    evaluation_scenes: int = 1000,
) -> dict[str, Any]:
    """Trains by a recipe and writes a checkpoint that transformers loads.

    The picture encoder and the language model are pretrained first, unless the recipe names a checkpoint
    that has them. The directory appears at the end, whole, or not at all.

    Args:
        config_path: The recipe, TOML.
        out_dir: The checkpoint directory to make.
        log: Takes one line at a time.
        progress: Called with (phase, steps done, steps).
        force: Replace `out_dir` where it exists.
        evaluation_scenes: Held-out scenes that the saved checkpoint is scored on; 0: none.

    Returns:
        The record, also saved in `out_dir` as `training.json`: seconds and losses of each phase, the
        scores, the hash of the recipe, versions and machine.

    Raises:
        ConfigError: The recipe is wrong.
        OutputError: `out_dir` exists, or cannot be written.
        DataError: A loss is not finite.
        CheckpointError: The pretrained checkpoint cannot be read.
    """
    say = log if log is not None else _silent
    config = load_config(config_path)
    target = Path(out_dir)
    if target.exists() and not force:
        raise OutputError(f"{target} exists already", "give another directory, or replace it with --force")
    torch.set_num_threads(config.threads)
    start = time.monotonic()
    clock = time.process_time()
    model, tokenizer, figures = _train_phases(config, say, progress)
    record: dict[str, Any] = {
        "config": Path(config_path).name,
        "config_sha256": config_hash(config),
        "seed": config.seed,
        "phases": figures,
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(time.process_time() - clock, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {
            "blip2edge": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": {"processor": platform.machine(), "system": platform.system(), "threads": config.threads},
    }
    _publish(model, tokenizer, config, target, record, evaluation_scenes)
    scores = record.get("heldout")
    if scores:
        say(f"heldout: exact match {scores['exact_match']:.4f}, shuffled {scores['shuffled_match']:.4f}")
    return record


def _publish(
    model: CaptionerModel,
    tokenizer: Tokenizer,
    config: TrainingConfig,
    target: Path,
    record: dict[str, Any],
    evaluation_scenes: int,
) -> None:
    """Writes a temporary sibling, scores what was written, and renames it to `target`."""
    dtype = {"float16": torch.float16, "float32": torch.float32}[config.weights_dtype]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            fresh = Path(temporary) / "checkpoint"
            fresh.mkdir()
            write_checkpoint(model, tokenizer, fresh, dtype)
            if evaluation_scenes:
                record["heldout"] = evaluate_scenes(CheckpointCaptioner.load(fresh), evaluation_scenes)
            (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            _swap(fresh, target, Path(temporary) / "old")
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error}", "give a directory on a disk with room"
        ) from error


def _swap(fresh: Path, target: Path, old: Path) -> None:
    """Puts `fresh` in the place of `target`; when that fails or is interrupted, what was there comes back."""
    if target.exists():
        target.replace(old)
    try:
        fresh.replace(target)
    except BaseException:
        if old.exists():
            old.replace(target)
        raise


def checkpoint_captioner(directory: str | Path, batch_size: int = 16) -> CaptionMany:
    """What `evaluate_scenes` wants, for a checkpoint.

    Args:
        directory: A checkpoint directory.
        batch_size: Pictures at once.

    Returns:
        From pictures to captions, in order; greedy, empty prompt.

    Raises:
        CheckpointError: The directory cannot be read.
    """
    captioner = CheckpointCaptioner.load(directory)

    def caption_many(pictures: Sequence[Image.Image]) -> list[str]:
        chunks = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
        return [text for chunk in chunks for text in captioner(chunk)]

    return caption_many
