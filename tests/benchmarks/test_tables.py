"""Checks that the tables in the pages match benchmarks/results, and the formats of the tables."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"machine": {"cpu": "a CPU"}}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


@pytest.mark.parametrize(
    "page", ["README.md", "docs/speed.md", "docs/serving.md", "docs/reuse.md", "docs/elastic.md", "docs/training.md"]
)
def test_a_page_is_what_the_results_say(page: str, tables: Any) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.MARKED.search(text)
    assert tables.filled(text) == text, f"run: python benchmarks/tables.py {page}"


def test_every_table_has_its_results(tables: Any) -> None:
    for file, lay_out in tables.TABLES.values():
        assert lay_out(json.loads((tables.RESULTS / file).read_text(encoding="utf-8")))


def test_a_race_of_captions(tables: Any) -> None:
    row = {"name": "ours", "cpu_seconds": 0.5, "speedup": 2.345, "same_ids": 0.95}
    lines = tables.captions({**MACHINE, "batch": 4, "tokens": 20, "results": [row]})
    assert lines[2] == "| ours | 125 | 2.35 | 95% |" or lines[2] == "| ours | 125 | 2.34 | 95% |"
    assert lines[-1] == "a CPU, one thread, batch 4, 20 tokens."


def test_a_bench(tables: Any) -> None:
    stage = {"ms": {"p50": 12.34}, "cpu_ms": 11.0, "share": 0.52, "bound": "bytes"}
    roofline = {"gigabytes_per_s": 10.5, "gigaflops_fp32": 80.0, "gigaops_int8": 300.0}
    lines = tables.stages(
        {
            "stages": {"decode": stage, "total": {**stage, "share": None}},
            "roofline": roofline,
            "machine": {"processor": "a CPU", "threads": None},
        }
    )
    assert lines[2:4] == ["| decode | 12.3 | 11.0 | 52% (bytes) |", "| total | 12.3 | 11.0 |  |"]
    assert "10.5 GB/s" in lines[-1]
    assert "threads: all" in lines[-1]


def test_reuse_and_opening(tables: Any) -> None:
    rows = [{"below": 0.005, "reused": 0.624, "same_words": 0.9833, "cpu_ms": 6.78}]
    lines = tables.reuse({**MACHINE, "frames": 960, "scenes": 40, "noise": 3.0, "results": rows})
    assert lines[2] == "| 0.005 | 62% | 98.3% | 6.8 |"
    document = {
        "graphs": {"bridge": {"milliseconds": [30.0, 12.0]}},
        "files": {"bridge.blob": {"size": 2_000_000}, "other": {"size": 1_000_000}},
        "machine": "a CPU",
        "versions": {"openvino": "1.2"},
    }
    lines = tables.opening(document)
    assert lines[2] == "| bridge | 30 | 12 | 2.50 |"
    assert lines[-1] == "The copy takes 3 MB. a CPU, one thread, OpenVINO 1.2."


PAGE = "before\n<!-- table: vision -->\nold\n<!-- end -->\nafter\n"


@pytest.fixture
def own(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "page.md").write_text(PAGE)
    return tables


def run(own: Any, monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    page = own.RESULTS / "page.md"
    monkeypatch.setattr(sys, "argv", ["tables.py", str(page), *flags])
    own.main()
    return str(page.read_text())


def test_a_page_is_written_and_checked(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(own, monkeypatch) == PAGE  # without results the table stays
    row = {"name": "ours", "run": {"cpu_ms": 120.4, "times": 3.04}}
    (own.RESULTS / "peers-vision-cpu.json").write_text(json.dumps({**MACHINE, "results": [row]}))
    with pytest.raises(SystemExit, match="does not match benchmarks/results"):
        run(own, monkeypatch, "--check")
    written = run(own, monkeypatch)
    assert "| ours | 120 | 3.04 |" in written
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("<!-- end -->\nafter\n")
    assert run(own, monkeypatch, "--check") == written


def test_a_table_that_nobody_knows(tables: Any) -> None:
    with pytest.raises(KeyError, match="guess"):
        tables.filled(PAGE.replace("vision", "guess"))
