"""A whole small run: files, record, log, errors, and no incomplete output."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")


from blip2edge.errors import ConfigError, DataError, OutputError  # noqa: E402
from blip2edge.model.checkpoint.directory import load_checkpoint  # noqa: E402
from blip2edge.training import run as runs  # noqa: E402
from blip2edge.training.config import load_config  # noqa: E402
from blip2edge.training.data.scenes import scenes  # noqa: E402
from blip2edge.training.evaluation.models import ModelOptions  # noqa: E402
from blip2edge.training.evaluation.open_model import open_captioner  # noqa: E402
from blip2edge.training.loop import snapshots  # noqa: E402
from blip2edge.training.phases.registry import phases_of  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from tests.training import recipes  # noqa: E402


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is half of the time of so small a run."""
    monkeypatch.setattr(runs, "draw_curve", lambda lines, path: False)


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return recipes.write(tmp_path / "recipe.toml")


@pytest.fixture(scope="module", name="trained")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str], list[Any]]:
    """A run of all phases: its output, record, lines and progress."""
    directory = tmp_path_factory.mktemp("trained")
    path = recipes.write(directory / "recipe.toml", stage2="itg_weight = 0.5")
    lines: list[str] = []
    seen: list[Any] = []
    out = directory / "runs" / "tiny"
    record = train("stage2", path, out, log=lines.append, progress=lambda *each: seen.append(each), evaluation_scenes=4)
    return out, record, lines, seen


def test_a_run_writes_a_checkpoint_and_its_record(
    trained: tuple[Path, dict[str, Any], list[str], Any],
) -> None:
    out, record, lines, seen = trained
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "config.json",
        "draft.json",
        "draft.safetensors",
        "draft_tokenizer.json",
        "generation_config.json",
        "log.jsonl",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert json.loads((out / "training.json").read_text())["config_sha256"] == record["config_sha256"]
    assert record["heldout"]["n"] == 4
    assert list(record["phases"]) == list(recipes.PHASES)
    assert set(record["phases"]["stage2"]["losses"]) == {"lm", "itg"}
    assert seen[-1] == ("stage2", recipes.STEPS, recipes.STEPS)
    assert any(line.startswith("language: step 4/4") for line in lines)
    assert [path.name for path in out.parent.iterdir()] == ["tiny"], "no snapshot and no temporary directory is left"


def test_the_log_has_a_line_an_interval(trained: tuple[Path, dict[str, Any], Any, Any]) -> None:
    out, record, _, _ = trained
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [
        (phase, step) for phase in recipes.PHASES for step in range(1, recipes.STEPS + 1)
    ]
    last = lines[-1]
    assert last["loss"] == pytest.approx(last["losses"]["lm"] + 0.5 * last["losses"]["itg"], rel=1e-5)
    assert last["rate"] < lines[-3]["rate"]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert "temperature" in lines[2 * recipes.STEPS]["gauges"]
    assert record["phases"]["stage2"]["final_loss"] == pytest.approx(last["loss"], abs=1e-5)


def test_the_curve_is_drawn(trained: tuple[Path, dict[str, Any], Any, Any]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the curve")
    assert (trained[0] / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_captions_with_its_draft_beside_it(trained: tuple[Path, Any, Any, Any]) -> None:
    out = trained[0]
    assert load_checkpoint(out).draft is not None
    pictures = [scene.picture for scene in scenes(3)]
    assert len(open_captioner(out, ModelOptions(batch_size=2))(pictures)) == 3


def test_a_directory_that_exists_is_kept_unless_train_wrote_it_and_is_forced(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    (out / "note").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"taken exists; .* files but no training\.json"):
            train("stage2", path, out, force=force)
    assert (out / "note").read_text() == "mine"
    (out / "training.json").write_text("{}")
    with pytest.raises(OutputError, match=r"taken exists; .*force=True"):
        train("stage2", path, out)
    train("stage2", path, out, force=True, evaluation_scenes=0)
    assert not (out / "note").exists()
    assert (out / "config.json").is_file()


def test_force_does_not_replace_the_checkpoint_that_the_recipe_reads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "training.json").write_text("{}")
    path = recipes.write(tmp_path / "next.toml", model='checkpoint = "out"')
    with pytest.raises(OutputError, match=r"would replace .*out, which it is made from"):
        train("stage2", path, out, force=True)
    assert (out / "training.json").is_file()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["note", "step-by-step.md", "tensorboard"])
def test_a_directory_of_the_runs_name_that_no_run_wrote_is_refused(
    name: str, force: bool, path: Path, tmp_path: Path
) -> None:
    """Log and snapshots are in OUT.run, and a run removes them."""
    mine = tmp_path / "out.run"
    mine.mkdir()
    (mine / name).write_text("mine")
    with pytest.raises(OutputError, match=r"out\.run contains files, but no log\.jsonl of a run"):
        train("stage2", path, tmp_path / "out", force=force)
    assert (mine / name).read_text() == "mine"


def test_an_empty_recipe_is_refused_and_the_miniature_is_named(path: Path, tmp_path: Path) -> None:
    for name, text, found in (
        ("empty.toml", "# nothing", "is empty"),
        ("empty.json", "{}", "is empty"),
        ("seed.toml", "seed = 1", "has only seed"),
        ("loop.toml", "seed = 1\n[loop]\nlog_every = 1", "has only seed, loop"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=rf"{name}: the recipe {found}, .* name the trained parts in \[model\]"):
            train("stage2", tmp_path / name, tmp_path / "out")
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train("stage2", path, tmp_path / "out", log=lines.append, progress=_interrupt)
    assert lines[0].startswith("[model] names no trained parts: the miniature is trained from scratch")


def _interrupt(stage: str, done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_a_loss_that_is_not_finite_names_the_samples_and_keeps_the_snapshot(tmp_path: Path) -> None:
    wild = "learning_rate = 1e30\nclip_norm = 1e30"
    path = recipes.write(tmp_path / "recipe.toml", language=wild)
    with pytest.raises(
        DataError, match=r"language: at step \d on the samples scene-\d+-\d+, .* the .* is (nan|inf)"
    ) as told:
        train("stage2", path, tmp_path / "out")
    assert "resume=True" in str(told.value)
    assert not (tmp_path / "out").exists()
    kept = snapshots.Snapshots(tmp_path / "out.run").newest()
    assert kept is not None
    assert kept.facts["phase"] == "language"
    # Mended, the run goes on from there: the vision encoder is not trained again.
    recipes.write(tmp_path / "recipe.toml")
    with pytest.raises(ConfigError, match="another recipe; resume the run anyway with resume=True"):
        train("stage2", path, tmp_path / "out")
    lines: list[str] = []
    train("stage2", path, tmp_path / "out", resume=True, log=lines.append, evaluation_scenes=0)
    assert lines[1] == f"resumes from the snapshot of language step 0 in {tmp_path / 'out.run'}"
    assert lines[2].startswith("language: step 1/4")


def test_a_directory_that_appears_during_the_run_is_not_replaced(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(stage: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(
        OutputError, match=r"appeared while the run was training; move .* away and run the command again"
    ):
        train("stage2", path, out, progress=appear, evaluation_scenes=0)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]
    out.rename(tmp_path / "away")
    train("stage2", path, out, evaluation_scenes=0)
    assert (out / "config.json").is_file()


def test_a_recipe_without_the_phase_of_the_snapshot_is_refused(path: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "stage1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("stage2", path, tmp_path / "out", progress=stop)
    path.write_text(path.read_text().replace("[stage1]\nsteps = 4", "[stage1]\nsteps = 0"))
    with pytest.raises(ConfigError, match="the snapshot is of the phase stage1"):
        train("stage2", path, tmp_path / "out", resume=True)


def test_there_must_be_something_to_resume(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no snapshot"):
        train("stage2", path, tmp_path / "out", resume=True)


def test_a_full_disk_is_told_in_one_line(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "_write", full)
    with pytest.raises(OutputError, match=r"the disk is full: .*\.run could not be written; free some space"):
        train("stage2", path, tmp_path / "out", evaluation_scenes=0)
    assert not (tmp_path / "out").exists()
    assert [each.name for each in (tmp_path / "out.run").iterdir()] == ["log.jsonl"]


def test_a_snapshot_stays_until_its_successor_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = snapshots.Snapshots(tmp_path)

    def content(at: float) -> snapshots.Snapshot:
        return snapshots.Snapshot({"weight": torch.full((2,), at)}, {"at": at})

    kept.write(7, content(1.0))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            kept.write(7, content(2.0))
    newest = kept.newest()
    assert newest is not None
    assert newest.facts == {"at": 1.0}
    for at in (3.0, 4.0):
        kept.write(7, content(at))
        newest = kept.newest()
        assert newest is not None
        assert newest.facts == {"at": at}
        assert len(list(tmp_path.iterdir())) == 1


def test_an_output_that_cannot_be_written_is_told(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"below cannot be written, because .*file is not a directory"):
        train("stage2", path, tmp_path / "file" / "below", evaluation_scenes=0)


def test_stage1_writes_what_transformers_loads_and_stage2_goes_on_from_it(tmp_path: Path) -> None:
    path = recipes.write(tmp_path / "recipe.toml")
    train("stage1", path, tmp_path / "first")
    names = {each.name for each in (tmp_path / "first").iterdir()}
    assert names >= {
        "config.json",
        "draft.safetensors",
        "stage1.json",
        "tokenizer.json",
        "preprocessor_config.json",
    }
    transformers = pytest.importorskip("transformers")
    transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "first")
    recipes.write(path, model='bridge_from = "first"')
    lines: list[str] = []
    record = train("stage2", path, tmp_path / "second", evaluation_scenes=0, log=lines.append)
    assert list(record["phases"]) == ["vision", "language", "stage2"]
    assert lines[:2] == [
        "[model] names no trained parts: the miniature is trained from scratch, on generated scenes",
        "stage1 does not run: bridge_from (first) is its output",
    ]


def test_a_wrong_number_of_data_streams_names_the_right_ones(tmp_path: Path) -> None:
    path = recipes.write(tmp_path / "recipe.toml", loop="data_streams = 3")
    with pytest.raises(ConfigError, match=r"the 2 rows of a batch of stage1, not 3; set data_streams to 1 or 2$"):
        train("stage2", path, tmp_path / "out")


@pytest.mark.parametrize(("stage", "other"), [("instruct", "stage2"), ("stage2", "instruct")])
def test_the_section_of_another_stage_is_refused_where_that_of_this_stage_is_missing(
    stage: str, other: str, tmp_path: Path
) -> None:
    """Its steps would be ignored, and the defaults trained instead."""
    path = tmp_path / "recipe.toml"
    path.write_text(f"[{other}]\nsteps = 4\n")
    with pytest.raises(
        ConfigError, match=rf"train {stage} does not use \[{other}\], .* add \[{stage}\] with its steps"
    ):
        train(stage, path, tmp_path / "out")
    assert phases_of(other, load_config(path))[-1] == other
    path.write_text(f"[{other}]\nsteps = 4\n[{stage}]\nsteps = 4\n")
    assert phases_of(stage, load_config(path))[-1] == stage
    path.write_text("[stage1]\nsteps = 4\n")  # a phase of this run
    assert phases_of(stage, load_config(path))[-2:] == ["stage1", stage]
