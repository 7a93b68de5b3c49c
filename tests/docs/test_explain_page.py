"""The pictures and figures of docs/explain.md."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps

pytest.importorskip("torch", reason="the miniature is exported with torch")
pytest.importorskip("onnxruntime", reason="explain runs graphs")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_pictures_and_figures_are_those_of_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("explain_pictures")
    pictures, page = script.made(tmp_path)
    assert script.PAGE.read_text(encoding="utf-8") == page, "run: make docs"
    for path, picture in pictures.items():
        assert script.difference(Image.open(path), picture) < script.TOLERANCE, "run: make docs"
        assert script.difference(ImageOps.mirror(picture), picture) > script.TOLERANCE
        assert f"]({path.name})" in page
