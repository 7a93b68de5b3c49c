"""A whole run in small: files, record, refusals, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from blip2edge.errors import ConfigError, DataError, OutputError  # noqa: E402
from blip2edge.model.checkpoint import load_checkpoint  # noqa: E402
from blip2edge.training.loop import checkpoint_captioner, train_stage2  # noqa: E402
from blip2edge.training.scenes import scenes  # noqa: E402
from blip2edge.training.stages import tensor_hashes  # noqa: E402

SIZES = "hidden_size = 32\nintermediate_size = 64\nnum_layers = 1\nnum_heads = 2\n"
PHASE = "steps = 2\nbatch_size = 2\nwarmup_steps = 1\n"
RECIPE = (
    "seed = 1\n"
    + "".join(f"[model.{part}]\n{SIZES}" for part in ("vision", "qformer", "language"))
    + "".join(f"[{phase}]\n{PHASE}" for phase in ("vision", "language", "stage2"))
)


@pytest.fixture(name="recipe")
def _recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_a_run_writes_a_checkpoint_and_its_record(recipe: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    seen: list[tuple[str, int, int]] = []
    out = tmp_path / "runs" / "tiny"
    record = train_stage2(
        recipe, out, log=lines.append, progress=lambda *each: seen.append(each), evaluation_scenes=4
    )
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert json.loads((out / "training.json").read_text())["config_sha256"] == record["config_sha256"]
    assert record["heldout"]["n"] == 4
    assert set(record["phases"]) == {"vision", "language", "stage2"}
    assert seen[-1] == ("stage2", 2, 2)
    assert any(line.startswith("language: step 2/2") for line in lines)
    assert [path.name for path in out.parent.iterdir()] == ["tiny"], "no temporary directory is left"
    pictures = [scene.picture for scene in scenes(3)]
    assert len(checkpoint_captioner(out, batch_size=2)(pictures)) == 3


def test_the_same_recipe_gives_the_same_file_and_pretrained_parts_are_taken(
    recipe: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        train_stage2(recipe, tmp_path / name, evaluation_scenes=0)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    recipe.write_text(f"{RECIPE}pretrained = {json.dumps(str(tmp_path / 'one'))}\n")
    record = train_stage2(recipe, tmp_path / "three", evaluation_scenes=0)
    assert set(record["phases"]) == {"stage2"}
    one, three = (load_checkpoint(tmp_path / name) for name in ("one", "three"))
    assert tensor_hashes(one.vision) == tensor_hashes(three.vision)
    assert tensor_hashes(one.language) == tensor_hashes(three.language)


def test_parts_of_other_sizes_are_refused(recipe: Path, tmp_path: Path) -> None:
    train_stage2(recipe, tmp_path / "one", evaluation_scenes=0)
    recipe.write_text(
        RECIPE.replace("num_layers = 1", "num_layers = 2")
        + f"pretrained = {json.dumps(str(tmp_path / 'one'))}\n"
    )
    with pytest.raises(ConfigError, match="other sizes"):
        train_stage2(recipe, tmp_path / "two")


def test_a_directory_that_exists_is_kept_unless_forced(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    (out / "note").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        train_stage2(recipe, out)
    assert (out / "note").read_text() == "mine"
    train_stage2(recipe, out, force=True, evaluation_scenes=0)
    assert not (out / "note").exists()
    assert (out / "config.json").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("steps = 2", "steps = 9\nlearning_rate = 1e30\nclip_norm = 1e30", 1))
    with pytest.raises(DataError, match=r"vision: the loss of step \d+ is"):
        train_stage2(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_told(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        train_stage2(recipe, tmp_path / "file" / "below", evaluation_scenes=0)
