"""`plan` reads a config with the code of `export`, and refuses what `export` refuses in the same words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the config is compared with the modules of torch")
pytest.importorskip("transformers", reason="the unread keys are compared with transformers")

from blip2edge.cli import main, plan
from blip2edge.errors import CheckpointError
from blip2edge.model.checkpoint.config_keys import RecordedObject
from blip2edge.model.families.registry import read_config
from blip2edge.shapes.families import CONFIGS, shape_of

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "checkpoint"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
WRONG: tuple[Any, ...] = ("none of these", -3, [], {"a": 1}, float("nan"))
"""Values of which every key refuses at least one."""


def wrong_configs(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The config with a wrong value in each key that export reads, and with sections that are empty or no objects."""
    recorded = RecordedObject(values)
    read_config(recorded)
    found = []
    for section, part in ((None, recorded), *recorded.sections.items()):
        for key in sorted(part.keys_read):
            for wrong in WRONG:
                changed = json.loads(json.dumps(values))
                (changed if section is None else changed[section])[key] = wrong
                found.append((f"{section}.{key}", changed))
    return found


def refusal(config: Mapping[str, Any], source: str) -> str | None:
    try:
        read_config(config)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_each_key_with_a_wrong_value(name: str) -> None:
    values = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    refused = 0
    for key, config in wrong_configs(values):
        wanted = refusal(config, key)
        if wanted is None:
            continue
        refused += 1
        with pytest.raises(CheckpointError) as caught:
            plan._refused_by_export(config, "config.json", None)
        assert str(caught.value) == wanted, key
        with suppress(CheckpointError):  # on a device without torch: no other error
            shape_of(config)
    assert refused > 20


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = main(list(words))
    return status, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (None, {"vision_config": {}}),
        (None, {"text_config": {}}),
        (None, {"num_query_tokens": 7}),
        ("vision_config", {"num_hidden_layers": 1}),
        ("vision_config", {"hidden_act": "mish"}),
        ("text_config", {"hidden_size": 30}),
        ("text_config", {"model_type": "bloom"}),
        ("qformer_config", {"cross_attention_frequency": 0}),
        ("text_config", {"_remove_final_layer_norm": "yes"}),
    ],
)
def test_plan_and_export_say_the_same_of_a_checkpoint(
    section: str | None,
    values: dict[str, Any],
    copied: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    (config if section is None else config[section]).update(values)
    path.write_text(json.dumps(config), encoding="utf-8")
    wanted = told(capsys, "export", str(copied), "-o", str(tmp_path / "bundle"))
    assert wanted[0] == 1
    assert told(capsys, "plan", str(copied)) == wanted


@pytest.mark.parametrize("strategy", ["cls", None, 3, ["full"]])
def test_an_unknown_strategy_without_torch_too(strategy: Any) -> None:
    """On a device there is no torch: `plan` then refuses by its own rules."""
    llava = json.loads((CONFIGS / "llava-1.5-7b.json").read_text(encoding="utf-8"))
    native = {"model_type": "blip2edge", "bridge_config": {"kind": "pool"}, "text_config": {}}
    vision = {"model_type": "dinov2", "vision_feature_select_strategy": strategy}
    for config in (
        {**llava, "vision_feature_select_strategy": strategy},
        {**native, "vision_config": vision},
        {**native, "vision_config": {**vision, "model_type": "siglip_vision_model"}},
        {**llava, "vision_feature_layer": [-2, -5]},
        {**llava, "vision_feature_layer": 0},
    ):
        wanted = refusal(config, "")
        assert wanted is not None
        with pytest.raises(CheckpointError) as caught:
            shape_of(config)
        assert str(caught.value) == wanted


def test_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    path = tmp_path / "other.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert main(["plan", str(path)]) == 0
    capsys.readouterr()
    path.write_text(json.dumps({**config, "architectures": ["Blip2Model"]}), encoding="utf-8")
    status, error = told(capsys, "plan", str(path))
    assert (status, "of the class Blip2Model, which is not supported" in error) == (1, True)
