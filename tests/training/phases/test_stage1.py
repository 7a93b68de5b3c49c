"""Stage 1: losses compared with a slow reference, masks entry by entry, frozen parts, several processes."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip2edge.model.masks import TASKS, attention_mask
from blip2edge.training.loading.batches import TextBatch
from blip2edge.training.loading.loader import PictureBatch
from blip2edge.training.phases.stage1 import (
    RepresentationStage,
    draw_negative,
    itm_loss,
    prepare_stage1,
    query_text_similarity,
)
from tests.training import recipes
from tests.training import stage1_worker as worker
from tests.training.drawing_stage1 import QUERIES, draw_batch, draw_stage1, slow_losses


def drawn(draws: list[list[int]]) -> Any:
    """A draw that gives chosen columns: first of pictures, then of texts."""
    columns = iter(draws)
    return lambda weights: torch.tensor(next(columns))


def plain(texts: TextBatch) -> list[list[int]]:
    """The texts without padding."""
    pairs = zip(texts.input_ids.tolist(), texts.attention_mask.sum(dim=1).tolist(), strict=True)
    return [ids[:length] for ids, length in pairs]


@pytest.mark.parametrize("pictures", [None, [5, 9, 5, 2]])
def test_losses_are_those_of_the_paper(pictures: list[int] | None) -> None:
    model = draw_stage1()
    images, texts = draw_batch(4, pictures=pictures)
    draws = [[1, 3, 1, 0], [3, 2, 1, 2]]
    with torch.no_grad():
        losses = model(images, texts, drawn(draws))
        wanted = slow_losses(model, images, plain(texts), pictures or [0, 1, 2, 3], draws)
    assert list(losses) == ["itc", "itm", "itg"]
    for name, value in wanted.items():
        assert losses[name].shape == ()
        assert float(losses[name]) == pytest.approx(value, abs=1e-5)
        assert value > 0.1  # none of them is trivially small


def test_masks_entry_by_entry() -> None:
    text = torch.tensor([[1, 1, 0], [1, 1, 1]])
    queries, tokens = 2, 3
    for task in TASKS:
        mask = attention_mask(task, queries, text)
        assert mask.shape == (2, 5, 5)
        for row in range(2):
            for i in range(queries + tokens):
                for j in range(queries + tokens):
                    text_i, text_j = i >= queries, j >= queries
                    valid = not text_j or bool(text[row, j - queries])
                    allowed = {
                        "itc": text_i == text_j,
                        "itm": True,
                        "itg": (not text_j) or (text_i and j <= i),
                    }[task]
                    assert bool(mask[row, i, j]) == (allowed and valid), (task, row, i, j)
    with pytest.raises(ValueError, match="itx is not one of itc, itm, itg"):
        attention_mask("itx", 2, text)


def test_nothing_but_the_picture_encoder_is_frozen() -> None:
    model = draw_stage1()
    prepare_stage1(model)
    assert not model.vision.training
    before = recipes.tensor_hashes(model.vision)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.no_grad():
        embeds = model.vision(torch.randn(4, 3, 16, 16))
    _, texts = draw_batch(4)
    torch.stack(list(model(embeds, texts).values())).sum().backward()
    trained = dict(model.named_parameters())
    for name, parameter in trained.items():
        assert (parameter.grad is None) == name.startswith("vision."), name
    optimizer.step()
    assert recipes.tensor_hashes(model.vision) == before
    assert float(model.temperature.detach()) != pytest.approx(0.07)


def test_without_a_weight_the_matching_loss_is_left_out() -> None:
    model = draw_stage1()
    whole = RepresentationStage(draw_stage1(), {"itc": 1.0, "itm": 1.0, "itg": 0.5}).eval()
    part = RepresentationStage(model, {"itc": 1.0, "itm": 0.0, "itg": 0.5}).eval()
    with torch.no_grad():
        embeds = model.vision(torch.randn(4, 3, 16, 16))
    _, texts = draw_batch(4)
    batch = PictureBatch(("0", "1", "2", "3"), embeds, 4, texts=texts)
    with torch.no_grad():
        wanted = whole(batch)
    losses = part(batch)
    assert set(losses) == {"itc", "itg", "loss"}
    for name in ("itc", "itg"):
        torch.testing.assert_close(losses[name].detach(), wanted[name])
    torch.testing.assert_close(losses["loss"], losses["itc"] + 0.5 * losses["itg"])
    losses["loss"].backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(dict(model.named_parameters())[name].grad is not None for name in trained), "every rank needs a gradient"
    assert not any("match_head" in name for name in trained)


@torch.no_grad()
def test_dropout_is_on_in_training() -> None:
    model = draw_stage1(dropout=0.5)
    images, texts = draw_batch(3)
    quiet = [model(images, texts, drawn([[1, 2, 0], [1, 2, 0]])) for _ in range(2)]
    model.train()
    noisy = [model(images, texts, drawn([[1, 2, 0], [1, 2, 0]])) for _ in range(2)]
    for name in ("itc", "itm", "itg"):
        assert float(quiet[0][name]) == float(quiet[1][name])
        assert float(noisy[0][name]) != float(noisy[1][name])


def test_negatives_are_drawn_by_similarity_and_never_of_the_same_picture() -> None:
    model = draw_stage1()
    images, texts = draw_batch(4, pictures=[1, 1, 2, 3])
    seen: list[Tensor] = []

    def look(weights: Tensor) -> Tensor:
        seen.append(weights)
        return draw_negative(weights)

    with torch.no_grad():
        model(images, texts, look)
        queries, _ = model.matcher.qformer.read(images)  # type: ignore[operator,union-attr]
        scores = query_text_similarity(
            model.matcher.image_features(images),
            model.matcher.text_embeds(texts.input_ids, texts.attention_mask),
        )
    assert queries.shape == (4, QUERIES, 12)
    for weights, ordered in zip(seen, (scores.t(), scores), strict=True):
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))
        assert weights[0, :2].tolist() == [0, 0]
        assert float(weights[2, 2]) == 0
        ratio = math.exp(float(ordered[2, 0] - ordered[2, 3]) / 0.07)
        assert float(weights[2, 0] / weights[2, 3]) == pytest.approx(ratio, rel=1e-3)
    counts = torch.bincount(torch.stack([draw_negative(seen[0])[2] for _ in range(300)]), minlength=4) / 300
    torch.testing.assert_close(counts, seen[0][2], atol=0.1, rtol=0)


def test_similarities_that_are_not_finite_reach_the_loss() -> None:
    """The training loop then stops with an error that names the samples; drawing negatives does not fail before."""
    assert draw_negative(torch.tensor([[float("nan")] * 3, [0.0, 0.0, 1.0]]))[1] == 2
    model = draw_stage1()
    with torch.no_grad():
        model.temperature.fill_(float("nan"))
        losses = model(*draw_batch(3))
    assert not torch.isfinite(losses["itc"])


def test_a_batch_of_one() -> None:
    model = draw_stage1()
    prepare_stage1(model)
    images, texts = draw_batch(1)
    losses = model(images, texts)
    values = {name: float(value.detach()) for name, value in losses.items()}
    assert values["itc"] == pytest.approx(0.0, abs=1e-6)
    assert values["itm"] == 0.0  # nothing to tell the pair from
    assert values["itg"] > 0.1
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    twins = draw_batch(2, pictures=[4, 4])
    assert float(model(*twins)["itm"].detach()) == 0.0


def test_rows_without_a_negative_do_not_count() -> None:
    logits = torch.tensor([[[0.0, 2.0], [5.0, 1.0]], [[1.0, 0.0], [3.0, 3.0]], [[0.0, 0.0], [0.0, 9.0]]])
    wanted = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1)) + math.log(2)
    assert float(itm_loss(logits, torch.tensor([True, False]))) == pytest.approx(wanted / 6, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    model = draw_stage1()
    images, texts = draw_batch(4)
    draws = [[1, 3, 1, 0], [3, 2, 1, 2]]
    exact = model(images, texts, drawn(draws))
    with torch.autocast("cpu", dtype=dtype):
        rough = model(images, texts, drawn(draws))
    for name, value in rough.items():
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(float(exact[name]), rel=0.1)
        assert float(value) != float(exact[name])


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    model = draw_stage1()
    prepare_stage1(model)
    losses = model(*worker.part(slice(0, 4)), worker.drawn(slice(0, 4)))
    torch.stack(list(losses.values())).sum().backward()
    command = [sys.executable, "-m", "tests.training.stage1_worker"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=Path(__file__).parents[3])
        for rank in range(worker.RANKS)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * worker.RANKS
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    values, gradients = torch.load(tmp_path / "rank-0.pt")
    assert values["itc"] != pytest.approx(float(losses["itc"].detach()), abs=1e-3)  # a rank's own share
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5)
        if not name.endswith("key.bias"):  # which a softmax over the keys does not feel
            assert float(gradient.abs().max()) > 1e-6, name


def test_the_picture_of_the_masks_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[3]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    picture = importlib.import_module("masks_picture")
    assert (root / "docs" / "masks.svg").read_text(encoding="utf-8") == picture.draw()
