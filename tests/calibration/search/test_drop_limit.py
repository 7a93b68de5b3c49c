"""``--drop-limit``: sensitivity of layers, and the smallest number of layers kept in floating point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="graphs are changed with onnx_ir")

from blip2edge.calibration.activations.qdq import ActivationPlan, QuantizedActivation
from blip2edge.calibration.agreement import CaptionAgreement
from blip2edge.calibration.pictures import CalibrationPicture
from blip2edge.calibration.search import drop_limit
from blip2edge.calibration.search.drop_limit import (
    DropLimit,
    FullyQuantized,
    check_drop_limit,
    choose_kept_layers,
)
from blip2edge.calibration.search.sensitivity import (
    QuantizedLayer,
    Sensitivity,
    divergence,
    group_by_layer,
    restrict_plan,
)
from blip2edge.calibration.targets import Product
from blip2edge.errors import UsageError
from blip2edge.picture_files import ShardFile
from blip2edge.training.metrics.captions import cider_d


def ranking(count: int) -> list[Sensitivity]:
    return [Sensitivity(QuantizedLayer("decoder", f"layers.{at}", ()), 1.0 / (at + 1)) for at in range(count)]


def chosen(monkeypatch: pytest.MonkeyPatch, drops: Sequence[float], limit: float) -> tuple[int, dict[int, float], int]:
    """The number of layers kept, what was tried, and the number kept in the staging directory at the end."""
    written = [0]

    def rewritten(context: Any, quantized: Any, worst: Sequence[Sensitivity]) -> dict[str, Any]:
        written[0] = len(worst)
        return {}

    monkeypatch.setattr(drop_limit, "_rewritten", rewritten)
    context: Any = None
    quantized = FullyQuantized({}, Path())
    allowed = DropLimit(limit)
    _, kept = choose_kept_layers(context, quantized, ranking(len(drops) - 1), allowed, lambda graphs: drops[written[0]])
    return kept.count, kept.drops, written[0]


@pytest.mark.parametrize(
    ("drops", "limit", "kept"),
    [
        ((0.4, 0, 0, 0, 0), 0.5, 0),
        ((9, 0.5, 0, 0, 0), 0.5, 1),
        ((9, 8, 7, 0.5, 0), 0.5, 3),
        ((9, 8, 7, 6, 5, 4, 3, 2, 1, 0.4, 0.3, 0.2, 0), 0.5, 9),
        ((9, 8, 7, 6, 5, 0), 0.5, 5),
        ((9, 0), 0, 1),
    ],
)
def test_the_least_that_is_enough(
    monkeypatch: pytest.MonkeyPatch, drops: tuple[float, ...], limit: float, kept: int
) -> None:
    found, tried, written = chosen(monkeypatch, drops, limit)
    assert found == kept
    assert written == kept
    assert tried[kept] <= limit
    assert kept == 0 or tried[kept - 1] > limit  # one less was seen to be too few
    assert len(tried) <= 2 + 2 * len(drops).bit_length()


def test_what_is_lost_by_captions_and_by_cider() -> None:
    captions = CaptionAgreement(4, 0.75, ("a cat", "a dog", "a cow", "a hen"), ("a cat", "a dog", "a cow", "a fox"))
    references = [[text] for text in captions.parent]
    assert DropLimit(1).drop(captions, references) == 25
    lost = DropLimit(1, cider_d)
    assert lost.measure == "cider"
    wanted = 100 * (cider_d(captions.parent, references) - cider_d(captions.ours, references))
    assert lost.drop(captions, references) == pytest.approx(wanted)
    assert wanted > 0


def test_references_lie_beside_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n two cats \n", encoding="utf-8")
    assert CalibrationPicture(tmp_path / "a.png").references() == ["a cat", "two cats"]
    assert CalibrationPicture(tmp_path / "b.png").references() == []
    stored = ShardFile(tmp_path / "a.tar", "a.png", 0, 0)
    assert CalibrationPicture(tmp_path / "a.tar", stored).references() == []


def test_divergence_is_zero_for_the_same_and_grows() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 5, 11)).astype(np.float32)
    assert divergence(logits, logits) == pytest.approx(0, abs=1e-9)
    assert divergence(logits, logits + 7) == pytest.approx(0, abs=1e-6)  # a shift says nothing
    assert 0 < divergence(logits, 0.9 * logits) < divergence(logits, 0.5 * logits)
    two = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    assert divergence(two[:1], two[1:]) == pytest.approx(0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75))


def test_layers_by_their_path() -> None:
    names = [
        "language.layers.0.fc1.weight.T",
        "language.layers.10.fc1.weight.T",
        "language.layers.0.fc2.weight.T",
        "head",
    ]
    layers = group_by_layer("decoder", names)
    assert [layer.name for layer in layers] == ["language.layers.0", "language.layers.10", "head"]
    assert layers[0].weights == (names[0], names[2])


def test_a_part_of_a_plan() -> None:
    products = tuple(Product(name, "x", name, 4, 4) for name in ("query", "key"))
    plan = ActivationPlan(
        [
            QuantizedActivation("x", products, 1.0),
            QuantizedActivation("y", (Product("up", "y", "up", 4, 4),), 2.0),
        ]
    )
    part = restrict_plan(plan, ["key"])
    assert [[product.weight for product in activation.products] for activation in part.activations] == [["key"]]


@pytest.mark.parametrize("limit", [-1.0, 101.0, float("nan")])
def test_a_limit_outside_its_range(limit: float) -> None:
    with pytest.raises(UsageError, match="from 0 to 100"):
        check_drop_limit(limit, captions=True)


def test_a_limit_on_a_model_that_captions_nothing() -> None:
    check_drop_limit(None, captions=False)
    with pytest.raises(UsageError, match="generates none"):
        check_drop_limit(0.5, captions=False)
