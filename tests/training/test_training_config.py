"""Checks of the recipe before training starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2edge.errors import ConfigError
from blip2edge.training.config import TrainingConfig, config_hash, load_config, parse_config

RECIPE = Path(__file__).parents[2] / "examples" / "configs" / "scenes.toml"


def test_the_recipe_of_the_miniature_is_valid() -> None:
    config = load_config(RECIPE)
    assert config.data.kind == "scenes"
    assert config.weights_dtype == "float16"


def test_an_empty_text_gives_the_defaults() -> None:
    assert parse_config("") == TrainingConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sede = 1", r"unknown key 'sede'; did you mean 'seed'\?"),
        ("[stage2]\nlearning_rat = 1", r"unknown key 'stage2.learning_rat'; did you mean 'learning_rate'\?"),
        ("[model.vison]\nnum_layers = 1", r"unknown key 'model.vison'; did you mean 'vision'\?"),
        ("[data]\nqqq = 1", "the keys here are kind, "),
        ("seed = -1", "seed must be at least 0"),
        ("seed = '1'", "seed must be a whole number, not '1'"),
        ("seed = true", "seed must be a whole number, not True"),
        ("threads = 0", "threads must be greater than 0"),
        ("weights_dtype = 'int8'", "weights_dtype"),
        ("vision = 3", "vision must be a table"),
        ("[vision]\nsteps = 0", r"\[vision\] steps must be at least 1"),
        ("[stage2]\nlearning_rate = nan", "finite"),
        ("[stage2]\nlearning_rate = -1", "learning_rate must be greater"),
        ("[stage2]\nmin_learning_rate = 1.0", "min_learning_rate must lie between"),
        ("[stage2]\nwarmup_steps = -1", "warmup_steps"),
        ("[stage2]\nbeta1 = 2.0", "beta1 must lie between 0 and 1"),
        ("[language]\nprefix_share = 1.5", "prefix_share"),
        ("[language]\nprefix_noise = -0.5", "prefix_noise"),
        ("[data]\nkind = 'coco'", "kind must be one of "),
        ("[data]\nprompts = 'a photo of'", "list of strings"),
        ("[data]\nprompts = []", "prompts is empty"),
        ("[model]\npatch_size = 7", "patch_size must divide"),
        ("[model]\nnum_query_tokens = 3", "num_query_tokens must be at least 7"),
        ("[model]\nmax_positions = 10", "max_positions"),
        ("[model.vision]\nnum_heads = 3", "does not divide"),
        ("[model.vision]\nnum_layers = 0", "greater than 0"),
        ("seed = ", "expected TOML"),
        ("bridge = 'qfromer'", r"bridge must be one of .*; did you mean 'qformer'\?"),
        ("[loop]\nautocast = 'bf16'", r"\[loop\] autocast must be one of"),
        ("[loop]\nsnapshot_every = 0", "snapshot_every must be greater than 0"),
        ("[stage1]\nitc_weight = 0\nitm_weight = 0\nitg_weight = 0", "must not all be 0"),
        ("[stage1]\nmax_tokens = 2", "max_tokens must be at least 3"),
        ("[stage2]\nitg_weight = -1.0", r"\[stage2\] itg_weight must be at least 0"),
        (
            "[instruct]\nmax_tokens = 0",
            r"\[instruct\] max_tokens must be at least 2, for one token of the text and the",
        ),
        ("[stage2]\nmax_tokens = 1", r"\[stage2\] max_tokens must be at least 2, .* and the end token, not 1"),
        ("[stage2]\naccumulate = 0", "accumulate must be greater than 0"),
        ("[model]\ndropout = 2.0", "dropout must lie between"),
        ("[data]\nkind = 'folder'\npath = 'x'", "supports the data kind 'scenes' only"),
    ],
)
def test_a_wrong_recipe_is_told_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_config(text)
    assert "\n" not in str(caught.value)


def test_json_says_the_same_as_toml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"seed": 3, "bridge": "pool", "data": {"prompts": ["a"]}, "stage2": {"steps": 7}}')
    toml = "seed = 3\nbridge = 'pool'\n[data]\nprompts = ['a']\n[stage2]\nsteps = 7"
    assert load_config(path) == parse_config(toml)
    path.write_text('{"sede": 3}')
    with pytest.raises(ConfigError, match=r"recipe\.json: unknown key 'sede'; did you mean 'seed'"):
        load_config(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        load_config(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="expected JSON"):
        load_config(path)


def test_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such"):
        load_config(tmp_path / "no-such.toml")
    path = tmp_path / "wrong.toml"
    path.write_text("sede = 1")
    with pytest.raises(ConfigError, match=r"wrong\.toml: unknown key"):
        load_config(path)


def test_the_hash_sees_values_and_not_their_spelling() -> None:
    assert config_hash(parse_config("seed = 0")) == config_hash(parse_config("# a remark"))
    assert config_hash(parse_config("seed = 1")) != config_hash(parse_config(""))
