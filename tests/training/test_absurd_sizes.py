"""Sizes that no machine has: each is refused by the name of its key, before anything of that size is made."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="training needs accelerate")

from blip2edge.errors import Blip2EdgeError, ConfigError
from blip2edge.runtime.bench import memory as machine
from blip2edge.training.config import TrainingConfig, parse_config
from blip2edge.training.data.config import DataConfig
from blip2edge.training.fields import EXACT
from blip2edge.training.run import train
from blip2edge.training.setup import memory
from blip2edge.training.setup.miniature import miniature_config
from tests.training import recipes

ABSURD = 65_536_000_000
WITHOUT_LIMIT = {
    *("steps", "warmup_steps", "snapshot_every", "log_every", "every", "patience"),  # steps are not kept in memory
    *("max_broken", "copies_gib", "size", "pictures"),  # limits of what there is
    *("seed", "series"),
    "elastic_min",  # the number of queries is its limit
    "patch_size",  # a divisor of 64
    "num_beams",
}


def keys(kind: type = TrainingConfig, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a recipe that takes a whole number: the title of its table, and its name."""
    types = typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[each.name]):
            yield from keys(types[each.name], f"{path}.{each.name}".lstrip("."))
        elif types[each.name] is int:
            yield path, each.name


WHOLE = sorted(set(keys()))


def text(table: str, key: str, value: int) -> str:
    return f"[{table}]\n{key} = {value}" if table else f"{key} = {value}"


@pytest.mark.parametrize(("table", "key"), [each for each in WHOLE if each[1] not in WITHOUT_LIMIT])
def test_a_size_has_an_upper_limit(table: str, key: str) -> None:
    title = rf"\[{table}\] " if table else ""
    with pytest.raises(ConfigError, match=rf"^{title}{key} must be at most \d+, not {ABSURD}$"):
        parse_config(text(table, key, ABSURD))


@pytest.mark.parametrize(("table", "key"), WHOLE)
def test_no_number_is_too_large_to_be_refused(table: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} must be"):
        parse_config(text(table, key, 10**400))
    assert EXACT < 10**400


@pytest.mark.parametrize(
    "sizes",
    [
        {"stage1": "batch_size = 1048576"},
        {"stage2": "batch_size = 1048576"},
        {"model.language": "hidden_size = 1048576"},
    ],
)
def test_sizes_below_the_limits_are_compared_with_the_memory(
    sizes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size alone may be valid for some model: the predicted memory decides."""
    monkeypatch.setattr(machine, "machine_memory", lambda: machine.MachineMemory(32 << 30, 32 << 30))
    written = recipes.recipe(**sizes)
    for key in ("batch_size", "hidden_size"):
        if any(key in each for each in sizes.values()):
            section = next(iter(sizes))
            start = written.index(f"[{section}]")
            written = written[:start] + written[start:].replace(f"{key} = {2 if key == 'batch_size' else 32}\n", "", 1)
    path = tmp_path / "recipe.toml"
    path.write_text(written)
    with pytest.raises(Blip2EdgeError, match=r"GB of memory|2\^63 bytes") as told:
        train("stage2", path, tmp_path / "out")
    assert str(told.value).startswith(str(path))


def test_the_table_of_a_size_is_named() -> None:
    """[model] has three tables with the same keys, and [[data]] several sets."""
    for written, said in (
        ("[model.language]\nnum_heads = 3\n", r"^\[model\.language\] num_heads 3 does not divide hidden_size 128$"),
        ("[[data]]\nratio = 1\n[[data]]\nratio = -1\n", r"^\[\[data\]\] set 2 ratio must be at least 0"),
        ("[[data]]\nratio = 1\nsplits = ['a']\n[[data]]\nratio = 1\n", r"^\[\[data\]\] set 1 splits has no effect"),
        ("[[data]]\nratio = 1\n[[data]]\n", r"got none in set 2 \(scenes\) of 2 sets"),
        ("[[data]]\nratio = 1\n", r"ratio balances a mixture: .* got 1; leave ratio out"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_config(written)
    assert parse_config("[[data]]\nratio = 1\n[[data]]\nratio = 2\n").data.sets[1] == DataConfig(ratio=2.0)


@pytest.mark.parametrize(("lines", "refused"), [("", True), ("[loop]\ncache_features = true\n", False)])
def test_stored_features_take_less_memory_than_pixels(lines: str, refused: bool) -> None:
    """32768 pictures of 64 x 64 pixels are 1.6 GB, and their features in float32 at width 16 are 0.14 GB."""
    recipe = parse_config(f"{lines}[model.vision]\nhidden_size = 16\n[stage2]\nbatch_size = 32768\n")
    config = miniature_config(recipe, draft=False, instructed=False)
    need = memory._batch_need(config, recipe, "stage2", local=1)
    assert (need.least > 1 << 30) is refused
    assert "[stage2] batch_size = 32768" in need.what
