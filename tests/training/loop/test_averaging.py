"""Averages of the trained weights: the formula, where they are used, and a run that is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from blip2edge.errors import ConfigError  # noqa: E402
from blip2edge.training.config import parse_config  # noqa: E402
from blip2edge.training.loop import loop as loops  # noqa: E402
from blip2edge.training.loop.averaging import Averages  # noqa: E402
from blip2edge.training.loop.snapshots import Snapshot  # noqa: E402
from blip2edge.training.phases import registry  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from tests.training import recipes  # noqa: E402

TOP = 'seed = 1\nweights_dtype = "float32"'
BRIDGE = "language_projection.weight"


def weights(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(directory / "model.safetensors")
    return found


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_formula_and_the_exchange() -> None:
    module = nn.Linear(1, 1)
    module.bias.requires_grad_(False)
    values = [float(value) for value in torch.randn(20, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        module.weight.fill_(values[0])
    averages, expected = Averages(module, 0.5), values[0]
    for number, value in enumerate(values[1:]):
        with torch.no_grad():
            module.weight.fill_(value)
        averages.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
    with averages.applied():
        assert module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert module.weight.item() == pytest.approx(values[-1], rel=1e-6)
    tensors, facts = averages.state()
    assert list(tensors) == ["average.weight"]
    again = Averages(module, 0.5)
    again.restore(Snapshot(tensors, json.loads(json.dumps(facts))))
    for each in (averages, again):
        each.update()
    assert torch.equal(averages.state()[0]["average.weight"], again.state()[0]["average.weight"])
    assert averages.state()[1] == again.state()[1] == {"averaged": 20}


def test_a_snapshot_without_averages_starts_them_at_its_weights() -> None:
    module = nn.Linear(1, 1)
    averages = Averages(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(7.0)
    averages.restore(Snapshot({}, {}))
    assert averages.state()[0]["average.weight"].item() == 7.0


def test_a_step_that_is_skipped_is_not_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With float16 a step whose gradients overflow is skipped."""
    counts = {"updates": 0}
    monkeypatch.setattr(Averages, "update", lambda self: counts.update(updates=counts["updates"] + 1))
    optimizers = pytest.importorskip("accelerate.optimizer")
    monkeypatch.setattr(optimizers.AcceleratedOptimizer, "step_was_skipped", property(lambda self: True))
    path = recipes.write(tmp_path / "recipe.toml", TOP, loop="ema_decay = 0.9")
    train("stage1", path, tmp_path / "out", evaluation_scenes=0)
    assert counts["updates"] == 0


@pytest.mark.slow
def test_averages_change_the_checkpoint_and_no_step(tmp_path: Path) -> None:
    losses, found = {}, {}
    for name, loop in (
        ("plain", "log_every = 1"),
        ("averaged", "log_every = 1\nema_decay = 0.9"),
        ("validation", 'log_every = 1\nema_decay = 0.9\nema_weights = "validation"'),
    ):
        path = recipes.write(tmp_path / f"{name}.toml", TOP, loop=loop)
        train("stage2", path, tmp_path / name, evaluation_scenes=0)
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if line["phase"] == "vision"]
        found[name] = weights(tmp_path / name)
    assert losses["plain"] == losses["averaged"] == losses["validation"]
    assert equal(found["plain"], found["validation"])
    assert not torch.equal(found["plain"][BRIDGE], found["averaged"][BRIDGE])


@pytest.mark.parametrize(("where", "scored"), [("everywhere", True), ("validation", True), ("checkpoint", False)])
def test_validation_scores_the_weights_that_the_recipe_names(
    where: str, scored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def scores(data: Any, captioner: Any) -> Any:
        def score() -> dict[str, float]:
            seen["weights"] = {name: each.clone() for name, each in seen["phase"].module.named_parameters()}
            return {"exact_match": 0.5}

        return score

    prepare, update = loops._prepare, Averages.update

    def prepared(run: Any, phase: Any) -> Any:
        found = prepare(run, phase)
        seen.update(phase=phase, averages=found.averages)
        return found

    def updated(self: Averages) -> None:
        update(self)
        name = next(iter(self._trained))
        seen["last"], seen["mean"] = self._trained[name].detach().clone(), self._averages[name].clone()
        seen["name"] = name

    monkeypatch.setattr(registry, "validation_scores", scores)
    monkeypatch.setattr(loops, "_prepare", prepared)
    monkeypatch.setattr(Averages, "update", updated)
    path = recipes.write(
        tmp_path / "recipe.toml",
        TOP,
        loop=f'ema_decay = 0.9\nema_weights = "{where}"',
        validation="every = 4\npictures = 2\nkeep_best = false",
    )
    train("stage2", path, tmp_path / "out", evaluation_scenes=0)
    assert not torch.equal(seen["last"], seen["mean"])
    assert torch.equal(seen["weights"][seen["name"]], seen["mean"] if scored else seen["last"])
    ended = dict(seen["phase"].module.named_parameters())[seen["name"]]
    assert torch.equal(ended, seen["last"] if where == "validation" else seen["mean"])


@pytest.mark.slow
def test_a_resumed_run_has_the_same_averages(tmp_path: Path) -> None:
    path = recipes.write(tmp_path / "recipe.toml", TOP, loop="snapshot_every = 2\nema_decay = 0.9")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "stage2" and done == 3:
            raise KeyboardInterrupt

    train("stage2", path, tmp_path / "whole", evaluation_scenes=0)
    with pytest.raises(KeyboardInterrupt):
        train("stage2", path, tmp_path / "resumed", evaluation_scenes=0, progress=interrupt)
    train("stage2", path, tmp_path / "resumed", evaluation_scenes=0)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[loop]\nema_decay = 1.0", r"\[loop\] ema_decay must be at least 0 and less than 1, not 1.0"),
        ("[loop]\nema_weights = 'checkpoint'", "ema_decay is 0: there are no averaged weights"),
        (
            "[loop]\nema_decay = 0.9\nema_weights = 'checkpoint'\n[validation]\nevery = 1",
            r"does not work with keep_best in \[validation\]",
        ),
        ("[loop]\nema_decay = 0.9\nema_weights = 'both'", "ema_weights must be one of everywhere, checkpoint, valid"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(text)
