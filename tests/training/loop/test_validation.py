"""Validation during stage 2: scores, the best weights, early stop, and a run that is interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from accelerate import Accelerator  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from blip2edge.errors import ConfigError, DataError, ProcessError  # noqa: E402
from blip2edge.training.config import ValidationConfig, parse_config  # noqa: E402
from blip2edge.training.data.scenes import scenes  # noqa: E402
from blip2edge.training.evaluation.pipeline import evaluate  # noqa: E402
from blip2edge.training.loop import validation as validation_module  # noqa: E402
from blip2edge.training.loop.snapshots import Snapshot  # noqa: E402
from blip2edge.training.loop.validation import Validation  # noqa: E402
from blip2edge.training.phases import registry  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from tests.training import recipes  # noqa: E402

TOP = 'seed = 1\nweights_dtype = "float32"'
EVERY = "every = 1\npictures = 4\nmax_new_tokens = 6\n"


def weights(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(directory / "model.safetensors")
    return found


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def planned(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Validations give these scores, in order."""
    left: Iterator[float] = iter(values)
    monkeypatch.setattr(registry, "validation_scores", lambda *_: lambda: {"exact_match": next(left)})


def test_a_validation_changes_no_step_and_scores_as_eval_does(tmp_path: Path) -> None:
    plain = recipes.write(tmp_path / "plain.toml", TOP, loop="log_every = 1")
    train("stage2", plain, tmp_path / "plain", evaluation_scenes=0)
    scored = recipes.write(
        tmp_path / "scored.toml",
        TOP,
        loop="log_every = 1",
        validation=f'{EVERY}keep_best = false\nmetric = "rouge_l"\nnum_beams = 3',
    )
    lines: list[str] = []
    record = train("stage2", scored, tmp_path / "scored", evaluation_scenes=0, log=lines.append)
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "scored"))
    with_scores = [line for line in logged(tmp_path / "scored") if line["phase"] == "stage2"]
    assert [line["loss"] for line in with_scores] == [
        line["loss"] for line in logged(tmp_path / "plain") if line["phase"] == "stage2"
    ]
    found = record["phases"]["stage2"]["validation"]
    assert found["steps"] == [1, 2, 3, 4]
    assert found["metric"] == "rouge_l"
    assert "validation" not in record["phases"]["stage1"]
    bundle_free = evaluate(tmp_path / "scored", count=4, metrics=("exact", "captions"), max_new_tokens=6, num_beams=3)
    assert with_scores[-1]["validation"]["rouge_l"] == pytest.approx(bundle_free["rouge_l"], abs=1e-9)
    assert any(line.startswith("stage2: step 4 rouge_l ") for line in lines)


def test_the_phase_ends_with_its_best_weights_and_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, [0.2, 0.9, 0.4, 0.4])
    path = recipes.write(tmp_path / "recipe.toml", TOP, validation=f"{EVERY}patience = 2")
    lines: list[str] = []
    record = train("stage2", path, tmp_path / "best", evaluation_scenes=0, log=lines.append)
    found = record["phases"]["stage2"]
    assert found["validation"] == {"metric": "exact_match", "best": 0.9, "best_step": 2, "steps": [1, 2, 3, 4]}
    assert any("stops at step 4" in line for line in lines)
    planned(monkeypatch, [0.9, 0.1, 0.1])
    seen: list[tuple[str, int, int]] = []
    train("stage2", path, tmp_path / "early", evaluation_scenes=0, progress=lambda *state: seen.append(state))
    assert seen[-2:] == [("stage2", 2, 4), ("stage2", 3, 3)]  # complete: no bar that waits for the fourth step
    # Other later scores, the same best step: the weights are the same.
    planned(monkeypatch, [0.2, 0.9, 0.1, 0.1])
    record = train("stage2", path, tmp_path / "again", evaluation_scenes=0)
    assert equal(weights(tmp_path / "best"), weights(tmp_path / "again"))
    planned(monkeypatch, [0.2, 0.1, 0.1, 0.95])
    train("stage2", path, tmp_path / "other", evaluation_scenes=0)
    assert not equal(weights(tmp_path / "best"), weights(tmp_path / "other"))


@pytest.mark.slow
def test_an_interrupted_run_keeps_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipes.write(tmp_path / "recipe.toml", TOP, loop="snapshot_every = 3", validation=EVERY)
    planned(monkeypatch, [0.2, 0.9, 0.4, 0.5])
    whole = train("stage2", path, tmp_path / "whole", evaluation_scenes=0)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "stage2" and done == 4:
            raise KeyboardInterrupt

    planned(monkeypatch, [0.2, 0.9, 0.4, 0.5])
    with pytest.raises(KeyboardInterrupt):
        train("stage2", path, tmp_path / "resumed", evaluation_scenes=0, progress=interrupt)
    planned(monkeypatch, [0.5])
    resumed = train("stage2", path, tmp_path / "resumed", evaluation_scenes=0)
    assert resumed["phases"]["stage2"]["validation"] == whole["phases"]["stage2"]["validation"]
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))


def test_best_weights_and_state() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    values = iter([0.1, 0.5, 0.5])
    validation = Validation(
        ValidationConfig(every=2, patience=1), lambda: {"score": next(values), "text": "x"}, "score", Accelerator()
    )
    kept = {}
    assert [validation.due(step, 5) for step in range(1, 6)] == [False, True, False, True, True]
    for step in (2, 4, 5):
        with torch.no_grad():
            module.weight.fill_(step)
        assert validation.run(step, module) == {"score": validation.best}
        kept[step] = validation.exhausted
    assert kept == {2: False, 4: False, 5: True}
    tensors, facts = validation.state()
    assert list(tensors) == ["best.weight"]
    again = Validation(validation.config, dict, "score", validation.accelerator)
    again.restore(Snapshot(tensors, json.loads(json.dumps(facts))))
    again.finish(module)
    assert module.weight.unique().tolist() == [4]
    assert again.figures() == validation.figures()


def test_a_metric_that_the_data_does_not_have(tmp_path: Path) -> None:
    path = recipes.write(tmp_path / "recipe.toml", TOP, validation=f'{EVERY}metric = "vqa_accuracy"')
    with pytest.raises(ConfigError, match=r"metric = 'vqa_accuracy' cannot be computed on scenes; set metric to exact"):
        train("stage2", path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"\[validation\] kind = 'folder' expects a path"):
        parse_config('[validation]\nkind = "folder"\nevery = 1')


def validated_folder(directory: Path, broken: set[int]) -> str:
    """The section [validation] for a folder of four pictures, some of them broken."""
    pictures = directory / "held-out"
    pictures.mkdir()
    for number, scene in enumerate(scenes(4, split="heldout")):
        scene.picture.save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(scene.caption)
    for number in broken:
        (pictures / f"{number}.png").write_bytes(b"no picture")
    return f'{EVERY}kind = "folder"\npath = "held-out"\n'


@pytest.mark.parametrize(("broken", "most", "said"), [({0, 1, 2, 3}, 100, "4 samples"), ({0, 1}, 1, "2 samples")])
def test_broken_pictures_of_the_validation_are_found_before_the_first_step(
    broken: set[int], most: int, said: str, tmp_path: Path
) -> None:
    section = validated_folder(tmp_path, broken) + f"max_broken = {most}\n"
    path = recipes.write(tmp_path / "recipe.toml", TOP, validation=section)
    with pytest.raises(DataError, match=f"{said} are broken.*0.png"):
        train("stage2", path, tmp_path / "out", progress=lambda *_: pytest.fail("a step was made"))


def test_a_few_broken_pictures_of_the_validation_are_counted_and_left_out(tmp_path: Path) -> None:
    section = validated_folder(tmp_path, {1}) + "max_broken = 1\n"  # counted once, also by each validation
    path = recipes.write(tmp_path / "recipe.toml", TOP, validation=section)
    lines: list[str] = []
    record = train("stage2", path, tmp_path / "out", evaluation_scenes=0, log=lines.append)
    assert lines[1].startswith("validation: 1 sample is broken and left out: 1.png (")
    assert record["phases"]["stage2"]["validation"]["steps"] == [1, 2, 3, 4]


def test_stage_1_says_that_it_is_not_validated(tmp_path: Path) -> None:
    path = recipes.write(tmp_path / "recipe.toml", TOP, validation=EVERY)
    lines: list[str] = []
    train("stage1", path, tmp_path / "out", log=lines.append)
    assert lines[1] == "stage1: [validation] is not used: stage 1 generates no captions"


def scored(*scores: object) -> Validation:
    """A validation that gives these scores, in order; an exception is raised."""
    left = iter(scores)

    def score() -> dict[str, Any]:
        value = next(left)
        if isinstance(value, Exception):
            raise value
        return {"score": value, "text": "x", "flag": True}

    return Validation(ValidationConfig(every=1, patience=2), score, "score", Accelerator())


def test_nan_is_worse_than_any_score() -> None:
    module, validation = nn.Linear(1, 1), scored(float("nan"), -5.0, float("nan"), float("nan"))
    for step in range(1, 5):
        with torch.no_grad():
            module.weight.fill_(step)
        validation.run(step, module)
        assert validation.exhausted is (step == 4)
    assert (validation.best, validation.best_step) == (-5.0, 2)
    validation.finish(module)
    assert module.weight.item() == 2
    never = scored(float("nan"))
    never.run(1, module)
    assert (never.best, never.best_step, never.tensors) == (None, 0, {})
    never.finish(module)
    assert module.weight.item() == 2


def test_numbers_of_numpy_are_numbers() -> None:
    validation, module = scored(np.float32(0.5), np.int64(3)), nn.Linear(1, 1)
    found = [validation.run(step, module) for step in (1, 2)]
    assert json.dumps(found) == '[{"score": 0.5}, {"score": 3}]'
    assert validation.best == 3


def test_an_error_of_the_first_process_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def broadcast(found: list[Any]) -> list[Any]:
        sent.append(found)
        return found

    monkeypatch.setattr(validation_module, "broadcast_object_list", broadcast)
    module = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no pictures"):
        scored(ValueError("no pictures")).run(1, module)
    assert module.training
    monkeypatch.setattr(validation_module, "broadcast_object_list", lambda _: sent[0])
    other = scored()
    other.accelerator = type("Second", (), {"is_main_process": False})()
    with pytest.raises(ProcessError, match="after step 1 failed in the first process: ValueError: no pictures"):
        other.run(1, module)
    assert other.steps == []
