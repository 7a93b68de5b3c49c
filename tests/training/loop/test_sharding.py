"""Sharded parameters (FSDP): losses and weights of two processes with and without, for each family; resumed runs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from blip2edge.errors import ConfigError
from blip2edge.model.layers import entry_points
from blip2edge.training.config import parse_config
from blip2edge.training.loop.optim import recompute_activations, transformer_layers
from blip2edge.training.loop.sharding import shard, views_allowed
from blip2edge.training.phases.stage2 import GenerativeStage
from blip2edge.training.run import train
from tests.families import drawing_idefics
from tests.training import recipes
from tests.training.phases.test_stage2 import case, draw

TOP = 'seed = 1\nweights_dtype = "float32"'
PROMPTS = ("what is it ?", "a dog", "is it red")  # of an InstructBLIP
FAMILIES = ("opt", "t5", "llava", "flamingo", "instruct-t5")
VIEW = "FSDP2-wrapped module"  # begins torch's warning of a layer that returns a view
ALL = 'frozen_dtype = "bfloat16"\nrecompute_activations = true\nema_decay = 0.9\nsnapshot_every = 2'


VALIDATED = f"""
weights_dtype = "float32"
[model]
checkpoint = "{Path(__file__).parents[3] / "examples" / "checkpoint"}"
[loop]
fsdp = {{fsdp}}
ema_decay = 0.5
snapshot_every = 2
[validation]
every = 2
pictures = 12
max_new_tokens = 20
num_beams = 2
metric = "cider_d"
[stage2]
steps = 4
batch_size = {{rows}}
warmup_steps = 1
learning_rate = 4e-3
unfreeze_vision = true
"""


@pytest.fixture(scope="module", name="results")
def _results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    root = tmp_path_factory.mktemp("sharded")
    for kind in FAMILIES:
        directory = root / f"family-{kind}"
        if kind == "flamingo":
            drawing_idefics.draw_idefics(directory, 3, use_resampler=True)
        else:
            draw(kind, directory)
    for name, fsdp in (("plain", "false"), ("spread", "true")):
        loop = f"fsdp = {fsdp}\nlog_every = 1"
        recipes.write(root / f"{name}.toml", TOP, loop=loop, stage2="itg_weight = 1.0\naccumulate = 2")
        recipes.write(
            root / f"{name}-all.toml",
            TOP,
            loop=f"{loop}\n{ALL}",
            stage1="unfreeze_vision = true\nlayer_decay = 0.8",
            stage2="lora_rank = 4\nitg_weight = 1.0",
        )
    for name, fsdp, rows in (("one", "false", 4), ("two", "true", 2)):
        (root / f"validated-{name}.toml").write_text(VALIDATED.format(fsdp=fsdp, rows=rows))
    done = subprocess.run(
        [sys.executable, "-W", f"error:{VIEW}:UserWarning", "-m", "tests.training.sharded", str(root)],
        check=False,
        timeout=1200,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(name="alone")
def _alone(tmp_path: Path) -> Iterator[Any]:
    """The accelerator of a process that is the only one of its process group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["t5", "flamingo", "instruct-t5"])
def test_undo_restores_each_entry_point(kind: str, recompute: bool, alone: Any, tmp_path: Path) -> None:
    """Twice, as in a run of two phases: with the same methods the stage has the same loss."""
    if kind == "flamingo":
        drawing_idefics.draw_idefics(tmp_path, 3, use_resampler=True)
        made = case(None, tmp_path)
    else:
        draw(kind, tmp_path)
        made = case(None, tmp_path, **({"prompts": PROMPTS} if "instruct" in kind else {}))
    stage = GenerativeStage(made.ours, "flamingo" if kind == "flamingo" else "qformer").eval()
    if recompute:
        recompute_activations(stage)
    layers = transformer_layers(stage)
    before = [{name: vars(layer).get(name) for name in entry_points(layer)} for layer in layers]
    assert any(name != "forward" for names in before for name in names)
    assert all((value is not None) == recompute for names in before for value in names.values())
    plain = stage(made.batch)["loss"]
    for _ in range(2):
        sharding = shard(alone, (stage, made.ours.vision))
        assert all(isinstance(layer, FSDPModule) for layer in layers), "sharded layer by layer"
        with views_allowed():
            assert torch.equal(stage(made.batch)["loss"], plain)
        sharding.undo()
        assert not any(isinstance(each, FSDPModule) for each in stage.modules())
        after = [{name: vars(layer).get(name) for name in entry_points(layer)} for layer in layers]
        assert [[*names.items()] for names in after] == [[*names.items()] for names in before]
        for layer in layers:
            for name in entry_points(layer):
                with pytest.raises(TypeError, match="required positional argument"):  # of the method itself
                    getattr(layer, name)()
        loss = stage(made.batch)["loss"]
        assert torch.equal(loss, plain)
        loss.backward()


def test_parameters_without_dimensions_are_in_the_order_of_the_module(alone: Any) -> None:
    """All processes average their gradients in this order, which must not depend on addresses."""
    drawn = [nn.Parameter(torch.tensor(float(number))) for number in range(64)]
    random.Random(1).shuffle(drawn)
    module = nn.Module()
    module.gates = nn.ParameterList(drawn)
    sharding = shard(alone, (module,))
    assert [each.item() for each in sharding.scalars] == [each.item() for each in drawn]
    sharding.undo()


def test_warnings_are_those_of_before(alone: Any, tmp_path: Path) -> None:
    """Only within `views_allowed` torch is silent about views."""
    draw("t5", tmp_path)
    made = case(None, tmp_path)
    stage = GenerativeStage(made.ours).eval()
    filters = list(warnings.filters)
    sharding = shard(alone, (stage,))
    assert warnings.filters == filters
    with views_allowed():
        stage(made.batch)
    assert warnings.filters == filters
    with pytest.warns(UserWarning, match=VIEW):
        stage(made.batch)
    sharding.undo()


@pytest.mark.slow  # two processes for each family, with and without
@pytest.mark.parametrize("name", [*FAMILIES, "opt-lora", "t5-lora"])
def test_each_family_makes_the_steps_of_plain_parameters(name: str, results: dict[str, Any]) -> None:
    """With LoRA: with recomputed activations, OPT over half precision."""
    found = results["families"][name]
    assert found["ends"] == [0] * 4
    plain, spread = found["losses"]
    assert spread[0] == pytest.approx(plain[0], rel=1e-6)
    assert spread == pytest.approx(plain, rel=1e-3)  # the drawn weights are large, so rounding grows
    assert plain[0] != plain[-1]
    assert found["gradient"] < 1e-5
    assert found["share"] < 0.6, "each process holds about half"
    assert found["same_classes"], "afterwards the modules are plain ones again"


@pytest.mark.slow
def test_a_run_ends_with_the_losses_and_weights_of_a_plain_one(results: dict[str, Any]) -> None:
    """All phases; "all" also has EMA, LoRA, half precision, recomputed activations and a trained picture encoder."""
    found = results["recipes"]
    assert [found["ends"][name] for name in ("plain", "spread", "plain-all", "spread-all")] == [[0, 0]] * 4
    for plain, spread in found["losses"].values():
        assert len(plain) == 16
        assert spread == pytest.approx(plain, rel=1e-4)
    assert found["difference"] < 5e-5


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(results: dict[str, Any]) -> None:
    found = results["recipes"]
    assert all(-signal.SIGKILL in found["ends"][name] for name in ("killed-11", "killed-4"))
    assert found["ends"]["resumed"] == [0, 0]
    assert found["same"]
    assert found["same_log"]


@pytest.mark.slow
def test_validations_of_sharded_parameters_have_the_scores_of_one_process(results: dict[str, Any]) -> None:
    """With beams, averaged weights and a trained picture encoder; also if the run is killed and resumed."""
    found = results["validated"]
    assert found["ends"]["one"] == [0]
    assert found["ends"]["two"] == found["ends"]["resumed"] == [0, 0]
    assert -signal.SIGKILL in found["ends"]["killed"]
    assert found["ends"]["failed"] == [1, 1], "an error in the first process ends both, and none waits"
    one, two, resumed = found["scores"]
    assert len(one) == 2
    assert 0 < one[0]["cider_d"] < 10, "neither nothing nor everything is right"
    assert two == resumed
    assert found["best"][1] == found["best"][2]
    assert found["difference"] < 5e-3  # a large rate: AdamW makes whole steps of rounding
    for alone, together in zip(one, two, strict=True):  # so one of the captions may differ
        assert together["cider_d"] == pytest.approx(alone["cider_d"], abs=10 / alone["n"])
        assert together["rouge_l"] == pytest.approx(alone["rouge_l"], abs=1 / alone["n"])
    assert found["best"][0]["steps"] == found["best"][1]["steps"]
    assert found["same"]


def test_one_process_is_told_to_start_several(tmp_path: Path) -> None:
    path = recipes.write(tmp_path / "recipe.toml", loop="fsdp = true")
    with pytest.raises(ConfigError, match="fsdp is true, but there is only one process; start several: torchrun"):
        train("stage2", path, tmp_path / "out")
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("fsdp", ["false", "true"])
@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("ACCELERATE_USE_FSDP", r"the model with FSDP \(ACCELERATE_USE_FSDP=true\); leave --use_fsdp out"),
        ("ACCELERATE_USE_DEEPSPEED", "the model with DeepSpeed .*; leave --use_deepspeed out"),
        ("ACCELERATE_USE_MEGATRON_LM", "the model with Megatron-LM .*; leave --use_megatron_lm out"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism config .*; leave --use_parallelism_config out"),
    ],
)
def test_a_launcher_that_divides_the_model_is_refused(
    variable: str, said: str, fsdp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the start, whatever `fsdp` is: the variables are those that `accelerate launch` sets."""
    monkeypatch.setenv(variable, "true")
    path = recipes.write(tmp_path / "recipe.toml", loop=f"fsdp = {fsdp}")
    with pytest.raises(ConfigError, match=said):
        train("stage2", path, tmp_path / "out")
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[loop]\nfsdp = true\nautocast = 'float16'", "fsdp does not work with autocast = 'float16'"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(text)
