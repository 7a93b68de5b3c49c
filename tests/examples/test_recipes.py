"""Every recipe in examples/ is valid, and its parts fit each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from blip2edge.errors import CheckpointError
from blip2edge.model.checkpoint.directory import load_checkpoint
from blip2edge.training.config import load_config
from blip2edge.training.phases.stage1_checkpoint import begin_stage2, open_stage1

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"
FILES = sorted(RECIPES.rglob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_is_valid(path: Path) -> None:
    config = load_config(path)
    assert not config.model.is_miniature
    assert config.data.prompt_share == 0 or config.data.kind == "scenes"


def test_the_stages_of_the_photos_go_together() -> None:
    first, second = (load_config(RECIPES / "photos" / f"stage{number}.toml") for number in (1, 2))
    assert first.stage1.steps > 0
    assert second.model.bridge_from.endswith("runs/photos/stage1")
    assert second.stage1.steps == 0
    assert not second.loop.encoder_autocast, "stage 2 would encode all pictures again"
    for part in ("vision_from", "language_from", "num_query_tokens", "qformer"):
        assert getattr(first.model, part) == getattr(second.model, part)
    assert first.data == second.data


def test_a_captioners_bridge_and_text_head_are_kept() -> None:
    """What scenes/smollm2.toml asks for with bridge_from: no stage 1 for another language model."""
    given = load_checkpoint(EXAMPLES / "checkpoint")
    fresh = load_checkpoint(EXAMPLES / "checkpoint")
    assert given.draft is not None
    assert fresh.draft is not None
    for part in (fresh.bridge, fresh.draft):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    begin_stage2(open_stage1(EXAMPLES / "checkpoint").load(), fresh)
    for wanted, kept in ((given.bridge, fresh.bridge), (given.draft, fresh.draft)):
        tensors = kept.state_dict()
        projected = [tensors.pop(name) for name in list(tensors) if name.startswith("projection.")]
        assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in tensors.items())
        assert not any(tensor.any() for tensor in projected)  # the language model's own part is left alone


def test_a_captioner_without_a_text_head_is_refused(tmp_path: Path) -> None:
    for path in (EXAMPLES / "checkpoint").iterdir():
        if not path.name.startswith("draft"):
            shutil.copyfile(path, tmp_path / path.name)
    with pytest.raises(CheckpointError, match="or a captioner with a draft"):
        open_stage1(tmp_path).load()
