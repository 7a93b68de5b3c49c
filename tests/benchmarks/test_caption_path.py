"""How many files a caption runs through: a reader who wants to understand a caption must open all of them."""

from __future__ import annotations

import importlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES = 11
pytest.importorskip("onnxruntime", reason="the captioner needs onnxruntime")
pytest.importorskip("torch", reason="the bundle is exported here")

from blip2edge.optimization.pipeline import optimize  # noqa: E402
from blip2edge.runtime.captioning.captioner import Captioner  # noqa: E402


def test_a_greedy_caption_passes_few_files(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    trace: Any = importlib.import_module("caption_path").trace
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    optimize(bundle)
    picture = np.zeros((40, 40, 3), np.uint8)
    with Captioner.load(bundle, threads=1, draft="none") as captioner:
        found, _ = trace(partial(captioner.caption, picture, max_new_tokens=4))
    assert {"runtime/captioning/captioner.py", "runtime/decoding/generate.py", "runtime/decoding/kv/in_place.py"} <= {
        *found
    }
    assert len(found) <= MOST_FILES, sorted(found)
