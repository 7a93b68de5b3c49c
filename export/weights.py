"""Writes the weights of a graph to its data file, and the token embedding table to another file.

One tensor at a time is read from the mapped checkpoint, transposed, cast, hashed, written and released. So memory holds
one tensor, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from blip2edge.bundle.safetensors_file import SafetensorsFile, StoredTensor, write_safetensors
from blip2edge.bundle.schema import EMBEDDINGS_TENSOR
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.errors import ExportError, option
from blip2edge.export.to_onnx import Traced, WeightSlot

PAGE = 4096  # bytes: a large tensor starts on one, so that a runtime can map it
LINE = 64  # bytes: a small one starts on a cache line
LARGE = 1 << 20  # bytes
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Placed:
    """Offset and length of a tensor in a graph's data file, in bytes."""

    offset: int  # bytes
    length: int  # bytes


@dataclass(frozen=True)
class Weights:
    """The written weights of a graph: the data file, its size and hash, and the place of each tensor in the file."""

    file: Path
    record: FileRecord
    placed: Mapping[str, Placed]


def write_weights(
    traced: Traced,
    read: Callable[[str], Tensor],
    file: Path,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Writes every weight of a graph to ``file``, and makes the graph's initializers refer to this file.

    Args:
        traced: A graph without weights.
        read: Function that returns a parameter of the checkpoint, by its name in this project's model.
        file: The graph's data file.
        dtype: dtype of the floating weights.
        progress: Called with tensors done and tensors in all.

    Raises:
        ExportError: A weight is not finite, or is too large for the dtype.
        OSError: The disk is full.
    """
    whole = hashlib.sha256()
    placed: dict[str, Placed] = {}
    offset = 0
    with file.open("wb") as out:
        for done, (name, slot) in enumerate(traced.slots.items()):
            data = to_bytes(read(slot.parameter), slot, dtype)
            padding = bytes(-offset % (PAGE if len(data) >= LARGE else LINE))
            for piece in (padding, data):
                out.write(piece)
                whole.update(piece)
            offset += len(padding)
            placed[name] = Placed(offset, len(data))
            offset += len(data)
            if progress is not None:
                progress(done + 1, len(traced.slots))
        out.flush()
        os.fsync(out.fileno())
    point_at(traced, file, placed)
    return Weights(file, FileRecord(whole.hexdigest(), offset), placed)


def to_bytes(tensor: Tensor, slot: WeightSlot, dtype: torch.dtype) -> memoryview:
    """Returns the bytes of a weight as the graph's data file stores them.

    The weight is transposed if ``slot.transposed`` is true, cast, and made contiguous. A bf16 value is stored as its 16
    bits.

    Raises:
        ExportError: The weight has values that are not finite, or that are too large for the dtype.
    """
    converted = (tensor.t() if slot.transposed else tensor).to(dtype).contiguous()
    if tensor.is_floating_point() and not bool(torch.isfinite(converted.sum(dtype=torch.float32))):
        _explain_not_finite(tensor, slot, dtype)
    return (converted.view(torch.int16) if dtype == torch.bfloat16 else converted).numpy().data.cast("B")


def _explain_not_finite(tensor: Tensor, slot: WeightSlot, dtype: torch.dtype) -> None:
    """Raises ExportError if a value is not finite or too large for the dtype; does nothing if all values are correct.

    The caller tests only the sum of all values. The sum may overflow although every value is correct.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise ExportError(
            f"the weight {slot.parameter} holds values that are not finite",
            "use another checkpoint: the training of this one diverged",
        )
    largest, limit = float(tensor.abs().max()), torch.finfo(dtype).max
    if largest > limit:
        raise ExportError(
            f"the weight {slot.parameter} reaches {largest:.6g}, beyond the {limit:.6g} of {str(dtype)[6:]}",
            f"export with {option('precision')} " + ("bf16 or fp32" if dtype == torch.float16 else "fp32"),
        )


def point_at(traced: Traced, file: Path, placed: Mapping[str, Placed]) -> None:
    """Makes each initializer of a graph refer to its bytes in ``file``."""
    for name in traced.slots:
        value = traced.model.graph.initializers[name]
        if value.dtype is None or value.shape is None:
            raise ExportError(f"the initializer {name} has no type")
        value.const_value = ir.ExternalTensor(
            file.name, placed[name].offset, placed[name].length, value.dtype, shape=value.shape, name=name,
            base_dir=file.parent,
        )  # fmt: skip


def check_hashes(weights: Weights, read: Callable[[str], Tensor], traced: Traced, dtype: torch.dtype) -> int:
    """Reads every written weight back and compares it with the checkpoint's.

    Returns:
        The number of weights.

    Raises:
        ExportError: A weight differs.
    """
    with weights.file.open("rb") as file:
        for name, slot in traced.slots.items():
            place = weights.placed[name]
            file.seek(place.offset)
            written = hashlib.sha256(file.read(place.length)).hexdigest()
            wanted = hashlib.sha256(to_bytes(read(slot.parameter), slot, dtype)).hexdigest()
            if written != wanted:
                raise _differs(name, weights.file)
    return len(traced.slots)


def write_token_table(table: Tensor, parameter: str, path: Path, dtype: torch.dtype) -> None:
    """Writes the token embedding table to a safetensors file.

    Args:
        table: The table ``[V, D]`` in the checkpoint's dtype.
        parameter: Name of the parameter, for errors.
        path: The file.
        dtype: dtype of the written values: float32, float16 or bfloat16.

    Raises:
        ExportError: A value is not finite, or is too large for the dtype.
        OSError: The disk is full.
    """
    stored = StoredTensor(SAFETENSORS_DTYPES[dtype], tuple(table.shape))
    write_safetensors(path, {EMBEDDINGS_TENSOR: stored}, [_bytes(table, parameter, dtype)])


def check_token_table(table: Tensor, parameter: str, path: Path, dtype: torch.dtype) -> None:
    """Reads the written token embedding table back and compares it with the checkpoint's.

    Raises:
        ExportError: A value differs.
    """
    written = SafetensorsFile(path).array(EMBEDDINGS_TENSOR)
    if hashlib.sha256(written.data).digest() != hashlib.sha256(_bytes(table, parameter, dtype)).digest():
        raise _differs(parameter, path)


def _differs(parameter: str, path: Path) -> ExportError:
    return ExportError(
        f"the weight {parameter} in {path} differs from the checkpoint", "export again; if this error stays, report it"
    )


def _bytes(table: Tensor, parameter: str, dtype: torch.dtype) -> memoryview:
    return to_bytes(table, WeightSlot(parameter, tuple(table.shape)), dtype)
