"""Scores of captions, in a process that does not import torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blip2edge.errors import DataError, UsageError
from blip2edge.training.data.scenes import scenes
from blip2edge.training.evaluation.scene_scores import EVALUATION_SEED, evaluate_scenes
from blip2edge.training.metrics.exact import exact_match, shuffled_match


def test_exact_match() -> None:
    assert exact_match(["a", " b "], ["a", "b"]) == 1.0
    assert exact_match(["a", "B"], ["a", "b"]) == 0.5


def test_shuffled_match_tells_the_blind() -> None:
    assert shuffled_match(["x", "x"], ["x", "x"]) == 1.0
    assert shuffled_match(["a", "b", "c"], ["a", "b", "c"]) == 0.0


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(DataError, match="got 1 for 2"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(DataError):
        exact_match([], [])
    with pytest.raises(DataError, match="at least two"):
        shuffled_match(["a"], ["a"])
    with pytest.raises(UsageError, match="at least 2"):
        evaluate_scenes(lambda pictures: ["" for _ in pictures], n=1)


def test_evaluation_hands_over_the_held_out_scenes_in_order() -> None:
    right = [scene.caption for scene in scenes(120, split="heldout", seed=EVALUATION_SEED)]
    queue = list(right)
    queue[3] = "a photo of a cat"
    seen: list[tuple[int, int]] = []
    scores = evaluate_scenes(
        lambda pictures: [queue.pop(0) for _ in pictures],
        n=120,
        progress=lambda done, total: seen.append((done, total)),
    )
    # Two captions left in the queue would mean that pictures were dropped; index 3 is popped as "cat".
    assert not queue
    assert scores["exact_match"] == pytest.approx(119 / 120)
    assert scores["shuffled_match"] < 0.02
    assert scores["wrong"] == [(right[3], "a photo of a cat")]
    assert seen[-1] == (120, 120)


def test_a_captioner_that_drops_pictures_is_refused() -> None:
    with pytest.raises(DataError, match="got 0 for 10"):
        evaluate_scenes(lambda pictures: [], n=10)


def test_scenes_and_scores_need_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt'): sys.modules[name] = None\n"
        "from blip2edge.training.evaluation.scene_scores import evaluate_scenes\n"
        "assert evaluate_scenes(lambda pictures: ['' for _ in pictures], n=3)['n'] == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
