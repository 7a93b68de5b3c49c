"""The token embedding table, memory-mapped, so that a decode step reads only the rows of its tokens.

The table is a safetensors file in one of three formats:

    floats    embed_tokens [V, D] F32, F16 or BF16
    rows      embed_tokens [V, D] I8, or [V, D / 2] U8 with two 4-bit values in a byte, the first in the lower half;
              embed_tokens.scale [V, D / block] F32 or F16: an embedding is value * scale of its block
    columns   the transposed table, [D, V] and [D / block, V]; 4-bit values are one row, U8 [D * V / 2]. If table and
              output layer are one (tied) matrix, the decoder's graph uses the same bytes

The metadata of the two integer formats holds ``bits``, ``block`` (number of values that share a scale) and ``layout``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.safetensors_file import DTYPES, SafetensorsFile
from blip2edge.errors import BundleError
from blip2edge.reading import reading

SCALE = ".scale"
"""Ending that makes the name of the scales' tensor from the table's name: ``embed_tokens.scale``."""

ROWS, COLUMNS = "rows", "columns"
"""Values of ``layout`` in the file's metadata.

``rows``: the values of a token are a row of the stored table. ``columns``: they are a column, as in the weight of the
decoder's output layer.
"""


def signed_nibbles(values: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Reads the 4-bit integers in the lower halves of bytes, from -8 to 7."""
    return (values << 4).view(np.int8) >> 4


class _Rows(Protocol):
    """The interface of a token table ``[V, D]``; there is one class for each of the three formats."""

    shape: tuple[int, int]

    def read(self, ids: NDArray[np.int64]) -> Array:
        """Returns the rows of token ids ``[N]`` as floats ``[N, D]``."""
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
    """A table stored as rows of integers; a byte holds two 4-bit values."""

    def __init__(self, integers: Array, scales: Array, bits: int, block: int) -> None:
        rows, width = integers.shape[0], integers.shape[1] * 8 // bits
        if width % block or scales.shape != (rows, width // block):
            expected = (rows, width // block)
            raise ValueError(f"expected scales of shape {expected} for blocks of {block} values, got {scales.shape}")
        self.shape = (rows, width)
        self._integers, self._scales = integers, scales
        self._bits, self._block = bits, block

    def read(self, ids: NDArray[np.int64]) -> Array:
        rows: Array = self._integers[ids]
        if self._bits == 4:
            rows = np.stack([signed_nibbles(rows), rows.view(np.int8) >> 4], axis=-1).reshape(len(ids), -1)
        return rows * np.repeat(self._scales[ids].astype(np.float32), self._block, axis=1)


class _Columns:
    """A table of integers that is stored transposed, like the weight of the decoder's output layer.

    The embedding of a token is a column of the stored matrix.
    """

    def __init__(self, integers: Array, scales: Array, bits: int, block: int) -> None:
        width, rows = scales.shape[0] * block, scales.shape[1]
        expected = (width * rows * bits + 7) // 8
        if integers.size != expected:
            raise ValueError(f"expected {expected} bytes for {rows} columns of {width} values, got {integers.size}")
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
    """The language model's token embeddings: rows of a table ``[V, D]`` in a safetensors file.

    Args:
        path: The file.
        tensor: The tensor's name.
        dtype: dtype of the rows that :meth:`rows` returns.

    Raises:
        BundleError: The file is not a safetensors file, or has no such tensor in floating point, int8 or int4.
    """

    def __init__(self, path: Path, tensor: str, dtype: str) -> None:
        self._dtype = NUMPY_DTYPES[dtype]
        form, fix = f"a table with the tensor {tensor}", "copy the bundle again, or export the checkpoint again"
        file = SafetensorsFile(path, BundleError, fix)
        with reading(path, form, BundleError, fix):
            self._rows = _open(file, tensor)

    @property
    def num_rows(self) -> int:
        """V, the number of tokens."""
        return self._rows.shape[0]

    @property
    def width(self) -> int:
        """D, the width of an embedding."""
        return self._rows.shape[1]

    def rows(self, token_ids: Sequence[int] | NDArray[np.int64]) -> Array:
        """Returns the embeddings of some tokens.

        Args:
            token_ids: Token ids below V, an array of any shape ``[…]``.

        Returns:
            The embeddings ``[…, D]``, a copy.
        """
        ids = np.asarray(token_ids, np.int64)
        rows = self._rows.read(ids.reshape(-1)).astype(self._dtype, copy=False)
        return rows.reshape(*ids.shape, rows.shape[-1])


def _open(file: SafetensorsFile, tensor: str) -> _Rows:
    """Opens the table in a file: floats, or integers with scales by row or by column.

    Raises ValueError if the file has another format.
    """
    table, dtype = file.array(tensor), file.stored(tensor).dtype
    layout = file.metadata.get("layout", ROWS)
    if layout == ROWS and (table.ndim != 2 or not table.size):
        raise ValueError(f"expected a tensor of two dimensions, got the shape {table.shape}")
    if "bits" not in file.metadata:
        if table.dtype.itemsize == 1:
            raise ValueError("expected the metadata bits and block for a table of integers, got neither")
        return _Floats(table, dtype == "BF16")
    kinds: Mapping[str, type[_Blocks | _Columns]] = {ROWS: _Blocks, COLUMNS: _Columns}
    if "block" not in file.metadata or "layout" not in file.metadata or layout not in kinds:
        raise ValueError(
            f"expected the metadata block, and layout {ROWS} or {COLUMNS}, got {dict(file.metadata)!r:.60}"
        )
    bits, block = int(file.metadata["bits"]), int(file.metadata["block"])
    if bits not in (4, 8) or table.dtype != DTYPES["I8" if bits == 8 else "U8"]:
        raise ValueError(f"expected 8 bits in I8 or 4 bits in U8, got {bits} bits in {dtype}")
    if block < 1:
        raise ValueError(f"expected a block of at least one value, got {block}")
    return kinds[layout](table, file.array(tensor + SCALE), bits, block)
