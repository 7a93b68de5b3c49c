"""The token table: mapped into memory, so that a step reads one row a token and nothing is loaded.

Three forms, all in one safetensors file (https://github.com/huggingface/safetensors, "Format"):

    floats    embed_tokens [V, D] F32, F16 or BF16
    blocks    embed_tokens [V, D] I8, or [V, D / 2] U8 with two 4-bit values a byte, the first in the lower half;
              embed_tokens.scale [V, D / block] F32 or F16: value * scale of its block
    shared    the same turned, [D, V] and [D / block, V]: the very bytes that the decoder's head reads, where both are
              one matrix; 4-bit values then lie in one row, U8 [D * V / 2]

``bits``, ``block`` and ``layout`` of the latter two stand in the file's ``__metadata__``.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.errors import BundleError

HEADER_LENGTH = 8  # bytes: a little-endian unsigned integer, the length of the JSON header behind it
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
SCALE = ".scale"
"""Behind the table's name: the tensor of its scales."""

ROWS, COLUMNS = "rows", "columns"
"""``layout``: a token's values lie in a row, or in a column as the head has them."""


def signed_nibbles(values: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The 4-bit integers in the lower halves of bytes, from -8 to 7."""
    return (values << 4).view(np.int8) >> 4


class _Rows(Protocol):
    """A table ``[V, D]`` in some form."""

    shape: tuple[int, int]

    def read(self, ids: NDArray[np.int64]) -> Array:
        """Rows ``[N, D]`` as floats."""
        ...


class _Floats:
    def __init__(self, table: Array, is_bf16: bool) -> None:
        self.shape = (table.shape[0], table.shape[1])
        self._table = table
        self._is_bf16 = is_bf16

    def read(self, ids: NDArray[np.int64]) -> Array:
        rows: Array = self._table[ids]
        if self._is_bf16:  # the upper half of a float32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows


class _Blocks:
    """Rows of integers; 4-bit ones two a byte."""

    def __init__(self, integers: Array, scales: Array, bits: int, block: int) -> None:
        rows, width = integers.shape[0], integers.shape[1] * 8 // bits
        if scales.shape != (rows, width // block):
            raise ValueError(f"scales {scales.shape} do not fit {rows} rows of {width} in blocks of {block}")
        self.shape = (rows, width)
        self._integers, self._scales = integers, scales
        self._bits, self._block = bits, block

    def read(self, ids: NDArray[np.int64]) -> Array:
        rows: Array = self._integers[ids]
        if self._bits == 4:
            rows = np.stack([signed_nibbles(rows), rows.view(np.int8) >> 4], axis=-1).reshape(len(ids), -1)
        return rows * np.repeat(self._scales[ids].astype(np.float32), self._block, axis=1)


class _Columns:
    """Columns of integers, as the head reads them."""

    def __init__(self, integers: Array, scales: Array, bits: int, block: int) -> None:
        width, rows = scales.shape[0] * block, scales.shape[1]
        if integers.size != (width * rows * bits + 7) // 8:
            raise ValueError(f"{integers.size} bytes do not fit {rows} columns of {width}")
        self.shape = (rows, width)
        self._integers, self._scales = integers.reshape(-1), scales
        self._bits, self._block = bits, block
        self._starts = np.arange(width, dtype=np.int64)[None] * rows

    def read(self, ids: NDArray[np.int64]) -> Array:
        places = self._starts + ids[:, None]
        if self._bits == 4:
            pairs = self._integers[places >> 1]
            values: Array = np.where(places & 1, pairs.view(np.int8) >> 4, signed_nibbles(pairs))
        else:
            values = self._integers[places]
        scales = self._scales[:, ids].T.astype(np.float32)
        return values * np.repeat(scales, self._block, axis=1)


class TokenTable:
    """Rows of a table ``[V, D]`` in a safetensors file.

    The format is read here and not by the safetensors package, which a device then does not need.

    Args:
        path: The file.
        tensor: The tensor's name.
        dtype: dtype of what :meth:`rows` gives.

    Raises:
        BundleError: Not a safetensors file, no such tensor, or a form that is none of the three.
    """

    def __init__(self, path: Path, tensor: str, dtype: str) -> None:
        self._dtype = NUMPY_DTYPES[dtype]
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._rows = _open(content, tensor)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{path} is not a safetensors file with a table {tensor} ({error})",
                "export the checkpoint again",
            ) from error

    @property
    def num_rows(self) -> int:
        """V."""
        return self._rows.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self._rows.shape[1]

    def rows(self, token_ids: Sequence[int] | NDArray[np.int64]) -> Array:
        """The embeddings of some tokens.

        Args:
            token_ids: Ids below V, ``[…]``.

        Returns:
            ``[…, D]``, a copy.
        """
        ids = np.asarray(token_ids, np.int64)
        rows = self._rows.read(ids.reshape(-1)).astype(self._dtype, copy=False)
        return rows.reshape(*ids.shape, rows.shape[-1])


def _open(content: mmap.mmap, tensor: str) -> _Rows:
    """The table in a mapped file; raises what a wrong file raises."""
    length = int.from_bytes(content[:HEADER_LENGTH], "little")
    header = json.loads(content[HEADER_LENGTH : HEADER_LENGTH + length])
    first = HEADER_LENGTH + length
    table = _array(content, header[tensor], first)
    described = header.get("__metadata__", {})
    if "bits" not in described:
        if table.dtype.itemsize == 1:
            raise ValueError("integers without bits and block")
        return _Floats(table, header[tensor]["dtype"] == "BF16")
    bits, block = int(described["bits"]), int(described["block"])
    scales = _array(content, header[tensor + SCALE], first)
    if bits not in (4, 8) or table.dtype != DTYPES["I8" if bits == 8 else "U8"]:
        raise ValueError(f"{bits} bits in {header[tensor]['dtype']}")
    kinds: Mapping[str, type[_Blocks | _Columns]] = {ROWS: _Blocks, COLUMNS: _Columns}
    return kinds[described["layout"]](table, scales, bits, block)


def _array(content: mmap.mmap, entry: Mapping[str, Any], first: int) -> Array:
    start, end = entry["data_offsets"]
    stored = DTYPES[entry["dtype"]]
    flat: Array = np.frombuffer(content, stored, count=(end - start) // stored.itemsize, offset=first + start)
    return flat.reshape(entry["shape"])
