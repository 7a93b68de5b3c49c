"""Sharded parameters (FSDP): losses and weights of two processes with and without, for each family; resumed runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from blip2edge.errors import ConfigError
from blip2edge.training.config import parse_config
from blip2edge.training.run import train
from tests.families import drawing_idefics
from tests.training import recipes
from tests.training.phases.test_stage2 import draw

TOP = 'seed = 1\nweights_dtype = "float32"'
FAMILIES = ("opt", "t5", "llava", "flamingo", "instruct-t5")
ALL = 'frozen_dtype = "bfloat16"\nrecompute_activations = true\nema_decay = 0.9\nsnapshot_every = 2'


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
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.sharded", str(root)],
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
        ("[loop]\nfsdp = true\n[validation]\nevery = 5", "the parameters are sharded over processes"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(text)
