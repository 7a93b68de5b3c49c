"""Keys of a recipe that would have no effect are refused by name, also with the value of their default."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from blip2edge.errors import ConfigError
from blip2edge.training.config import TrainingConfig, load_config, parse_config
from blip2edge.training.data.config import DATA_KINDS, MIXTURE, DataConfig
from blip2edge.training.key_rules import BRIDGE_SIZES, KINDS_OF_KEY, RULES, choice
from blip2edge.training.loop_config import ValidationConfig
from blip2edge.training.model_config import BlockSizes

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMED = '[model]\ncheckpoint = "x"\n'
FOLDER = NAMED + '[data]\nkind = "folder"\npath = "x"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[validation]\npictures = 9", r"\[validation\] pictures has no effect: every is 0"),
        ("[validation]\nkind = 'folder'\npath = 'x'", r"\[validation\] kind, path have no effect: every is 0"),
        ("[validation]\nkeep_best = true", "keep_best has no effect"),
        ("[validation]\nevery = 1\ncrop = 0.5", "crop has no effect: validation reads each picture once, in order"),
        ("[validation]\nevery = 1\nflip = 0.5", "flip has no effect"),
        ("[validation]\nevery = 1\nratio = 1.0", "ratio has no effect"),
        ("[validation]\nevery = 1\nsize = 3", "size has no effect"),
        ("[validation]\nevery = 1\ncount = 3", r"count has no effect: .* set pictures"),
        ("[validation]\nevery = 1\nprompts = ['a']", "prompts has no effect: validation uses the prompt"),
        ("[validation]\nevery = 1\nquestion = '{}?'", "question has no effect"),
        ("[validation]\nevery = 1\nkind = 'shards'\npath = 'x'\nshuffle_buffer = 5", "shuffle_buffer has no effect"),
        ("[stage2]\nlora_alpha = 16.0", r"\[stage2\] lora_alpha has no effect: lora_rank is 0"),
        ("[instruct]\nlora_alpha = 8.0\nlora_targets = 'all'", "lora_alpha, lora_targets have no effect"),
        ("[stage2]\nelastic_min = 1", "elastic_min has no effect: elastic is false"),
        ("[stage1]\nsteps = 1\nlayer_decay = 1.0", r"\[stage1\] layer_decay has no effect: the picture encoder is"),
        ("[stage1]\nbatch_size = 8", r"\[stage1\] batch_size has no effect: steps is 0"),
        ("bridge = 'mlp'\n[stage1]\nmax_tokens = 8", "max_tokens has no effect: only a Q-Former has a text side"),
        ("bridge = 'mlp'\n[stage1]\nsteps = 8", "stage 1 trains a Q-Former, and bridge = 'mlp'"),
        ("[loop]\nema_weights = 'everywhere'", "ema_weights has no effect: ema_decay is 0"),
        ("[loop]\nfeatures_dtype = 'float16'", "features_dtype has no effect: cache_features is false"),
        ("[loop]\nencoder_autocast = false", "encoder_autocast has no effect: autocast is 'float32'"),
        ("[loop]\ntracker_project = 'p'", "tracker_project has no effect: there are no trackers"),
        (NAMED + "patch_size = 8", r"\[model\] patch_size has no effect: it is a size of the miniature"),
        (NAMED + "[model.vision]\nnum_layers = 3", r"\[model\] vision has no effect"),
        (NAMED + "[vision]\nsteps = 3", r"\[vision\] steps has no effect: only the miniature is pretrained"),
        (NAMED + "[language]\nsteps = 3", r"\[language\] steps has no effect"),
        ("[model]\ndropout = 0.1", "dropout has no effect: only a new Q-Former has dropout"),
        ("bridge = 'pool'\n" + NAMED + "bert = 'b'", "bert has no effect: this bridge has no Q-Former"),
        ("bridge = 'mlp'\n[model]\nnum_query_tokens = 8", "num_query_tokens has no effect: bridge = 'mlp'"),
        ("bridge = 'pool'\n[model.qformer]\nnum_layers = 2", r"\[model.qformer\] num_layers has no effect: a bridge"),
        (
            "bridge = 'mlp'\n[model]\ncheckpoint = 'x'\nvision_from = 'y'\nlanguage_from = 'z'",
            "checkpoint has no effect",
        ),
        ("[data]\npath = 'x'", r"\[data\] path has no effect: the kind 'scenes' does not use it; set kind to coco-"),
        ("[data]\nmax_broken = 100", "max_broken has no effect"),
        ("[data]\nratio = 1.0", "ratio has no effect: it balances a mixture, and there is one data set"),
        ("[data]\nflip_except = ['left']", "flip_except has no effect: flip is 0"),
        ("[[data]]\ncount = 3\nratio = 1\nsize = 4\n[[data]]\nratio = 1", "size has no effect: the ratios decide"),
        (
            "[[data]]\ncount = 3\nratio = 1\n[[data]]\nratio = 1\nimages = 'x'",
            "images has no effect: the kind",
        ),
        (FOLDER + "count = 0", "count has no effect: the kind 'folder' does not use it; set kind to scenes, or leave"),
        (FOLDER + "question = '{}'", "question has no effect"),
        (FOLDER + "images = 'y'", "images has no effect"),
        (FOLDER + "splits = ['test']", "splits has no effect: .* set kind to karpathy, or"),
    ],
)
def test_a_key_without_effect_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_config(text)
    assert "leave" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[validation]\nevery = 0\npictures = 9\nkind = 'scenes'\npatience = 3",  # off on purpose
        "[stage2]\nlora_rank = 0\nlora_alpha = 16.0",
        "[stage2]\nelastic = false\nelastic_min = 3",
        "[stage1]\nsteps = 0\nbatch_size = 8\nlearning_rate = 1e-3",
        "[stage1]\nmax_tokens = 12",  # of the text side, also without stage 1
        "[loop]\nema_decay = 0.0\nema_weights = 'everywhere'",
        "[loop]\ncache_features = false\nfeatures_dtype = 'float16'",
        "[loop]\nautocast = 'bfloat16'\nencoder_autocast = false",
        "[loop]\ntensorboard = true\ntracker_project = 'p'",
        "[validation]\nevery = 5\npictures = 20\nmetric = 'cider_d'\nnum_beams = 2\npatience = 2\nkeep_best = false",
        "[data]\nflip = 0.5\nflip_except = ['up']",
        "[[data]]\nsize = 3\n[[data]]\nsize = 4",
        "[model]\ncheckpoint = 'x'\nvision_from = 'y'\nlanguage_from = 'z'",  # may give a text side its tokenizer
        "[[data]]\nratio = 3\n[[data]]\nratio = 4",
    ],
)
def test_what_has_an_effect_or_is_off_on_purpose_is_taken(text: str) -> None:
    parse_config(text)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.toml")), ids=lambda path: path.stem)
def test_the_examples_have_no_key_without_effect(path: Path) -> None:
    load_config(path)


def test_the_rules_name_keys_that_exist_and_every_kind() -> None:
    sections = {each.name: getattr(TrainingConfig(), each.name) for each in dataclasses.fields(TrainingConfig)}
    for name, rules in RULES.items():
        for rule in rules:
            assert set(rule.keys + rule.switches + rule.but) <= set(sections[name].key_names()), name
    assert KINDS_OF_KEY.keys() <= set(DataConfig.key_names())
    assert all(set(kinds) <= set(DATA_KINDS) for kinds in KINDS_OF_KEY.values())
    assert all(set(sizes) <= set(BlockSizes.key_names()) for sizes in BRIDGE_SIZES.values())


def test_a_recipe_with_every_default_written_is_refused_only_where_a_switch_is_missing() -> None:
    """Every switch is written too, so that what it switches is off on purpose: what is left are sizes and kinds."""

    def plain(section: Any) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key in section.key_names()
            if key != "sets" and not dataclasses.is_dataclass(value := getattr(section, key))
        }

    whole = TrainingConfig()
    for name in ("loop", "stage1", "stage2", "instruct", "vision", "language"):
        written = parse_config(json.dumps({name: plain(getattr(whole, name))}), is_json=True)
        assert written == whole
        assert getattr(written, name).written == getattr(whole, name).key_names()
    validation = set(ValidationConfig.key_names()) - set(DataConfig.key_names())
    values = {key: value for key, value in plain(whole.validation).items() if key in validation}
    assert parse_config(json.dumps({"validation": values}), is_json=True) == whole


@pytest.mark.parametrize("kind", [kind for kind in DATA_KINDS if kind != MIXTURE])
def test_the_keys_of_a_kind(kind: str) -> None:
    """Each key of `[data]` is taken or refused by its name, with a value that differs from the default."""
    values: dict[str, Any] = {
        "images": "x", "annotations": "x", "splits": ["a"], "image_column": "x", "text_column": "x",
        "question": "{}", "more_questions": ["{}"], "max_broken": 3, "shuffle_buffer": 3, "copies_gib": 3,
        "count": 3, "series": 3, "prompts": ["x"], "prompt_share": 0.5,
    }  # fmt: skip
    assert values.keys() == KINDS_OF_KEY.keys() - {"path"}
    base = {"kind": kind} | ({} if kind == "scenes" else {"path": "x"})
    for key, value in values.items():
        text = json.dumps({"model": {"checkpoint": "x"}, "data": base | {key: value}})
        if kind in KINDS_OF_KEY[key]:
            assert parse_config(text, is_json=True).data.written[-1:] != ()
        else:
            with pytest.raises(ConfigError, match=rf"\[data\] {key} has no effect: the kind '{kind}' does not use it"):
                parse_config(text, is_json=True)


def test_a_choice_in_a_sentence() -> None:
    assert [choice(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a or b", "a, b or c"]
