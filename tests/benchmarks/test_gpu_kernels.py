"""What the steps for the CUDA kernels accept: they must fail if the GPU draws nothing, or finds other texts."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx_ir", reason="the bundles of the steps are exported")

from blip2edge.runtime.decoding.generated import Generated

ROOT = Path(__file__).parents[2]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``gpu_kernels``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_kernels")


@pytest.mark.parametrize(
    ("equal", "of", "left", "ok"),
    [
        (1000, 1000, 0, True),
        (999, 1000, 0, True),
        (998, 1000, 0, False),
        (0, 0, 0, False),  # nothing was drawn
        (0, 0, 8, False),
        (992, 992, 8, False),  # the host drew the last tokens
        (1000, 1000, 8, False),
    ],
)
def test_all_tokens_must_be_drawn_on_the_gpu(steps: Any, equal: int, of: int, left: int, ok: bool) -> None:
    assert steps.drawn_well({"equal": equal, "of": of, "left_to_host": left}, 1000) is ok


def test_other_texts_of_a_beam_search_need_nearly_the_same_score(steps: Any) -> None:
    wanted = [Generated((5, 6), "length", -2.0)] * 4
    near, far, unknown = (Generated((5, 7), "length", score) for score in (-2.01, -2.2, None))
    same = Generated((5, 6), "length", -2.2)  # equal tokens: the score does not count
    for texts, gaps, ok in (
        ([same] * 4, [], True),
        ([same, near, same, near], [0.005, 0.005], True),
        ([near, near, same, near], [0.005] * 3, False),
        ([same, far, same, same], [0.1], False),
        ([same, unknown, same, same], [math.inf], False),
    ):
        found = steps.score_gaps(texts, wanted)
        assert found == pytest.approx(gaps)
        assert steps.near_enough(found, len(wanted)) is ok
