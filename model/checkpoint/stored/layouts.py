"""Finds out whether a directory has the weights of a checkpoint, without torch."""

from __future__ import annotations

from pathlib import Path

from blip2edge.bundle.manifest import MANIFEST
from blip2edge.errors import CheckpointError, some

ADAPTER = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

OTHER_LAYOUTS = (
    (MANIFEST, "a bundle, which is exported already", "run it: blip2edge caption IMAGE -b BUNDLE"),
    ("adapter_model.*", "the weights of a PEFT adapter", "copy its adapter_config.json too"),
    (
        "pytorch_model*.bin",
        "pickled weights",
        "load and save them once with transformers, which writes safetensors: from_pretrained(A).save_pretrained(B)",
    ),
    ("model*.safetensors", "a variant or a shard without its index", f"copy {INDEX}, or rename the file to {WEIGHTS}"),
    ("*.gguf", "quantised weights (GGUF)", "give the checkpoint in floating point that they were made from"),
    ("tf_model.h5", "TensorFlow's weights", "load them with a transformers that reads them, and save safetensors"),
    ("flax_model.msgpack", "Flax' weights", "load them with a transformers that reads them, and save safetensors"),
    ("global_step*", "DeepSpeed's shards", "run its zero_to_fp32.py there with --safe_serialization"),
    ("pytorch_model_fsdp_*", "FSDP's shards", "run: accelerate merge-weights FOLDER DIRECTORY"),
)
"""Files with weights that are not supported: a glob pattern, what the files are, and the advice to the user."""


def has_weights(directory: Path) -> bool:
    """Returns whether a directory has the safetensors file of a model, or the index of its shards."""
    return (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()


def check_layout(directory: Path) -> None:
    """Raises CheckpointError if a directory has none of these: ``config.json``, weights, an adapter."""
    if not any((directory / name).is_file() for name in ("config.json", WEIGHTS, INDEX, ADAPTER)):
        raise no_weights(directory)


def no_weights(directory: Path) -> CheckpointError:
    """Makes the error for a directory without weights.

    The message names subfolders that have weights, or files with weights in another format.
    """
    problem = f"{directory} has no {WEIGHTS} and no {INDEX}"
    folders = _folders_with_weights(directory)
    if folders:
        return CheckpointError(
            f"{problem}, but weights or an adapter in {some([folder.name for folder in reversed(folders)])}",
            f"give the folder itself: {folders[-1]}",
        )
    for pattern, what, mend in OTHER_LAYOUTS:
        found = sorted(directory.glob(pattern))
        if found:
            return CheckpointError(f"{problem}, but {found[0].name}: {what}", mend)
    return CheckpointError(problem, "give a directory written by transformers' save_pretrained")


def _folders_with_weights(directory: Path) -> list[Path]:
    """Returns the subfolders with weights or an adapter, sorted by step number (``checkpoint-500`` of a Trainer)."""
    marks = (WEIGHTS, INDEX, ADAPTER)
    found = [path for path in directory.glob("*/") if any((path / mark).is_file() for mark in marks)]
    return sorted(found, key=lambda path: (_step(path), path.name))


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
