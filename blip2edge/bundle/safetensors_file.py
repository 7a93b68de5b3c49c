"""safetensors files: mapped into memory to be read, and written in pieces.

A file is 8 bytes with the length of a JSON header, the header, and the bytes of the tensors one after the other
(https://github.com/huggingface/safetensors, "Format").

The safetensors library writes checkpoints and snapshots (``model/``, ``training/``). Bundles have their own writer, for
three reasons. ``build`` writes a token table on boards where the library is not installed. Large tables are quantised
and written a few thousand rows at a time, but the library takes whole tensors. And the library's errors lack the
operating system's error number, which identifies a full disk.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array

HEADER_LENGTH = 8  # bytes: a little-endian unsigned integer, the length of the header that follows
PAGE = 4096  # bytes: tensors begin on a memory page, so that a runtime can map them
METADATA = "__metadata__"
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
"""By the format's names; bfloat16 as its 16-bit patterns, which NumPy has no type for."""


@dataclass(frozen=True)
class StoredTensor:
    """Where and how a safetensors file stores one tensor.

    Attributes:
        dtype: Name of the dtype, a key of :data:`DTYPES`.
        shape: Shape of the tensor.
        offset: Position of the tensor's first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """A safetensors file, mapped into memory: only the parts of a tensor that are used are read from the disk.

    Args:
        path: The file.

    Attributes:
        tensors: Dtype, shape and offset of each tensor, by name.
        metadata: The text annotations in the file's header.

    Raises:
        OSError, ValueError, KeyError, TypeError: The file cannot be read, or is not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._content[:HEADER_LENGTH], "little")
        header = json.loads(self._content[HEADER_LENGTH : HEADER_LENGTH + length])
        first = HEADER_LENGTH + length
        self.metadata: Mapping[str, str] = header.pop(METADATA, {})
        self.tensors = {name: _stored(name, entry, first) for name, entry in header.items()}

    def array(self, name: str) -> Array:
        """Returns the tensor ``name`` as a read-only view of the mapped file."""
        tensor = self.tensors[name]
        return np.ndarray(tensor.shape, DTYPES[tensor.dtype], self._content, tensor.offset)


def _stored(name: str, entry: Mapping[str, Any], first: int) -> StoredTensor:
    """A tensor by its entry in the header; raises ValueError if its length is not that of its shape."""
    start, end = entry["data_offsets"]
    tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), first + start)
    if tensor.nbytes != end - start:
        raise ValueError(
            f"expected {tensor.nbytes} bytes for {name} of shape {tensor.shape} and dtype {tensor.dtype}, got "
            f"{end - start}: the file is damaged or incomplete"
        )
    return tensor


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    pieces: Iterable[Array | memoryview],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file and flushes it to the disk (fsync).

    Args:
        path: The file.
        tensors: dtype and shape of each tensor, in the order in which the tensors are stored.
        pieces: The bytes of all tensors in the order of ``tensors``, cut into parts of any length.
        metadata: Text annotations.

    Raises:
        OSError: The file cannot be written.
        ValueError: ``pieces`` together do not have the size of the tensors.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + HEADER_LENGTH) % PAGE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(HEADER_LENGTH, "little") + text)
        written = sum(file.write(np.ascontiguousarray(piece).data) for piece in pieces)
        if written != end:
            raise ValueError(f"{path.name}: {written} bytes were given for tensors of {end} bytes")
        file.flush()
        os.fsync(file.fileno())
