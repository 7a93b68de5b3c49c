"""Merges PEFT adapters into the tensors of their base checkpoint, one layer at a time.

``adapter_config.json`` beside the weights, or in a folder of its own, describes an adapter: LoRA or a similar method.
transformers' ``from_pretrained`` applies it. Here the library peft builds the same layers on a model without weights
(every parameter is one zero, expanded). When a tensor of a layer is read, the layer gets its weights, peft merges the
adapter into them, and the weights are removed again.
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2edge.errors import CheckpointError, MissingPackageError, UnsupportedModelError, one_line, option, some
from blip2edge.model.checkpoint.adapters.layers import (
    ADAPTER_NAME,
    INITS,
    Merged,
    adapted_layers,
    cannot_merge,
    check_each_kind,
    replaced_tensors,
)
from blip2edge.model.checkpoint.stored.files import cached_checkpoint, read_checkpoint_json
from blip2edge.model.checkpoint.stored.layouts import has_weights
from blip2edge.model.checkpoint.stored.pickled import read_pickled
from blip2edge.model.checkpoint.stored.tensors import TensorFiles, open_safetensors
from blip2edge.packages import require
from blip2edge.reading import reading

ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

MERGED_TYPES = (
    "LORA",
    "ADALORA",
    "BOFT",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LOHA",
    "LOKR",
    "OFT",
    "TRAINABLE_TOKENS",
    "VERA",
)
"""The values of ``peft_type`` that are merged. Each is compared with peft in the tests."""

REFUSED_INITS = ("pissa_", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` (or the beginnings of values) that are refused.

With these values, peft changed the base's weights before the training. The change cannot be repeated, because it is
random or needs training data.
"""

REFUSED_KEYS = {
    "alora_invocation_tokens": "limit it to a part of each text",
    "layer_replication": "repeats layers of the model",
    "arrow_config": "chooses among several adapters for each token",
}
"""Keys of ``adapter_config.json`` that are refused if they have a value, and what each key does."""


def has_adapter(directory: Path) -> bool:
    """Returns whether a directory holds an adapter, alone or together with weights."""
    return (directory / ADAPTER_CONFIG).is_file()


def base_of(directory: Path, base: Path | None) -> Path:
    """Returns the directory with the weights that an adapter changes.

    As in transformers, it is the adapter's own directory if that has weights; else the checkpoint that
    ``base_model_name_or_path`` names, if it is on this machine. Nothing is downloaded.

    Args:
        directory: The adapter's directory.
        base: The directory that the user names; it has priority.

    Raises:
        CheckpointError: There is no such directory, or the base has an adapter too.
    """
    found = base
    if found is None and (directory / "config.json").is_file() and has_weights(directory):
        return directory
    if found is None:
        found = _named_base(directory)
    if has_adapter(found) and found.resolve() != directory.resolve():
        raise CheckpointError(
            f"the base {found} of the adapter {directory} is an adapter itself ({ADAPTER_CONFIG}), and only one "
            "adapter can be merged",
            f"merge the adapter in {found} first: load it with PEFT, then merge_and_unload() and save_pretrained",
        )
    return found


def _named_base(directory: Path) -> Path:
    name = read_checkpoint_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    places = [Path(str(name)).expanduser(), directory / str(name)] if name else []
    for place in places:
        if place.is_dir() and place.resolve() != directory.resolve():
            return place
    cached = cached_checkpoint(str(name)) if name else None
    if cached is not None:
        return cached
    named = f"its base {name} is not on this machine" if name else f"{ADAPTER_CONFIG} names no base"
    raise CheckpointError(
        f"{directory} holds a PEFT adapter without the weights that it changes ({ADAPTER_CONFIG}), and {named}",
        f"give the model that it was trained on: {option('base')} DIRECTORY, or a hub name",
    )


def merged_tensors(directory: Path, base: Path, architecture: str, files: TensorFiles, rename: Any) -> Merged:
    """Merges an adapter into the tensors of its base. A tensor is merged only when it is read.

    Args:
        directory: The adapter's directory.
        base: The directory with the model's ``config.json``.
        architecture: Name of the model's class in transformers.
        files: The base's tensors.
        rename: Function that converts the name of a parameter in transformers to the name of its tensor in ``files``.

    Returns:
        For each tensor that the adapter changes, by name: its shape, and a function that returns the merged tensor.

    Raises:
        MissingPackageError: peft is not installed.
        CheckpointError: The adapter cannot be merged, or does not fit the base.
    """
    path = directory / ADAPTER_CONFIG
    _check_file(directory)
    hint = "; or merge the adapter where it was trained: merge_and_unload() of the PEFT model, then save_pretrained"
    require("peft", f"merging the adapter of {path}", MissingPackageError, hint=hint)
    config = _adapter_config(path)
    init = INITS.get(str(config.__dict__.get("init_lora_weights")).lower())
    if init is not None:
        config.init_lora_weights = True
    model = _with_adapter(_empty_model(base, architecture, path), config, directory)
    layers = list(adapted_layers(model, files, rename, init))
    check_each_kind(layers, path)
    changed = replaced_tensors(model, rename)
    for layer in layers:
        changed |= layer.tensors()
    return changed


def _check_file(directory: Path) -> None:
    """Checks that the file with an adapter's weights exists and can be read; peft searches the hub for a missing file.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    found = next((path for name in WEIGHT_FILES if (path := directory / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{directory} has an {ADAPTER_CONFIG}, but no {' and no '.join(WEIGHT_FILES)}",
            "copy the adapter's weights too, or remove its config if the weights beside it are merged",
        )
    if found.suffix == ".bin":
        read_pickled(found)
    else:
        open_safetensors(found).__exit__(None, None, None)


def _adapter_config(path: Path) -> Any:
    """Reads ``adapter_config.json`` with peft.

    Raises:
        CheckpointError: This type of adapter cannot be merged, or the installed peft does not support a key in it.
    """
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    values = read_checkpoint_json(path)
    kind = str(values.get("peft_type")).upper()
    if kind not in MERGED_TYPES:
        raise cannot_merge(path, f"its peft_type is {values.get('peft_type')!r}; merged are {', '.join(MERGED_TYPES)}")
    init = str(values.get("init_lora_weights", True)).lower()
    if init.startswith(REFUSED_INITS):
        raise cannot_merge(path, f"init_lora_weights {init!r} changed the weights of its base too")
    for key, reason in REFUSED_KEYS.items():
        if values.get(key):
            raise cannot_merge(path, f"{key} {reason}")
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    unknown = sorted(name for name, value in values.items() if name not in known and value)
    if unknown:
        raise CheckpointError(
            f"{path} has keys that the installed peft does not know: {some(unknown)}",
            "update it: pip install -U peft",
        )
    explain = partial(_unread, path)
    with reading(path, "an adapter", CheckpointError, explain=explain), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(str(path.parent))
    config.task_type = None  # it decides how a model is trained, not which layers change
    config.inference_mode = True
    return config


def _unread(path: Path, error: Exception) -> CheckpointError:
    return cannot_merge(path, one_line(error))


def _empty_model(base: Path, architecture: str, path: Path) -> nn.Module:
    """Builds transformers' model without weights: each parameter is a single zero, expanded to the parameter's shape.

    Raises:
        UnsupportedModelError: transformers has no such class.
    """
    import transformers

    found = getattr(transformers, architecture, None)
    if found is None:
        raise UnsupportedModelError(
            f"the adapter of {path} cannot be merged: transformers has no class {architecture}",
            "merge it where it was trained: merge_and_unload() of the PEFT model, then save_pretrained",
        )
    try:
        with torch.device("meta"):
            model: nn.Module = found(transformers.AutoConfig.from_pretrained(base, local_files_only=True))
    except Exception as error:  # transformers raises ValueError, OSError, KeyError and more
        raise cannot_merge(
            path, f"transformers makes no {architecture} of {base / 'config.json'} ({one_line(error)})"
        ) from error
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                module._parameters[name] = empty.setdefault(id(parameter), nn.Parameter(zero, requires_grad=False))
    return model


def _with_adapter(model: nn.Module, config: Any, directory: Path) -> nn.Module:
    """Adds the adapter's layers and their tensors to a model; returns the new model.

    Raises:
        CheckpointError: The adapter's tensors do not fit the model.
    """
    from peft import PeftModel

    path = directory / ADAPTER_CONFIG
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for training, and about ties, which are resolved later
            wrapped = PeftModel(model, config, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
            result = wrapped.load_adapter(str(directory), ADAPTER_NAME, torch_device="cpu", low_cpu_mem_usage=True)
    except Exception as error:  # peft and torch raise several kinds for an adapter that does not fit
        raise CheckpointError(
            f"the adapter of {path} does not fit its base ({one_line(error)})",
            f"give the model that it was trained on: {option('base')} DIRECTORY, or a hub name",
        ) from error
    wrong = {"lacks": result.missing_keys, "holds unknown tensors:": result.unexpected_keys}
    for what, names in wrong.items():
        if names:
            raise CheckpointError(
                f"the adapter of {path} does not fit its base: it {what} {some(sorted(names))}",
                f"give the model that it was trained on: {option('base')} DIRECTORY, or a hub name",
            )
    base: nn.Module = wrapped.get_base_model()
    return base
