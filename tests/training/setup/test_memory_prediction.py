"""The memory of a step, predicted from shapes, against plan's parameters and against the tensors of a real step."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate import Accelerator  # noqa: E402

from blip2edge.errors import ConfigError  # noqa: E402
from blip2edge.model.checkpoint.stored.tensors import TensorFiles  # noqa: E402
from blip2edge.model.families.registry import read_config  # noqa: E402
from blip2edge.runtime.bench import memory as machine  # noqa: E402
from blip2edge.shapes.families import published_config, shape_of  # noqa: E402
from blip2edge.training.config import TrainingConfig, parse_config  # noqa: E402
from blip2edge.training.loop import loop  # noqa: E402
from blip2edge.training.loop.optim import recompute_activations  # noqa: E402
from blip2edge.training.phases.stage2 import GenerativeStage  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from blip2edge.training.setup.build import plan_parts  # noqa: E402
from blip2edge.training.setup.memory import GIB, StepMemory, announce, memory_table, predict  # noqa: E402
from tests.training import recipes  # noqa: E402
from tests.training.phases.test_memory import step  # noqa: E402
from tests.training.phases.test_stage2 import PROMPTS, case, draw  # noqa: E402

CHECKPOINT = Path(__file__).parents[3] / "examples" / "checkpoint"
OPT = "blip2-opt-2.7b"
NAMED = '[model]\ncheckpoint = "x"\n'


def recipe(loop: str = "", stage2: str = "", top: str = "") -> TrainingConfig:
    return parse_config(f"{top}\n{NAMED}[loop]\n{loop}\n[stage2]\nbatch_size = 8\nmax_tokens = 32\n{stage2}")


def published(name: str) -> Any:
    values = published_config(name)
    assert values is not None
    return read_config(values)


def of(name: str, processes: int = 1, **lines: str) -> StepMemory:
    given = recipe(**lines)
    return predict(published(name), given, given.stage2, processes)


@pytest.mark.parametrize(
    ("name", "bridge"), [(OPT, "qformer"), ("instructblip-vicuna-7b", "qformer"), ("idefics-9b", "flamingo")]
)
def test_the_parameters_are_those_of_plan(name: str, bridge: str) -> None:
    found = of(name, top=f'bridge = "{bridge}"')
    counted = shape_of(published_config(name)).parameters()["total"]
    assert (found.frozen + found.trained) / 4 == pytest.approx(counted, rel=1e-3)
    assert found.reading == found.frozen + found.trained
    assert found.gradients == found.trained
    assert found.optimizer == 2 * found.trained


def test_what_each_choice_saves() -> None:
    plain = of(OPT)
    half = of(OPT, loop='frozen_dtype = "bfloat16"')
    assert half.frozen * 2 == plain.frozen
    assert half.trained == plain.trained
    assert half.activations < plain.activations
    again = of(OPT, loop="recompute_activations = true")
    assert again.activations < 0.3 * plain.activations
    averaged = of(OPT, loop="ema_decay = 0.9")
    assert averaged.averages == averaged.trained
    assert averaged.step - plain.step == averaged.trained
    spread = of(OPT, 2, loop="fsdp = true")
    assert spread.frozen * 2 == plain.frozen
    assert 0 < spread.gathered < plain.frozen / 8
    assert spread.step < 0.7 * plain.step
    pytest.importorskip("peft")
    config = published(OPT).language
    lora = of(OPT, stage2="lora_rank = 8")
    width = config.hidden_size
    assert lora.trained - plain.trained == 4 * config.num_layers * 4 * 2 * 8 * width  # A and B of four matrices
    vision = of(OPT, stage2="unfreeze_vision = true")
    assert vision.trained > plain.trained + 4 * 900_000_000
    assert vision.activations > 2 * plain.activations


@pytest.mark.parametrize("kind", ["opt", "t5", "llava"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_kept_tensors_are_those_of_a_real_step(kind: str, recomputed: bool, tmp_path: Path) -> None:
    """The real batch is as long as the predicted one; a CPU's attention keeps a little less than the meta device's."""
    bridge = "mlp" if kind == "llava" else "qformer"
    made = case(draw(kind, tmp_path), tmp_path, PROMPTS)
    captions = made.batch.captions
    assert captions is not None
    rows, length = captions.labels.shape
    text = length if made.ours.config.language.is_encoder_decoder else length - 8
    given = parse_config(f'bridge = "{bridge}"\n{NAMED}[stage2]\nbatch_size = {rows}\nmax_tokens = {text}')
    plain = predict(made.ours.config, given, given.stage2)
    stage = GenerativeStage(made.ours, bridge)
    if recomputed:
        recompute_activations(stage)
        given = parse_config(
            f'bridge = "{bridge}"\n{NAMED}[loop]\nrecompute_activations = true\n'
            f"[stage2]\nbatch_size = {rows}\nmax_tokens = {text}"
        )
        assert predict(made.ours.config, given, given.stage2).activations < plain.activations
        return
    held = step(stage, made.batch)[2]
    assert plain.activations == pytest.approx(held, rel=0.25)


def test_the_table_and_the_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe()
    lines: list[str] = []
    one: Any = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(64 * GIB, 64 * GIB))
    announce(published(OPT), given, "stage2", one, lines.append)
    predicted = predict(published(OPT), given, given.stage2)
    assert lines == memory_table(predicted, "stage2: predicted memory of a step of 8 samples with 32 tokens")
    assert f"  peak        {predicted.peak / GIB:9.3f} GiB" in lines
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(8 * GIB, 64 * GIB))
    announce(published(OPT), given, "stage2", one, lines.append)
    assert lines[-1].startswith("warning: the training may need about 18.")
    small = int(14.3 * GIB)  # enough for the weights in float32, and not for the optimizer too
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(small, small))
    with pytest.raises(ConfigError, match=r"the training needs at least .* set frozen_dtype to bfloat16") as caught:
        announce(published(OPT), given, "stage2", one, lines.append)
    assert "anyway" not in str(caught.value)
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(8 * GIB, 8 * GIB))
    for stage in ("stage1", "stage2"):
        with pytest.raises(ConfigError, match=r"reading the checkpoints, which is done in float32, needs at least 15"):
            announce(published(OPT), given, stage, one, lines.append)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction needs configs alone; reading the weights of such a model would end the process."""
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(f'[model]\ncheckpoint = "{CHECKPOINT}"\n[stage1]\nsteps = 1\n')

    def read(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(TensorFiles, "read", read)
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(GIB >> 10, GIB >> 10))
    with pytest.raises(ConfigError, match=r"needs at least .* of memory, and this machine has 0\.0 GB"):
        train(stage, recipe_file, tmp_path / "out")


def test_nothing_is_printed_for_stage_1_and_for_the_miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(64 * GIB, 64 * GIB))
    announce(published(OPT), recipe(), "stage1", Accelerator(), lines.append)
    announce(published(OPT), parse_config(""), "stage2", Accelerator(), lines.append)
    assert lines == []


HUGE = "hidden_size = 65536\nintermediate_size = 262144\nnum_layers = 96\nnum_heads = 64\n"


@pytest.mark.parametrize(
    ("stage", "part", "told"),
    [
        ("stage2", "language", "drawing the weights of the miniature"),
        ("stage1", "language", "drawing the weights of the miniature"),
        ("instruct", "vision", "drawing the weights of the miniature"),
    ],
)
def test_a_miniature_that_cannot_fit_is_refused_before_its_weights_are_drawn(
    stage: str, part: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its sizes are keys of the recipe."""
    path = tmp_path / "recipe.toml"
    path.write_text(f"[model.{part}]\n{HUGE}[stage1]\nsteps = 1\n")
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(512 * GIB, 512 * GIB))
    with pytest.raises(ConfigError, match=rf"{told} needs at least \d+\.\d GB .* lower the sizes in \[model\.vision\]"):
        train(stage, path, tmp_path / "out")


@pytest.mark.parametrize(
    ("bridge", "stage"),
    [
        *((bridge, "stage2") for bridge in ("qformer", "projection", "mlp", "perceiver", "pool")),
        ("qformer", "stage1"),
        ("qformer", "instruct"),
    ],
)
def test_a_miniature_is_compared_with_the_memory_before_it_is_drawn(
    bridge: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = "[stage1]\nsteps = 1\n" if stage == "stage1" else ""
    given = parse_config(f'bridge = "{bridge}"\n{steps}[model]\nmax_positions = 40\n')
    planned = plan_parts(stage, given, tmp_path)
    one: Any = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    lines: list[str] = []
    state = torch.get_rng_state()
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(4 * GIB, 4 * GIB))
    announce(planned.config, given, stage, one, lines.append)
    assert torch.equal(torch.get_rng_state(), state), "the weights are drawn afterwards"
    assert lines == []
    model = planned.build().model
    assert model.config == planned.config
    whole, language = (sum(4 * each.numel() for each in part.parameters()) for part in (model, model.language))
    between = whole + (1 << 16)  # enough for the weights, and not for the optimizer too
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(between, between))
    with pytest.raises(ConfigError, match="pretraining the miniature needs at least"):
        announce(planned.config, given, stage, one, lines.append)
    if stage == "stage2":
        small = whole + 2 * language + (1 << 16)
        monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(small, 16 * small))
        announce(planned.config, given, stage, one, lines.append)
        assert lines[0].startswith("warning: pretraining the miniature may need about 0.0 GB")


def test_a_new_bridge_is_not_called_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    one: Any = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(8 * GIB, 64 * GIB))
    announce(published(OPT), recipe(), "stage1", one, lines.append, new_bridge=True)
    assert re.search(
        r"reading the checkpoints and drawing a new bridge of \d\.\d GB, both in float32, may need", lines[0]
    )
    announce(published(OPT), recipe(), "stage1", one, lines.append)
    assert "warning: reading the checkpoints, which is done in float32, may need" in lines[1]


def test_a_step_without_memory_names_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the prediction lets pass may still fail, on a GPU or beside other programs."""
    path = tmp_path / "recipe.toml"
    path.write_text(recipes.recipe())

    def allocate(*_: object) -> None:
        torch.empty(1 << 55)

    monkeypatch.setattr(loop, "_step", allocate)
    with pytest.raises(
        ConfigError, match=r"vision: memory ran out \(.*\); \[vision\] batch_size is 2; lower batch_size"
    ):
        train("stage2", path, tmp_path / "out")
