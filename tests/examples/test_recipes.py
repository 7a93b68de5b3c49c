"""Every recipe in examples/ passes the check at the door, and the parts it names fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2edge.training.config import load_config

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
FILES = sorted(RECIPES.rglob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_is_valid(path: Path) -> None:
    config = load_config(path)
    assert not config.model.is_miniature
    assert config.data.prompt_share == 0


def test_the_emoji_stages_go_together() -> None:
    first, second = (load_config(RECIPES / "emoji" / f"stage{number}.toml") for number in (1, 2))
    assert first.stage1.steps > 0
    assert second.model.bridge_from.endswith("runs/emoji/stage1")
    assert second.stage1.steps == 0
    for part in ("vision_from", "language_from", "num_query_tokens", "qformer"):
        assert getattr(first.model, part) == getattr(second.model, part)
    assert first.data == second.data
