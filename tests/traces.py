"""Shares one trace among the exports of equal modules: torch needs about three seconds for a graph of any size.

A trace holds no weights, so checkpoints of equal configs can share it. All workers of a test run share the files, as do
later runs of the same source.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import pytest

from tests.project import ROOT

if TYPE_CHECKING:
    from blip2edge.export.to_onnx import Traced

TRACED = ("model", "export", "blip2edge/bundle")
"""Folders with the code that a trace depends on."""

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript")
DAY_S = 24 * 3600


def trace_directory(cache: pytest.Cache) -> Path:
    """The directory of the traces of this source and these packages; removes those that got no trace for a day."""
    digest = hashlib.sha256(" ".join(map(version, PACKAGES)).encode())
    for folder in TRACED:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    parent = cache.mkdir("traces")
    directory = parent / digest.hexdigest()[:32]
    directory.mkdir(exist_ok=True)
    for old in parent.iterdir():  # another run may use a younger one
        if old != directory and time.time() - old.stat().st_mtime > DAY_S:
            shutil.rmtree(old, ignore_errors=True)
    return directory


def shared_directory(factory: pytest.TempPathFactory, name: str) -> Path:
    """A directory that all workers of this test run share."""
    base = factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    directory.mkdir(exist_ok=True)
    return directory


def share_traces(directory: Path) -> None:
    """Exports of this process keep their traces in a directory, and take those that are there."""
    from blip2edge.export import pipeline, to_onnx, verify

    def trace(module: Any, spec: Any) -> Traced:
        key = key_of(module, spec)
        file = directory / f"{key}.onnx"
        if key is not None and file.exists():
            return _read(file, module, spec)
        traced = to_onnx.trace(module, spec)
        if key is not None:
            _write(traced, file)
        return traced

    for user in (pipeline, verify):
        setattr(user, "trace", trace)  # noqa: B010


def key_of(module: Any, spec: Any) -> str | None:
    """Names all that a trace depends on: classes, attributes, tensors' shapes; None where a tensor has values."""
    import torch
    from torch import nn

    usual = vars(nn.Module()).keys()
    first: dict[int, str] = {}
    parts: list[str] = [torch.__version__, repr(spec)]
    for name, part in module.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(part).items() if key not in usual}
        parts += [name, _text(type(part).forward), _text(type(part)), _text(own)]
    for tensors in (module.named_parameters, module.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            if not tensor.is_meta:
                return None
            tied = first.setdefault(id(tensor), name)
            parts.append(f"{name} {tied} {tuple(tensor.shape)} {tensor.dtype}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _text(value: Any) -> str:
    """A text that is the same in every process; objects without a repr by their class and attributes."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.tolist()}"
    if isinstance(value, dict):
        return ", ".join(sorted(f"{_text(key)}: {_text(one)}" for key, one in value.items()))
    if isinstance(value, set | frozenset):
        return ", ".join(sorted(map(_text, value)))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, FunctionType):  # a test may have changed it
        return f"{value.__module__}.{value.__qualname__} {_text(value.__code__)}"
    if isinstance(value, CodeType):  # its repr has an address
        return f"{value.co_code.hex()} {value.co_names} {_text(value.co_consts)}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if repr(value) == object.__repr__(value):
        return f"{_text(type(value))} {_text(vars(value))}"
    text = repr(value)
    assert " at 0x" not in text, f"{text} is another text in each process, so that no trace would be shared"
    return text


def _write(traced: Traced, file: Path) -> None:
    import numpy as np
    import onnx_ir as ir

    model = traced.model.clone()
    for name, slot in traced.slots.items():  # a file has no initializers without values
        value = model.graph.initializers[name]
        assert value.dtype is not None
        value.const_value = ir.tensor(np.zeros(slot.shape, value.dtype.numpy()), name=name)
    own = file.with_name(f"{file.name}.{os.getpid()}")
    own.write_bytes(ir.to_proto(model).SerializeToString())
    own.with_suffix(".slots").write_text(repr({name: vars(slot) for name, slot in traced.slots.items()}))
    own.with_suffix(".slots").replace(file.with_suffix(".slots"))
    own.replace(file)  # the last: where it is, the other one is


def _read(file: Path, module: Any, spec: Any) -> Traced:
    import ast

    import onnx
    import onnx_ir as ir

    from blip2edge.export.to_onnx import Traced, WeightSlot

    module.eval()
    model = ir.from_proto(onnx.load_model_from_string(file.read_bytes()))
    values = ast.literal_eval(file.with_suffix(".slots").read_text())
    slots = {name: WeightSlot(**value) for name, value in values.items()}
    for name in slots:
        model.graph.initializers[name].const_value = None
    return Traced(model, spec, slots)
