"""Writes the token embedding table as integers, in its own file or shared with a tied head.

The format is that of ``blip2edge/bundle/token_table.py``. If the decoder's head is the transposed table, and both
have eight bits, only the table's file holds the integers and scales, and the decoder's graph refers to them there. If
the head has four bits, head and table have separate files: the head's integers minimise the error on the recorded
inputs of the head, not the error of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.safetensors_file import DTYPES, SafetensorsFile, StoredTensor, write_safetensors
from blip2edge.bundle.schema import EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import COLUMNS, ROWS, SCALE, TokenTable
from blip2edge.calibration.targets import Product
from blip2edge.calibration.weights.blocks import BlockFormat, Floats, Integers, packed, searched_scales
from blip2edge.calibration.weights.gptq import nearest

BITS = 8
"""Bits of a token embedding table that shares no weights with the head, for every value of ``--weights``.

A decode step reads only one row of the table, so more bits cost no time.
"""

CHUNK = 4096  # rows that are compared or rounded at a time


def write_rows(table: TokenTable, path: Path, progress: Callable[[int, int], None] | None = None) -> BlockFormat:
    """Writes a token embedding table ``[V, D]`` as integers with scales, one row per token.

    Args:
        table: The table of the bundle before calibration.
        path: The new file.
        progress: Called with rows done and rows in all.

    Returns:
        The integer format.

    Raises:
        ValueError: No block size divides D.
    """
    form = BlockFormat.for_width(table.width, BITS)
    if form is None:
        raise ValueError(f"no block size divides the {table.width} values of a row")
    total = table.num_rows
    shapes = (total, table.width * form.bits // 8), (total, table.width // form.block)

    def pieces() -> Iterator[NDArray[Any]]:
        kept: list[Floats] = []
        for start in range(0, total, CHUNK):
            ids = np.arange(start, min(start + CHUNK, total))
            columns = np.ascontiguousarray(table.rows(ids).astype(np.float32).T)
            integers, scales = nearest(columns, form, searched_scales)
            yield packed(np.ascontiguousarray(integers.T), form.bits)
            kept.append(np.ascontiguousarray(scales.T, np.float32))
            if progress is not None:
                progress(int(ids[-1]) + 1, total)
        yield from kept

    tensors = _stored(form, *shapes, scales=np.dtype(np.float32))
    write_safetensors(path, tensors, pieces(), _metadata(form, ROWS))
    return form


def write_shared(
    path: Path, form: BlockFormat, integers: Integers, scales: NDArray[Any], name: str
) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
    """Writes a quantized head ``[D, V]`` as the token embedding table, so that head and table share one file.

    Args:
        path: The new file, in the decoder's directory.
        form: The integer format of the head.
        integers: Integers of the head, ``[D, V]``.
        scales: Scales of the head, ``[D / block, V]``.
        name: Name of the head's initializer.

    Returns:
        Two tensors for the decoder's graph, which refer to the integers and to the scales in the file.
    """
    tensors = _stored(form, integers.shape, scales.shape, scales=scales.dtype)
    write_safetensors(path, tensors, (packed(integers, form.bits), scales), _metadata(form, COLUMNS))
    written = SafetensorsFile(path).tensors

    def external(kind: str, tensor: StoredTensor, dtype: ir.DataType) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            path.name, tensor.offset, tensor.nbytes, dtype, shape=ir.Shape(tensor.shape), name=f"{name}.{kind}",
            base_dir=path.parent,
        )  # fmt: skip

    return (
        external(f"int{form.bits}", written[EMBEDDINGS_TENSOR], ir.DataType.INT8),
        external("scale", written[EMBEDDINGS_TENSOR + SCALE], ir.DataType.from_numpy(scales.dtype)),
    )


def tied_head(table: TokenTable, products: dict[str, Product], read: Callable[[str], NDArray[Any]]) -> str | None:
    """Finds the decoder's head if it equals the transposed token embedding table.

    Args:
        table: The token embedding table, ``[V, D]``.
        products: The decoder's matrix multiplications, by the weight's name.
        read: Returns an initializer's values.

    Returns:
        The name of the head's initializer; None if no weight equals the table.
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


def _stored(form: BlockFormat, *shapes: tuple[int, ...], scales: np.dtype[Any]) -> dict[str, StoredTensor]:
    """Returns type and shape of the tensors in the table's file (integers and scales), by the tensor's name."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        EMBEDDINGS_TENSOR: StoredTensor("I8" if form.bits == 8 else "U8", shapes[0]),
        EMBEDDINGS_TENSOR + SCALE: StoredTensor(names[scales], shapes[1]),
    }


def _metadata(form: BlockFormat, layout: str) -> dict[str, str]:
    return {"bits": str(form.bits), "block": str(form.block), "layout": layout}
