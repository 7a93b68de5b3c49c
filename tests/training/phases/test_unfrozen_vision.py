"""A picture encoder that is trained: rates of its layers, gradients, and the weights in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from blip2edge.errors import ConfigError  # noqa: E402
from blip2edge.model.vision.registry import VISION_ENCODERS  # noqa: E402
from blip2edge.model.vision.vit import VisionTransformer  # noqa: E402
from blip2edge.training.config import OptimizerConfig, parse_config  # noqa: E402
from blip2edge.training.loop.optim import (  # noqa: E402
    RATE,
    layer_number,
    layer_rates,
    make_optimizer,
    recompute_activations,
    set_rate,
)
from blip2edge.training.phases.stage2 import GenerativeStage  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from blip2edge.training.setup.checks import check_trained_vision  # noqa: E402
from tests.training import recipes  # noqa: E402
from tests.training.phases.test_stage2 import case, draw  # noqa: E402

TOP = 'seed = 1\nweights_dtype = "float32"'
UNFREEZE = "unfreeze_vision = true"


def weights(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(directory / "model.safetensors")
    return found


def changed(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def run(directory: Path, name: str, stage: str = "stage2", **sections: str) -> dict[str, Any]:
    """Trains with further lines in the recipe, from the same start; returns the weights."""
    path = recipes.write(directory / f"{name}.toml", TOP, **sections)
    train(stage, path, directory / name, evaluation_scenes=0)
    return weights(directory / name)


def test_the_rule_of_the_rates() -> None:
    assert layer_rates(2, 0.5) == [0.125, 0.25, 0.5, 1.0]
    names = ("class_embedding", "position_embedding", "patch_embedding.weight", "pre_norm.bias")
    assert {layer_number(name, 2) for name in names} == {0}
    assert layer_number("layers.0.norm1.weight", 2) == 1
    assert layer_number("layers.1.attention.qkv.bias", 2) == 2
    assert layer_number("post_norm.weight", 2) == 3


def test_each_factor_has_its_own_groups(tmp_path: Path) -> None:
    made = case(draw("opt", tmp_path), tmp_path)
    stage = GenerativeStage(made.ours, unfreeze_vision=True)
    vision: Any = made.ours.vision
    layers = len(vision.layers)
    rates = layer_rates(layers, 0.5)

    def rate_of(name: str) -> float:
        part, _, rest = name.partition(".")
        return rates[layer_number(rest, layers)] if part == "vision" else 1.0

    optimizer = make_optimizer([stage], OptimizerConfig(), rate_of)
    set_rate(optimizer, 0.1)
    given = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    trained = {name: each for name, each in stage.named_parameters() if each.requires_grad}
    assert len(given) == len(trained)
    for name, each in trained.items():
        assert given[id(each)] == pytest.approx(0.1 * rate_of(name)), name
    assert [group[RATE] for group in optimizer.param_groups] == [rate for rate in reversed(rates) for _ in range(2)]


@pytest.mark.parametrize("kind", ["opt", "llava"])
def test_the_loss_is_that_of_the_frozen_encoder_and_every_weight_gets_a_gradient(kind: str, tmp_path: Path) -> None:
    theirs, bridge = draw(kind, tmp_path), "mlp" if kind == "llava" else "qformer"
    frozen = case(theirs, tmp_path)
    wanted = float(GenerativeStage(frozen.ours, bridge).eval()(frozen.batch)["loss"].detach())
    gradients = []
    for recomputed in (False, True):
        made = case(theirs, tmp_path)
        stage = GenerativeStage(made.ours, bridge, unfreeze_vision=True).eval()
        if recomputed:
            recompute_activations(made.ours.vision)
            recompute_activations(made.ours.vision)  # a second time changes nothing
        loss = stage(made.batch._replace(image_embeds=made.inputs["pixel_values"]))["loss"]
        assert float(loss.detach()) == pytest.approx(wanted, rel=1e-6)
        loss.backward()
        gradients.append({name: each.grad for name, each in made.ours.vision.named_parameters()})
    first, second = gradients
    assert all(each is not None and float(each.abs().max()) > 0 for each in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_checkpoint_has_the_trained_encoder(tmp_path: Path) -> None:
    plain = run(tmp_path, "plain")
    trained = run(tmp_path, "trained", stage2=UNFREEZE)
    vision = {name for name in plain if name.startswith("vision_model.")}
    assert vision <= changed(plain, trained)
    assert not any(name.startswith("language_model.") for name in changed(plain, trained))


@pytest.mark.slow
def test_layers_far_from_the_output_move_less(tmp_path: Path) -> None:
    plain = run(tmp_path, "plain")
    vision = {name for name in plain if name.startswith("vision_model.")}
    slow = run(tmp_path, "slow", stage2=f"{UNFREEZE}\nlayer_decay = 1e-12")
    # The lower layers stand still; the norm after the layers has the full rate.
    assert changed(plain, slow) & vision == {f"vision_model.post_layernorm.{part}" for part in ("weight", "bias")}


@pytest.mark.slow
def test_stage_1_trains_it_too_and_stage_2_goes_on_from_it(tmp_path: Path) -> None:
    both = run(tmp_path, "both", stage1=UNFREEZE)
    alone = run(tmp_path, "alone", "stage1", stage1=UNFREEZE)
    plain = run(tmp_path, "plain", "stage1")
    moved = {name for name in changed(plain, alone) if name.startswith("vision_model.")}
    assert moved == {name for name in plain if name.startswith("vision_model.")}
    assert all(torch.equal(both[name], alone[name]) for name in moved)


def test_a_trained_encoder_is_in_float32_over_a_frozen_language_model_in_half_precision(tmp_path: Path) -> None:
    found = run(tmp_path, "half", stage2=UNFREEZE, loop='frozen_dtype = "bfloat16"')
    rounded = {name for name, each in found.items() if torch.equal(each, each.bfloat16().float())}
    assert {name for name in found if name.startswith("language_model.")} <= rounded
    assert not {name for name in rounded if name.startswith("vision_model.") and found[name].ndim > 1}


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    sections = {"stage1": UNFREEZE, "stage2": f"{UNFREEZE}\nlayer_decay = 0.5"}
    whole = run(tmp_path, "whole", loop="snapshot_every = 2", **sections)
    path = recipes.write(tmp_path / "resumed.toml", TOP, loop="snapshot_every = 2", **sections)
    for phase in ("stage1", "stage2"):

        def interrupt(stage: str, done: int, total: int, phase: str = phase) -> None:
            if stage == phase and done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train("stage2", path, tmp_path / "resumed", evaluation_scenes=0, progress=interrupt)
    train("stage2", path, tmp_path / "resumed", evaluation_scenes=0)
    assert not changed(whole, weights(tmp_path / "resumed"))


def test_another_kind_of_encoder_is_refused_and_the_supported_ones_are_named() -> None:
    config = parse_config(f"[stage2]\n{UNFREEZE}")
    given = SimpleNamespace(vision=SimpleNamespace(kind="dinov2"))
    kinds = [name for name, row in VISION_ENCODERS.items() if row.build is VisionTransformer]
    named = " and ".join(kinds)
    said = rf"\[stage2\] unfreeze_vision trains picture encoders of the kinds {named}, and .* kind 'dinov2'"
    with pytest.raises(ConfigError, match=said):
        check_trained_vision(given, config)  # type: ignore[arg-type]  # what the check reads of it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[stage2]\nlayer_decay = 0.9", r"\[stage2\] layer_decay is 0.9, but the picture encoder is frozen"),
        ("[instruct]\nunfreeze_vision = true\nlayer_decay = 0.0", "layer_decay must be greater than 0 and at most 1"),
        (
            "[stage1]\nunfreeze_vision = true\n[loop]\ncache_features = true",
            r"\[stage1\] unfreeze_vision does not work with \[loop\] cache_features",
        ),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(text)
