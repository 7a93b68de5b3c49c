"""The token table in its three forms, as bytes that were written by hand and as `calibrate` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip2edge.calibration.blocks import BlockFormat, restored, searched_scales
from blip2edge.calibration.gptq import nearest
from blip2edge.calibration.targets import Product
from blip2edge.calibration.token_table import tied_head, write_rows, write_shared
from blip2edge.errors import BundleError
from blip2edge.runtime.embeddings import TokenTable

ROWS, WIDTH = 37, 48


def safetensors(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, np.ndarray]]
) -> Path:
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


def floats(path: Path, seed: int = 0) -> TokenTable:
    values = np.random.default_rng(seed).standard_normal((ROWS, WIDTH)).astype(np.float32)
    return TokenTable(safetensors(path, {}, {"embed_tokens": ("F32", values)}), "embed_tokens", "float32")


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


def test_what_is_written_is_read(tmp_path: Path) -> None:
    table = floats(tmp_path / "parent")
    seen: list[tuple[int, int]] = []
    form = write_rows(table, tmp_path / "rows", lambda *report: seen.append(report))
    assert form == BlockFormat(8, 16)
    assert seen[-1] == (ROWS, ROWS)
    found = TokenTable(tmp_path / "rows", "embed_tokens", "float32").rows(range(ROWS))
    wanted = restored(
        *nearest(np.ascontiguousarray(table.rows(range(ROWS)).T), form, searched_scales), form
    ).T
    assert np.array_equal(found, wanted)
    assert np.abs(found - table.rows(range(ROWS))).max() < 0.02
    size = (tmp_path / "rows").stat().st_size
    assert size == 4096 + ROWS * WIDTH + ROWS * WIDTH // 16 * 4


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    table = floats(tmp_path / "parent")
    head = np.ascontiguousarray(table.rows(range(ROWS)).T)
    form = BlockFormat(8, 16)
    integers, scales = nearest(head, form, searched_scales)
    tensors = write_shared(tmp_path / "shared", form, integers, scales, "head")
    assert np.array_equal(tensors[0].numpy(), integers)
    assert np.array_equal(tensors[1].numpy(), scales)
    assert tensors[0].offset is not None
    assert tensors[0].offset % 4096 == 0
    rows = TokenTable(tmp_path / "shared", "embed_tokens", "float32").rows(range(ROWS))
    assert np.array_equal(rows, restored(integers, scales, form).T)


def test_a_head_is_tied_when_its_values_are_the_tables(tmp_path: Path) -> None:
    table = floats(tmp_path / "parent")
    weights = {"same": table.rows(range(ROWS)).T, "other": floats(tmp_path / "b", seed=1).rows(range(ROWS)).T}
    products = {name: Product(name, "x", name, WIDTH, ROWS) for name in ("other", "same")}
    assert tied_head(table, products, weights.__getitem__) == "same"
    assert tied_head(table, {"other": products["other"]}, weights.__getitem__) is None
    assert tied_head(table, {"small": Product("small", "x", "small", WIDTH, 4)}, weights.__getitem__) is None


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "integers without bits"),
        ({"bits": "8", "block": "3", "layout": "rows"}, "do not fit"),
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
