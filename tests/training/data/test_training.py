"""Training on the user's pictures: a broken picture is skipped, counted and named; many formats in one mixture."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="training needs accelerate")

from blip2edge.errors import DataError
from blip2edge.picture_files import add_member
from blip2edge.training import run as runs
from blip2edge.training.data.scenes import scenes
from blip2edge.training.run import train
from blip2edge.training.setup.planning import plan_training

CHECKPOINT = Path(__file__).parents[3] / "examples" / "checkpoint"
RECIPE = """
[data]
kind = "folder"
path = "pictures"
max_broken = {limit}
[model]
vision_from = "{checkpoint}"
language_from = "{checkpoint}"
[stage2]
steps = 4
batch_size = 2
warmup_steps = 1
"""


def recipe(directory: Path, limit: int) -> Path:
    """Six scenes, two of them no pictures, and a recipe."""
    pictures = directory / "pictures"
    pictures.mkdir()
    for number, scene in enumerate(scenes(6)):
        scene.picture.save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(scene.caption)
    for number in (1, 4):
        (pictures / f"{number}.png").write_bytes(b"no picture")
    path = directory / "recipe.toml"
    path.write_text(RECIPE.format(limit=limit, checkpoint=CHECKPOINT))
    return path


def test_broken_pictures_are_skipped_and_told(tmp_path: Path) -> None:
    record = train("stage2", recipe(tmp_path, 2), tmp_path / "out", evaluation_scenes=0)
    broken = record["phases"]["stage2"]["broken"]
    assert broken["samples"] == 2
    assert set(broken["first"]) == {"1.png", "4.png"}
    assert "not a picture" in broken["first"]["1.png"]


def test_more_than_the_limit_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 samples are broken, and max_broken allows 1"):
        train("stage2", recipe(tmp_path, 1), tmp_path / "out", evaluation_scenes=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "more"), [("stage1", ""), ("stage2", "accumulate = 2\n")])
@pytest.mark.parametrize("cached", ["false", "true"])
def test_data_without_a_usable_picture_end_the_run(stage: str, more: str, cached: str, tmp_path: Path) -> None:
    path = recipe(tmp_path, 100)
    for picture in (tmp_path / "pictures").glob("*.png"):
        picture.write_bytes(b"no picture")
    text = path.read_text().replace("[stage2]", f"[loop]\ncache_features = {cached}\n[{stage}]")
    path.write_text(text + more)
    with pytest.raises(DataError, match="expected at least one usable sample, got none; 6 samples are broken: "):
        train(stage, path, tmp_path / "out", evaluation_scenes=0)
    assert not (tmp_path / "out").exists()


class BuildsNextError(Exception):
    """All checks have passed, and the model would be built next."""


FEATURES_RECIPE = """
[[data]]
kind = "folder"
path = "pictures"
max_broken = 2
ratio = 1000
[[data]]
kind = "folder"
path = "features"
max_broken = 9
ratio = 1
"""


@pytest.mark.parametrize(
    ("shape", "more", "problem"),
    [
        (
            (3, 5),
            "",
            r"set 2 path = 'features': .*, got none; .*have the shape \(65, 128\), got \(3, 5\)",
        ),
        (
            (65, 128),
            "unfreeze_vision = true\n",
            r"set 2 .*: dog\.npy has features .* \[stage2\] unfreeze_vision",
        ),
        ((65, 128), "", None),
    ],
)
def test_features_that_no_step_can_use_are_refused_before_the_model_is_built(
    shape: tuple[int, int], more: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short run draws no sample of the second set."""
    path = recipe(tmp_path, 2)
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "dog.npy", np.zeros(shape, np.float32))
    (tmp_path / "features" / "dog.txt").write_text("a dog")
    text = path.read_text()
    path.write_text(FEATURES_RECIPE + text[text.index("[model]") :] + more)

    def planned(*arguments: Any) -> None:
        plan_training(*arguments)
        raise BuildsNextError

    monkeypatch.setattr(runs, "plan_training", planned)
    with pytest.raises(BuildsNextError) if problem is None else pytest.raises(DataError, match=problem):
        train("stage2", path, tmp_path / "out")


def mixture(directory: Path) -> Path:
    """Scenes as Parquet, as packed shards, as a CSV file and as dialogues, and a recipe that mixes them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files, captions = [], []
    for number, scene in enumerate(scenes(6)):
        file = io.BytesIO()
        scene.picture.save(file, "PNG")
        files.append(file.getvalue())
        captions.append(scene.caption)
        (directory / f"{number}.png").write_bytes(file.getvalue())
    table = pyarrow.table({"jpg": files, "TEXT": captions})
    parquet.write_table(table, directory / "laion.parquet")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for number, content in enumerate(files):
            add_member(archive, f"{number}.png", content)
            add_member(archive, f"{number}.txt", captions[number].encode())
    (directory / "a.tar.gz").write_bytes(gzip.compress(packed.getvalue()))
    (directory / "rows.csv").write_text(
        "image,caption\n" + "".join(f"{number}.png,{text}\n" for number, text in enumerate(captions))
    )
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": captions[0]}] * 2
    (directory / "llava.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    paths = {"laion.parquet": "parquet", "a.tar.gz": "shards", "rows.csv": "table", "llava.json": "table"}
    sets = [f'[[data]]\nkind = "{kind}"\npath = "{path}"\nratio = 1\ncrop = 0.7\n' for path, kind in paths.items()]
    model = RECIPE[RECIPE.index("[model]") :].format(checkpoint=CHECKPOINT)
    path = directory / "recipe.toml"
    path.write_text("".join(sets) + model.replace("steps = 4", "steps = 6") + "[loop]\nsnapshot_every = 2\n")
    return path


def test_a_mixture_of_many_formats_is_resumed_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = mixture(tmp_path)
    record = train("stage2", path, tmp_path / "whole", evaluation_scenes=0)
    assert "broken" not in record["phases"]["stage2"]

    def stop(stage: str, done: int, total: int) -> None:
        if done == 3:
            raise DataError("stopped")

    with pytest.raises(DataError, match="stopped"):
        train("stage2", path, tmp_path / "stopped", evaluation_scenes=0, progress=stop)
    steps: list[int] = []
    again = train(
        "stage2",
        path,
        tmp_path / "stopped",
        evaluation_scenes=0,
        progress=lambda stage, done, total: steps.append(done),
    )
    assert again["phases"].keys() == record["phases"].keys()
    assert steps[0] == 3  # it continues from the snapshot of step 2
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
