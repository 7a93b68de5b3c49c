"""The three forms of the token table, from bytes written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2edge.bundle.token_table import TokenTable, signed_nibbles
from blip2edge.errors import BundleError


def safetensors(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    """Writes the format by its description."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, (dtype, array) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_floats_of_every_kind(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)
    kinds: dict[str, NDArray[Any]] = {
        "F32": values,
        "F16": values.astype(np.float16),
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
    }
    for kind, array in kinds.items():
        path = safetensors(tmp_path / kind, {}, {"embed_tokens": (kind, array)})
        assert np.array_equal(TokenTable(path, "embed_tokens", "float32").rows([1, 0]), values[[1, 0]])


def test_nibbles_have_a_sign() -> None:
    assert signed_nibbles(np.arange(16, dtype=np.uint8)).tolist() == [*range(8), *range(-8, 0)]


def test_rows_of_eight_bits(tmp_path: Path) -> None:
    integers = np.array([[1, -2, 3, 4], [5, 6, -127, 8]], np.int8)
    scales = np.array([[0.5, 2.0], [1.0, 0.25]], np.float32)
    path = safetensors(
        tmp_path / "t", {"bits": "8", "block": "2", "layout": "rows"},
        {"embed_tokens": ("I8", integers), "embed_tokens.scale": ("F32", scales)},
    )  # fmt: skip
    table = TokenTable(path, "embed_tokens", "float32")
    assert (table.num_rows, table.width) == (2, 4)
    assert table.rows([1, 0, 1]).tolist() == [[5, 6, -31.75, 2], [0.5, -1, 6, 8], [5, 6, -31.75, 2]]
    assert TokenTable(path, "embed_tokens", "float16").rows([0]).dtype == np.float16


def test_rows_of_four_bits(tmp_path: Path) -> None:
    pairs = np.array([[0x78, 0x10], [0x3F, 0xC2]], np.uint8)  # -8 7 0 1, -1 3 2 -4
    scales = np.array([[1.0], [0.5]], np.float16)
    path = safetensors(
        tmp_path / "t", {"bits": "4", "block": "4", "layout": "rows"},
        {"embed_tokens": ("U8", pairs), "embed_tokens.scale": ("F16", scales)},
    )  # fmt: skip
    table = TokenTable(path, "embed_tokens", "float32")
    assert table.rows([0, 1]).tolist() == [[-8, 7, 0, 1], [-0.5, 1.5, 1, -2]]


def test_columns_of_four_bits_with_an_odd_vocabulary(tmp_path: Path) -> None:
    head = np.array([[-8, 7, 1], [2, -3, 4]], np.int8)  # [D, V]
    pairs = np.array([0x78, 0x21, 0x4D], np.uint8)
    scales = np.array([[1.0, 2.0, 3.0]], np.float32)
    path = safetensors(
        tmp_path / "t", {"bits": "4", "block": "2", "layout": "columns"},
        {"embed_tokens": ("U8", pairs), "embed_tokens.scale": ("F32", scales)},
    )  # fmt: skip
    table = TokenTable(path, "embed_tokens", "float32")
    assert (table.num_rows, table.width) == (3, 2)
    assert np.array_equal(table.rows([2, 0, 1]), (head * scales).T[[2, 0, 1]])


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "expected the metadata bits and block"),
        ({"bits": "8", "block": "3", "layout": "rows"}, r"expected scales of shape \(2, 1\)"),
        ({"bits": "4", "block": "2", "layout": "rows"}, "4 bits in I8"),
        ({"bits": "8", "block": "2", "layout": "diagonals"}, "diagonals"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, metadata: dict[str, str], reason: str) -> None:
    path = safetensors(
        tmp_path / "t", metadata,
        {"embed_tokens": ("I8", np.ones((2, 4), np.int8)), "embed_tokens.scale": ("F32", np.ones((2, 2), np.float32))},
    )  # fmt: skip
    with pytest.raises(BundleError, match=reason):
        TokenTable(path, "embed_tokens", "float32")
