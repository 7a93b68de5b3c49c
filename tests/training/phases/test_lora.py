"""LoRA on the language model: the loss at the first step, what is trained, and the merged checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from blip2edge.errors import ConfigError, MissingPackageError  # noqa: E402
from blip2edge.training.config import parse_config  # noqa: E402
from blip2edge.training.loop.optim import recompute_activations  # noqa: E402
from blip2edge.training.phases.stage2 import GenerativeStage  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from blip2edge.training.setup import lora  # noqa: E402
from blip2edge.training.setup.lora import MARK, add_lora, merge_lora  # noqa: E402
from tests.training import recipes  # noqa: E402
from tests.training.phases.test_stage2 import case, draw  # noqa: E402

TOP = 'seed = 1\nweights_dtype = "float32"'


def count(module: Any) -> int:
    return sum(MARK in name for name, _ in module.named_parameters())


@pytest.mark.parametrize("kind", ["opt", "t5", "llava"])
def test_lora_begins_at_the_loss_without_it_and_ends_in_the_weights(kind: str, tmp_path: Path) -> None:
    theirs = draw(kind, tmp_path)
    bridge = "mlp" if kind == "llava" else "qformer"
    plain = case(theirs, tmp_path)
    wanted = float(GenerativeStage(plain.ours, bridge).eval()(plain.batch)["loss"].detach())
    made = case(theirs, tmp_path)
    names = set(made.ours.state_dict())
    add_lora(made.ours.language, 4, 8.0, "all")
    stage = GenerativeStage(made.ours, bridge)
    assert float(stage.eval()(made.batch)["loss"].detach()) == wanted
    trained = {name for name, part in stage.named_parameters() if part.requires_grad}
    assert {name for name in trained if name.startswith("language.")} == {
        name for name, _ in stage.named_parameters() if MARK in name
    }
    assert all(".layers." in name for name in trained if MARK in name)
    optimizer = torch.optim.SGD([part for part in stage.parameters() if part.requires_grad], lr=0.05)
    recompute_activations(stage.language)
    stage.train()
    for _ in range(3):
        loss = stage(made.batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        adapted = float(stage.eval()(made.batch)["loss"])
        merge_lora(made.ours.language)
        assert set(made.ours.state_dict()) == names
        assert adapted != wanted
        assert float(stage(made.batch)["loss"]) == pytest.approx(adapted, rel=1e-5)


def test_attention_alone(tmp_path: Path) -> None:
    made = case(draw("opt", tmp_path), tmp_path)
    language = made.ours.language
    add_lora(language, 2, 2.0, "attention")
    layers = len(language.layers)
    assert count(language) == layers * 4 * 2  # A and B of query, key, value and output
    merge_lora(language)
    merge_lora(language)  # nothing is left to merge
    assert count(language) == 0


def test_a_run_with_lora_over_half_precision(tmp_path: Path) -> None:
    """Only the targets change; the checkpoint has the names of one without LoRA."""
    weights = {}
    for name, rank in (("plain", 0), ("lora", 4)):
        path = recipes.write(
            tmp_path / f"{name}.toml",
            TOP,
            loop='frozen_dtype = "bfloat16"',
            stage2=f"lora_rank = {rank}\nlora_alpha = 64.0",
        )
        train("stage2", path, tmp_path / name, evaluation_scenes=0)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    plain, adapted = weights["plain"], weights["lora"]
    assert plain.keys() == adapted.keys()
    changed = {
        name for name in plain if name.startswith("language_model.") and not torch.equal(plain[name], adapted[name])
    }
    assert changed
    assert all("self_attn" in name and name.endswith("weight") for name in changed)


@pytest.mark.slow
def test_a_resumed_run_with_lora_ends_with_the_same_weights(tmp_path: Path) -> None:
    path = recipes.write(tmp_path / "recipe.toml", TOP, loop="snapshot_every = 2", stage2="lora_rank = 4")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "stage2" and done == 3:
            raise KeyboardInterrupt

    train("stage2", path, tmp_path / "whole", evaluation_scenes=0)
    with pytest.raises(KeyboardInterrupt):
        train("stage2", path, tmp_path / "resumed", evaluation_scenes=0, progress=interrupt)
    train("stage2", path, tmp_path / "resumed", evaluation_scenes=0)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_cannot_be_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\[stage2\] lora_rank is above 0 and unfreeze_language is true"):
        parse_config("[stage2]\nlora_rank = 4\nunfreeze_language = true")

    def absent(*given: Any) -> Any:
        raise MissingPackageError("LoRA needs peft, which is not installed", "install it")

    monkeypatch.setattr(lora, "require", absent)
    with pytest.raises(MissingPackageError):
        add_lora(torch.nn.Linear(1, 1), 1, 1.0, "all")
