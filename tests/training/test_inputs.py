"""Files that a recipe names are looked for before the training; those that the stage does not use are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2edge.errors import DataError, OutputError
from blip2edge.training.config import parse_config
from blip2edge.training.inputs import CHECKPOINTS, check_output_apart, check_recipe_files

SETS = '[[data]]\nkind = "folder"\npath = "here"\nsize = 2\n[[data]]\nkind = "folder"\npath = "{second}"\nsize = 2\n'
VALIDATED = '[validation]\nevery = 1\nkind = "folder"\npath = "gone"\n'
MODEL = '[model]\ncheckpoint = "here"\n'


@pytest.mark.parametrize("stage", ["stage2", "instruct"])
def test_the_data_of_the_validation_is_looked_for(stage: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    config = parse_config(MODEL + VALIDATED + SETS.format(second="here"))
    with pytest.raises(DataError, match=r"validation\] path = 'gone': there is no"):
        check_recipe_files(config, tmp_path, stage)


def test_stage_1_does_not_need_the_data_of_the_validation(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    check_recipe_files(parse_config(MODEL + VALIDATED + SETS.format(second="here")), tmp_path, "stage1")
    with pytest.raises(DataError, match=r"data\] path = 'away'"):
        check_recipe_files(parse_config(MODEL + SETS.format(second="away")), tmp_path, "stage1")


@pytest.mark.parametrize("key", CHECKPOINTS)
@pytest.mark.parametrize("output", ["here", "here/../here", "."])
def test_the_output_replaces_no_checkpoint_of_the_recipe(key: str, output: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    other = {"vision_from": "language_from", "language_from": "vision_from"}.get(key, "checkpoint")
    more = f"{other} = 'owner/name'\n" if other != key else ""
    config = parse_config(f"[model]\n{key} = 'here'\n{more}[stage2]\nitg_weight = 1.0\n" + SETS.format(second="data"))
    with pytest.raises(OutputError, match=r"would replace .*here, which it is made from"):
        check_output_apart(tmp_path / output, config, tmp_path, "stage2")
    check_output_apart(tmp_path / "owner", config, tmp_path, "stage2")  # a name on the hub is no directory


def test_the_output_replaces_no_data_of_the_recipe(tmp_path: Path) -> None:
    for second in ("out", "out/*.tar"):
        config = parse_config(MODEL + SETS.format(second=second))
        with pytest.raises(OutputError, match=r"would replace .*out(/\*\.tar)?, which"):
            check_output_apart(tmp_path / "out", config, tmp_path, "stage2")
