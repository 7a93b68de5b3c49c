"""Training on the user's pictures: a broken picture is skipped, counted and named."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="training needs accelerate")

from blip2edge.errors import DataError
from blip2edge.training.data.scenes import scenes
from blip2edge.training.run import train

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
