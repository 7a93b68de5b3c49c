"""The token table as integers: a file of its own, or the very bytes that a tied head reads.

The format is that of ``blip2edge/bundle/token_table.py``. Where the decoder's head is the table turned, and both have
eight bits, the head's integers and scales are written to the table's file alone and the decoder's graph refers to them
there. In four bits each has its own: a head rounded on what it meets is a poor table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.schema import EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import COLUMNS, DTYPES, HEADER_LENGTH, ROWS, SCALE, TokenTable
from blip2edge.calibration.storage import PAGE
from blip2edge.calibration.targets import Product
from blip2edge.calibration.weights.blocks import BlockFormat, Floats, Integers, packed, searched_scales
from blip2edge.calibration.weights.gptq import nearest

BITS = 8
"""Of a table that is no head, whatever the weights have: a step reads one row of it, so that its size costs no time."""

CHUNK = 4096  # rows that are compared or rounded at a time


def write_rows(
    table: TokenTable, path: Path, progress: Callable[[int, int], None] | None = None
) -> BlockFormat:
    """Writes a table ``[V, D]`` as integers, a row a token.

    Args:
        table: The parent's.
        path: The new file.
        progress: Called with rows done and rows in all.

    Returns:
        The format.

    Raises:
        ValueError: No block divides D.
    """
    form = BlockFormat.for_width(table.width, BITS)
    if form is None:
        raise ValueError(f"no block divides rows of {table.width}")
    total, scale_dtype = table.num_rows, np.dtype(np.float32)
    shapes = (total, table.width * form.bits // 8), (total, table.width // form.block)
    header = _header(form, ROWS, shapes, scale_dtype)
    kept: list[Floats] = []
    with path.open("wb") as file:
        file.write(header)
        for start in range(0, total, CHUNK):
            ids = np.arange(start, min(start + CHUNK, total))
            turned = np.ascontiguousarray(table.rows(ids).astype(np.float32).T)
            integers, scales = nearest(turned, form, searched_scales)
            file.write(packed(np.ascontiguousarray(integers.T), form.bits).tobytes())
            kept.append(np.ascontiguousarray(scales.T))
            if progress is not None:
                progress(int(ids[-1]) + 1, total)
        for part in kept:
            file.write(part.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return form


def write_shared(
    path: Path, form: BlockFormat, integers: Integers, scales: NDArray[Any], name: str
) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
    """Writes a head ``[D, V]`` as the token table.

    Args:
        path: The new file, beside the decoder's.
        form: The format.
        integers: ``[D, V]``.
        scales: ``[D / block, V]``.
        name: The head's initializer.

    Returns:
        What the decoder's graph refers to.
    """
    header = _header(form, COLUMNS, (integers.shape, scales.shape), scales.dtype)
    with path.open("wb") as file:
        file.write(header)
        for part in (packed(integers, form.bits), scales):
            file.write(np.ascontiguousarray(part).tobytes())
        file.flush()
        os.fsync(file.fileno())
    first, middle = len(header), len(header) + integers.size * form.bits // 8

    def tensor(
        kind: str, offset: int, length: int, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            path.name,
            offset,
            length,
            dtype,
            shape=ir.Shape(shape),
            name=f"{name}.{kind}",
            base_dir=path.parent,
        )

    return (
        tensor(f"int{form.bits}", first, middle - first, ir.DataType.INT8, integers.shape),
        tensor("scale", middle, scales.nbytes, ir.DataType.from_numpy(scales.dtype), scales.shape),
    )


def tied_head(
    table: TokenTable, products: dict[str, Product], read: Callable[[str], NDArray[Any]]
) -> str | None:
    """The initializer that is the table turned; None where there is none.

    Args:
        table: ``[V, D]``.
        products: A decoder's, by the weight's name.
        read: Gives an initializer's values.
    """
    for name, product in products.items():
        if (product.inner, product.outer) == (table.width, table.num_rows) and _same(table, read(name)):
            return name
    return None


def _same(table: TokenTable, head: NDArray[Any]) -> bool:
    for start in range(0, table.num_rows, CHUNK):
        ids = np.arange(start, min(start + CHUNK, table.num_rows))
        if not np.array_equal(table.rows(ids), head[:, start : start + CHUNK].T):
            return False
    return True


def _header(
    form: BlockFormat,
    layout: str,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    scale_dtype: np.dtype[Any],
) -> bytes:
    """A safetensors header, filled up so that the tensors begin on a page."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    middle = int(np.prod(shapes[0]))
    end = middle + int(np.prod(shapes[1])) * scale_dtype.itemsize
    kinds = names[np.dtype(np.int8 if form.bits == 8 else np.uint8)], names[scale_dtype]
    text = json.dumps(
        {
            "__metadata__": {"bits": str(form.bits), "block": str(form.block), "layout": layout},
            EMBEDDINGS_TENSOR: {"dtype": kinds[0], "shape": list(shapes[0]), "data_offsets": [0, middle]},
            EMBEDDINGS_TENSOR + SCALE: {
                "dtype": kinds[1],
                "shape": list(shapes[1]),
                "data_offsets": [middle, end],
            },
        },
        separators=(",", ":"),
    ).encode()
    text += b" " * (-(len(text) + HEADER_LENGTH) % PAGE)
    return len(text).to_bytes(HEADER_LENGTH, "little") + text
