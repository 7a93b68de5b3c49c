"""The token table that `calibrate` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="tables are written beside graphs with onnx_ir")
pytest.importorskip("safetensors", reason="the parent's table is written with it")

from safetensors.numpy import save_file

from blip2edge.bundle.token_table import TokenTable
from blip2edge.calibration.targets import Product
from blip2edge.calibration.weights.blocks import BlockFormat, restored, searched_scales
from blip2edge.calibration.weights.gptq import nearest
from blip2edge.calibration.weights.token_table import tied_head, write_rows, write_shared

ROWS, WIDTH = 37, 48


def floats(path: Path, seed: int = 0) -> TokenTable:
    values = np.random.default_rng(seed).standard_normal((ROWS, WIDTH)).astype(np.float32)
    save_file({"embed_tokens": values}, path)
    return TokenTable(path, "embed_tokens", "float32")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    table = floats(tmp_path / "parent")
    seen: list[tuple[int, int]] = []
    form = write_rows(table, tmp_path / "rows", lambda *report: seen.append(report))
    assert form == BlockFormat(8, 16)
    assert seen[-1] == (ROWS, ROWS)
    found = TokenTable(tmp_path / "rows", "embed_tokens", "float32").rows(range(ROWS))
    wanted = restored(*nearest(np.ascontiguousarray(table.rows(range(ROWS)).T), form, searched_scales), form).T
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
