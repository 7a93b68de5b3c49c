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
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.fields import Check, either, list_of, mapped, one_of_texts, record, text, whole
from blip2edge.errors import Blip2EdgeError, BundleError
from blip2edge.reading import parse_json, reading

HEADER_LENGTH = 8  # bytes: a little-endian unsigned integer, the length of the header that follows
MAX_HEADER = 100_000_000  # bytes: the format's own limit
PAGE = 4096  # bytes: tensors begin on a memory page, so that a runtime can map them
METADATA = "__metadata__"
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
"""NumPy dtype of each dtype name of the format. NumPy has no bfloat16, so BF16 is read as 16-bit integers."""


@dataclass(frozen=True)
class StoredTensor:
    """The entry of one tensor in a safetensors file: dtype, shape and position.

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
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """A safetensors file, mapped into memory: only the parts of a tensor that are used are read from the disk.

    Args:
        path: The file.
        error: Class of the error that is raised for a broken file.
        fix: What the user can do about a broken file.

    Attributes:
        tensors: Dtype, shape and offset of each tensor, by name.
        metadata: The text annotations in the file's header.

    Raises:
        BundleError: The file cannot be read, or is not a safetensors file.
    """

    def __init__(
        self, path: Path, error: type[Blip2EdgeError] = BundleError, fix: str | None = "copy the bundle again"
    ) -> None:
        with reading(path, "a safetensors file", error, fix):
            with path.open("rb") as file:
                self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            size = len(self._content)
            length = int.from_bytes(self._content[:HEADER_LENGTH], "little")
            first = HEADER_LENGTH + length
            if length > MAX_HEADER or first > size:
                problem = f"the header has {length} bytes, but the file has {size}"
                raise ValueError(f"{problem}: the file is damaged or incomplete")
            header = parse_json(self._content[HEADER_LENGTH:first], strict=True)
            _HEADER(header, "header")
            self.metadata: Mapping[str, str] = header.pop(METADATA, {})
            self.tensors = {name: _stored(name, entry, first) for name, entry in header.items()}
            _check_layout(self.tensors, size)
        self._missing = partial(_no_tensor, path, error, fix)

    def stored(self, name: str) -> StoredTensor:
        """Returns dtype, shape and position of the tensor ``name``.

        Raises:
            BundleError: The file has no such tensor.
        """
        if name not in self.tensors:
            raise self._missing(name)
        return self.tensors[name]

    def array(self, name: str) -> Array:
        """Returns the tensor ``name`` as a read-only view of the mapped file; raises the error of :meth:`stored`."""
        tensor = self.stored(name)
        return np.ndarray(tensor.shape, DTYPES[tensor.dtype], self._content, tensor.offset)


def _no_tensor(path: Path, error: type[Blip2EdgeError], fix: str | None, name: str) -> Blip2EdgeError:
    return error(f"{path} has no tensor {name}", fix)


_ENTRY = record(
    {
        "dtype": one_of_texts(*DTYPES),
        "shape": list_of(whole(0, 1 << 40), most=16),
        "data_offsets": list_of(whole(0, 1 << 50), 2, 2),
    }
)
_HEADER: Check = mapped(text, either("data_offsets", _ENTRY, mapped(text, text)))


def _check_layout(tensors: Mapping[str, StoredTensor], size: int) -> None:
    """Checks that tensors lie inside the file and do not overlap; raises ValueError."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise ValueError(f"the tensor {name!r:.60} overlaps another one")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise ValueError(
                f"the tensor {name!r:.60} ends at byte {end}, but the file has {size} bytes: the file is incomplete"
            )


def _stored(name: str, entry: Mapping[str, Any], first: int) -> StoredTensor:
    """Reads the entry of a tensor in the header; raises ValueError if its length in bytes does not fit its shape."""
    if "data_offsets" not in entry:
        raise ValueError(f"the tensor {name!r:.60} has no data_offsets")
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
