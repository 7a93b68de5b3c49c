"""Writes the token table of a checkpoint to the bundle, and reads it back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from blip2edge.bundle.safetensors_file import SafetensorsFile, StoredTensor, write_safetensors
from blip2edge.bundle.schema import EMBEDDINGS_TENSOR
from blip2edge.errors import ExportError
from blip2edge.export.to_onnx import WeightSlot
from blip2edge.export.weights import to_bytes

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_token_table(table: Tensor, parameter: str, path: Path, dtype: torch.dtype) -> None:
    """Writes a table.

    Args:
        table: ``[V, D]``, as the checkpoint has it.
        parameter: Its name, for errors.
        path: The file.
        dtype: float32, float16 or bfloat16.

    Raises:
        ExportError: A value is not finite, or does not fit the dtype.
        OSError: The disk is full.
    """
    stored = StoredTensor(NAMES[dtype], tuple(table.shape))
    write_safetensors(path, {EMBEDDINGS_TENSOR: stored}, [_bytes(table, parameter, dtype)])


def check_token_table(table: Tensor, parameter: str, path: Path, dtype: torch.dtype) -> None:
    """Reads a written table back and compares it with the checkpoint's.

    Raises:
        ExportError: It differs.
    """
    written = SafetensorsFile(path).array(EMBEDDINGS_TENSOR)
    if hashlib.sha256(written.data).digest() != hashlib.sha256(_bytes(table, parameter, dtype)).digest():
        raise ExportError(f"{path} does not hold the weight {parameter} as the checkpoint has it")


def _bytes(table: Tensor, parameter: str, dtype: torch.dtype) -> memoryview:
    return to_bytes(table, WeightSlot(parameter, tuple(table.shape)), dtype)
