"""The token table's file: one safetensors tensor, which a runtime maps into memory.

The format is written here as it is read in ``blip2edge/bundle/token_table.py``, so that a table goes through the same
checks as any other weight, and a full disk tells itself the same way:
https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from blip2edge.bundle.publishing import output_error
from blip2edge.bundle.schema import EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import HEADER_LENGTH
from blip2edge.errors import ExportError
from blip2edge.export.to_onnx import WeightSlot
from blip2edge.export.weights import to_bytes

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNMENT = 8  # bytes: the header is filled up with spaces, so that the tensor starts on such an address


def write_token_table(table: Tensor, parameter: str, path: Path, dtype: torch.dtype) -> None:
    """Writes a table.

    Args:
        table: ``[V, D]``, as the checkpoint has it.
        parameter: Its name, for errors.
        path: The file.
        dtype: float32, float16 or bfloat16.

    Raises:
        ExportError: A value is not finite, or does not fit the dtype.
        OutputError: The disk is full.
    """
    data = _bytes(table, parameter, dtype)
    try:
        with path.open("wb") as file:
            file.write(_header(table, dtype, len(data)))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise output_error(path, error) from error


def check_token_table(table: Tensor, parameter: str, path: Path, dtype: torch.dtype) -> None:
    """Reads a written table back and compares it with the checkpoint's.

    Raises:
        ExportError: It differs.
    """
    data = _bytes(table, parameter, dtype)
    wanted = hashlib.sha256(_header(table, dtype, len(data)))
    wanted.update(data)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").digest() != wanted.digest():
            raise ExportError(f"{path} does not hold the weight {parameter} as the checkpoint has it")


def _bytes(table: Tensor, parameter: str, dtype: torch.dtype) -> memoryview:
    return to_bytes(table, WeightSlot(parameter, tuple(table.shape)), dtype)


def _header(table: Tensor, dtype: torch.dtype, length: int) -> bytes:
    entry = {"dtype": NAMES[dtype], "shape": list(table.shape), "data_offsets": [0, length]}
    header = json.dumps({EMBEDDINGS_TENSOR: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return len(header).to_bytes(HEADER_LENGTH, "little") + header
