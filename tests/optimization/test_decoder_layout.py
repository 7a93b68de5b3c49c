"""What the kernels cannot multiply by or rotate is refused by name; ``tests/runtime/cuda`` runs what they can."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from blip2edge.optimization.cuda_kernels import layout
from blip2edge.runtime.cuda.layout import Stored, StoredMatrix


def stored(dtype: str, *shape: int) -> Stored:
    return Stored("decoder.onnx.data", 0, dtype, shape)


@pytest.mark.parametrize(
    ("weight", "scales", "fault"),
    [
        (stored("float16", 64, 32), None, ""),
        (stored("int4", 64, 32), stored("float16", 4, 32), ""),
        (stored("float32", 64), None, "has the shape [64], not that of a matrix"),
        (stored("int8", 64, 32), None, "is in int8 without scales"),
        (stored("int8", 64, 32), stored("int8", 4, 32), "is in int8 with scales in int8"),
        (stored("float16", 64, 32), stored("float16", 4, 32), "is in float16 with scales in float16"),
        (stored("int8", 64, 32), stored("float32", 4, 16), "scales of the shape [4, 16]"),
        (stored("int8", 60, 32), stored("float32", 7, 32), "scales of the shape [7, 32]"),
        (stored("int8", 64, 32), stored("float32", 8, 32), "is in blocks of 8 rows, not of a multiple of 16"),
        (stored("int4", 64, 31), stored("float32", 4, 31), "has rows of 31 4-bit values, not an even number"),
    ],
)
def test_matrices_without_a_kernel(weight: Stored, scales: Stored | None, fault: str) -> None:
    found = StoredMatrix(weight, scales).fault
    assert (fault in found) if fault else not found


def test_a_partial_rotation_is_refused() -> None:
    tables = [ir.Value(name=name, const_value=ir.tensor(np.ones((5, 4), np.float32))) for name in ("cos", "sin")]
    node = ir.node("GroupQueryAttention", [*[None] * 7, *tables], {"do_rotary": 1})
    table = layout._rotation(node, 8)
    assert table is not None
    assert table.shape == (5, 8)
    with pytest.raises(layout._Unfit, match="turn 8 channels of heads 16 wide, not all of them"):
        layout._rotation(node, 16)
