"""The bridge of `model.checkpoint`: it is used, or the recipe is refused by name; never a new one in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from blip2edge.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from blip2edge.model.checkpoint.directory import load_checkpoint  # noqa: E402
from blip2edge.training import run as runs  # noqa: E402
from blip2edge.training.config import load_config  # noqa: E402
from blip2edge.training.phases.stage1_checkpoint import draft_tensors, open_stage1  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from blip2edge.training.setup.build import new_stage1_model, plan_parts  # noqa: E402
from blip2edge.training.setup.text_side import text_tokenizer  # noqa: E402

CHECKPOINT = Path(__file__).parents[3] / "examples" / "checkpoint"
STILL = (
    "steps = 2\nbatch_size = 2\nwarmup_steps = 0\nlearning_rate = 1e-9\nmin_learning_rate = 0.0\nweight_decay = 0.0\n"
)
"""Steps that change no weight visibly: what comes out is what was started from."""


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "draw_curve", lambda lines, path: False)


def recipe(root: Path, model: str, *stages: str, more: str = "", top: str = "") -> Path:
    path = root / "recipe.toml"
    sections = "".join(f"[{stage}]\n{STILL}" for stage in stages)
    path.write_text(f'weights_dtype = "float32"\n{top}\n[model]\n{model}\n{sections}{more}')
    return path


def without_text_head(root: Path) -> Path:
    """A copy of the checkpoint without the files of its draft model: a plain BLIP-2."""
    return Path(shutil.copytree(CHECKPOINT, root / "plain", ignore=shutil.ignore_patterns("draft*")))


def qformer(bridge: Any) -> dict[str, Any]:
    """The tensors of a Q-Former that is part of a captioner's bridge or of a model of stage 1."""
    tensors: dict[str, Any] = bridge.get_submodule("qformer").state_dict()
    return tensors


def assert_near(ours: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert wanted
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=0)


def test_stage_1_goes_on_with_a_captioners_qformer_and_text_head(tmp_path: Path) -> None:
    path = recipe(tmp_path, f'checkpoint = "{CHECKPOINT}"', "stage1", more="embed_dim = 24\n")
    train("stage1", path, tmp_path / "out")
    made, given = open_stage1(tmp_path / "out").load(), load_checkpoint(CHECKPOINT)
    assert given.draft is not None
    assert_near(qformer(made.matcher), qformer(given.bridge))
    assert_near(draft_tensors(made), given.draft.state_dict())
    assert made.config.embed_dim == 24


def test_stage_1_goes_on_with_a_retrieval_model_also_without_a_text_head(tmp_path: Path) -> None:
    first = recipe(tmp_path, f'checkpoint = "{CHECKPOINT}"', "stage1", more="embed_dim = 24\n")
    train("stage1", first, tmp_path / "first")
    for name in ("draft.json", "draft.safetensors", "draft_tokenizer.json"):
        (tmp_path / "first" / name).unlink()  # as transformers saves a Blip2ForImageTextRetrieval
    named = f'checkpoint = "first"\nlanguage_from = "{CHECKPOINT}"'
    path = recipe(tmp_path, named, "stage1", more="embed_dim = 24\n")
    train("stage1", path, tmp_path / "again")
    after = open_stage1(tmp_path / "again").load()
    before = open_stage1(tmp_path / "first", after.draft_config).load()
    assert_near(after.matcher.state_dict(), before.matcher.state_dict())
    kept = load_config(path)
    assert plan_parts("stage2", kept, tmp_path).bridge.startswith("the Q-Former of")
    with pytest.raises(CheckpointError, match=r"has no language model; .* set model.language_from"):
        plan_parts("stage1", load_config(recipe(tmp_path, 'checkpoint = "first"', "stage1")), tmp_path)


def test_stage_1_goes_on_with_bridge_from(tmp_path: Path) -> None:
    named = f'vision_from = "{CHECKPOINT}"\nlanguage_from = "{CHECKPOINT}"\nbridge_from = "{CHECKPOINT}"'
    config = load_config(recipe(tmp_path, named, "stage1"))
    made = new_stage1_model(plan_parts("stage1", config, tmp_path).build(), config, tmp_path)
    assert_near(qformer(made.matcher), qformer(load_checkpoint(CHECKPOINT).bridge))


def test_instruct_goes_on_with_a_captioners_qformer_and_text_head(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path, f'checkpoint = "{CHECKPOINT}"', "instruct"))
    made, given = plan_parts("instruct", config, tmp_path).build().model, load_checkpoint(CHECKPOINT)
    assert made.config.family == "instructblip"
    assert_near(qformer(made.bridge), qformer(given.bridge))
    assert given.draft is not None
    words = made.bridge.get_parameter("qformer.word_embeddings.weight")
    assert torch.equal(words, given.draft.get_parameter("words.weight"))


@pytest.mark.parametrize(
    ("stage", "phases", "more", "said"),
    [
        ("stage1", ("stage1",), "", "stage 1 trains a Q-Former with its text side, and the checkpoint plain "),
        ("stage2", ("stage1", "stage2"), "", "stage 1 trains a Q-Former with its text side"),
        ("instruct", ("instruct",), "", "instruct trains a Q-Former with its text side"),
        ("stage2", ("stage2",), "itg_weight = 1.0\n", r"\[stage2\] itg_weight trains the text head"),
    ],
)
def test_a_qformer_without_a_text_side_is_refused_where_one_is_needed(
    stage: str, phases: tuple[str, ...], more: str, said: str, tmp_path: Path
) -> None:
    without_text_head(tmp_path)
    path = recipe(tmp_path, 'checkpoint = "plain"', *phases, more=more)
    with pytest.raises(ConfigError, match=said + ".*name the checkpoint in vision_from and language_from"):
        train(stage, path, tmp_path / "out")
    named = 'vision_from = "plain"\nlanguage_from = "plain"'  # what the message says: a new bridge
    assert plan_parts(stage, load_config(recipe(tmp_path, named, *phases, more=more)), tmp_path).bridge == "new"


def test_a_qformer_that_reads_the_prompt_is_refused_in_stage_2(tmp_path: Path) -> None:
    path = recipe(tmp_path, f'checkpoint = "{CHECKPOINT}"', "instruct")
    train("instruct", path, tmp_path / "instructed")
    path = recipe(tmp_path, 'checkpoint = "instructed"', "stage2")
    with pytest.raises(ConfigError, match="stage2 trains a Q-Former that does not read the prompt"):
        train("stage2", path, tmp_path / "out")
    kept = load_config(recipe(tmp_path, 'checkpoint = "instructed"', "instruct"))
    assert plan_parts("instruct", kept, tmp_path).bridge == "of instructed"


def test_a_bridge_of_another_kind_is_new_and_the_log_says_so(tmp_path: Path) -> None:
    path = recipe(tmp_path, f'checkpoint = "{CHECKPOINT}"', "stage2", top='bridge = "mlp"')
    lines: list[str] = []
    train("stage2", path, tmp_path / "out", evaluation_scenes=0, log=lines.append)
    assert "bridge (mlp): new" in lines


def test_a_run_through_both_stages_is_resumed_exactly_after_stage_1(tmp_path: Path) -> None:
    """The checkpoint's projection is not new, so stage 2 must not scale it, resumed or not."""
    path = recipe(tmp_path, f'checkpoint = "{CHECKPOINT}"', "stage1", "stage2")
    path.write_text(path.read_text().replace("1e-9", "1e-3"))

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "stage2":
            raise DataError("stopped")

    train("stage2", path, tmp_path / "whole", evaluation_scenes=0)
    with pytest.raises(DataError, match="stopped"):
        train("stage2", path, tmp_path / "resumed", evaluation_scenes=0, progress=stop)
    phases: list[str] = []
    train("stage2", path, tmp_path / "resumed", evaluation_scenes=0, progress=lambda name, *_: phases.append(name))
    assert set(phases) == {"stage2"}
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
    assert json.loads((tmp_path / "resumed" / "training.json").read_text())["phases"].keys() == {"stage1", "stage2"}


@pytest.mark.parametrize(
    ("model", "stage2", "said"),
    [
        ("num_query_tokens = 4", "", r"\[model\] num_query_tokens = 4 has no effect: .* which has 8"),
        ("[model.qformer]\nnum_layers = 2", "", r"\[model.qformer\] num_layers = 2 has no effect: .* which has 4"),
        ("dropout = 0.3", "", r"\[model\] dropout = 0.3 has no effect"),
        ('bert = "b"', "itg_weight = 1.0", r"\[model\] bert has no effect: the Q-Former is not new; leave bert out$"),
    ],
)
@pytest.mark.parametrize("named", ["checkpoint", "bridge_from"])
def test_sizes_of_a_new_bridge_are_refused_where_the_bridge_has_others(
    named: str, model: str, stage2: str, said: str, tmp_path: Path
) -> None:
    parts = f'{named} = "{CHECKPOINT}"\n'
    if named == "bridge_from":
        parts += f'vision_from = "{CHECKPOINT}"\nlanguage_from = "{CHECKPOINT}"\n'
    path = recipe(tmp_path, parts + model, "stage2", more=stage2 + "\n")
    with pytest.raises(ConfigError, match=said):
        plan_parts("stage2", load_config(path), tmp_path)
    same = parts + "num_query_tokens = 8\n[model.qformer]\nnum_layers = 4"
    plan_parts("stage2", load_config(recipe(tmp_path, same, "stage2")), tmp_path)


def test_a_bert_is_refused_where_the_new_qformer_has_no_text_side(tmp_path: Path) -> None:
    parts = f'vision_from = "{CHECKPOINT}"\nlanguage_from = "{CHECKPOINT}"\nbert = "{CHECKPOINT}"'
    with pytest.raises(ConfigError, match=r"bert has no effect: the Q-Former has no text side .* \[stage2\] itg_w"):
        plan_parts("stage2", load_config(recipe(tmp_path, parts, "stage2")), tmp_path)


def test_a_checkpoint_beside_both_parts_gives_the_text_side_its_tokenizer_or_is_refused(tmp_path: Path) -> None:
    """Neither its picture encoder nor its language model is used: the tokenizer is all that it can give."""
    both = f'vision_from = "{CHECKPOINT}"\nlanguage_from = "{CHECKPOINT}"\ncheckpoint = '
    given = load_config(recipe(tmp_path, f'{both}"{CHECKPOINT}"', "instruct", "stage2"))
    found = text_tokenizer(given, tmp_path)
    assert found is not None
    assert (found.key, found.file) == ("checkpoint", CHECKPOINT / "draft_tokenizer.json")
    assert plan_parts("instruct", given, tmp_path).bridge == "new"
    with pytest.raises(ConfigError, match=r"checkpoint has no effect: .* the Q-Former has no text side in this run"):
        plan_parts("stage2", given, tmp_path)
    without_text_head(tmp_path)
    bare = load_config(recipe(tmp_path, f'{both}"plain"', "instruct"))
    with pytest.raises(
        ConfigError, match=r"checkpoint has no effect: .* the checkpoint has no tokenizer of a Q-Former's text side"
    ):
        plan_parts("instruct", bare, tmp_path)
    kept = load_config(recipe(tmp_path, f'{both}"plain"\nbridge_from = "{CHECKPOINT}"', "instruct"))
    with pytest.raises(ConfigError, match=r"checkpoint has no effect: .* bridge_from has the tokenizer"):
        plan_parts("instruct", kept, tmp_path)


def test_a_bert_whose_tokenizer_alone_is_used_is_taken(tmp_path: Path) -> None:
    """An InstructBLIP without `qformer_tokenizer/`: the error of `train instruct` advises to set bert."""
    train("instruct", recipe(tmp_path, f'checkpoint = "{CHECKPOINT}"', "instruct"), tmp_path / "instructed")
    shutil.rmtree(tmp_path / "instructed" / "qformer_tokenizer")
    named = 'checkpoint = "instructed"'
    with pytest.raises(ConfigError, match=r"needs a tokenizer for the Q-Former, but found none; .* set bert"):
        train("instruct", recipe(tmp_path, named, "instruct"), tmp_path / "out")
    path = recipe(tmp_path, f'{named}\nbert = "{CHECKPOINT}"', "instruct")
    train("instruct", path, tmp_path / "out")
    assert (tmp_path / "out" / "qformer_tokenizer" / "tokenizer.json").is_file()
