"""Errors in a recipe come before the model is built, and name the recipe and the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="training needs accelerate")

from blip2edge.errors import Blip2EdgeError, ConfigError, DataError
from blip2edge.model.checkpoint.directory import read_model_config
from blip2edge.model.config import CaptionerConfig
from blip2edge.training.config import parse_config
from blip2edge.training.data.scenes import scenes
from blip2edge.training.run import train
from blip2edge.training.setup import build, pretrained
from blip2edge.training.setup.checks import check_bert_sizes, check_phases

CHECKPOINT = Path(__file__).parents[3] / "examples" / "checkpoint"
PARTS = f'[model]\nvision_from = "{CHECKPOINT}"\nlanguage_from = "{CHECKPOINT}"\n'
STEPS = "[stage2]\nsteps = 2\nbatch_size = 2\nwarmup_steps = 0\n"
FOLDER = '[data]\nkind = "folder"\npath = "photos"\n'
EMPTY = '[[data]]\nkind = "folder"\npath = "photos"\nratio = 1\n[[data]]\nkind = "folder"\npath = "empty"\nratio = 1\n'
BROKEN = EMPTY.replace("empty", "broken")

CASES: dict[str, tuple[str, type[Blip2EdgeError], str]] = {
    "metric": (
        f'{PARTS}{STEPS}{FOLDER}[validation]\nevery = 1\nkind = "folder"\npath = "photos"\nmetric = "vqa_accuracy"\n',
        ConfigError,
        r"\[validation\] metric = 'vqa_accuracy' cannot be computed on captions",
    ),
    "validation": (
        f'{PARTS}{STEPS}{FOLDER}[validation]\nevery = 1\nkind = "folder"\npath = "empty"\n',
        DataError,
        r"\[validation\] path = 'empty': \S*empty: expected pictures",
    ),
    "streams": (f"{PARTS}{STEPS}{FOLDER}[loop]\ndata_streams = 3\n", ConfigError, r"\[loop\] data_streams must be"),
    "streams of few samples": (
        f"{PARTS}{STEPS}{FOLDER}[loop]\ndata_streams = 4\n".replace("batch_size = 2", "batch_size = 4"),
        ConfigError,
        r"expected at least 4 samples for the 4 data streams, got 3",
    ),
    "elastic": (f"bridge = 'mlp'\n{PARTS}{STEPS}elastic = true\n", ConfigError, r"\[stage2\] elastic is true, but"),
    "elastic_min": (
        f"{PARTS}num_query_tokens = 4\n{STEPS}elastic = true\nelastic_min = 4\n",
        ConfigError,
        r"\[stage2\] elastic_min must be below 4",
    ),
    "empty": (
        FOLDER.replace("photos", "empty") + PARTS + STEPS,
        DataError,
        r"\[data\] path = 'empty': \S*empty: expected pictures",
    ),
    "empty set": (EMPTY + PARTS + STEPS, DataError, r"\[\[data\]\] set 2 path = 'empty': \S*empty: expected pictures"),
    "broken set": (
        BROKEN + PARTS + STEPS,
        DataError,
        r"\[\[data\]\] set 2 path = 'broken': \S*broken: expected at least one usable sample, got none; 3 samples are",
    ),
    "sizes": (
        f"[[data]]\n{FOLDER[7:]}[[data]]\n{PARTS}{STEPS}",
        ConfigError,
        r"\[\[data\]\] the number of samples is not known for scenes",
    ),
    "frozen_dtype": (
        f"{PARTS}{STEPS}unfreeze_vision = true\nunfreeze_language = true\n[loop]\nfrozen_dtype = 'bfloat16'\n",
        ConfigError,
        r"\[loop\] frozen_dtype has no effect in stage2: no part of the model is frozen",
    ),
    "tracker": (f"{PARTS}{STEPS}[loop]\ntrackers = ['nobody']\n", ConfigError, r"\[loop\] trackers: 'nobody'"),
    "path": (FOLDER.replace("photos", "nowhere") + PARTS + STEPS, DataError, r"\[data\] path = 'nowhere'"),
}


@pytest.fixture(scope="module", name="root")
def _root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three pictures with texts: readable ones, broken ones, and a folder without pictures."""
    root = tmp_path_factory.mktemp("recipes")
    for name in ("photos", "broken", "empty"):
        (root / name).mkdir()
    for number, scene in enumerate(scenes(3)):
        scene.picture.save(root / "photos" / f"{number}.png")
        (root / "broken" / f"{number}.png").write_bytes(b"no picture")
        for name in ("photos", "broken"):
            (root / name / f"{number}.txt").write_text(scene.caption)
    return root


@pytest.mark.parametrize("case", list(CASES))
def test_an_error_comes_before_the_model_is_built(
    case: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, kind, message = CASES[case]
    path = root / f"{case.replace(' ', '-')}.toml"
    path.write_text(text)

    def built(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model is built")

    monkeypatch.setattr(pretrained, "assemble_captioner", built)
    monkeypatch.setattr(build, "load_checkpoint", built)
    with pytest.raises(kind, match=rf"^{re.escape(str(path))}: .*{message}"):
        train("stage2", path, tmp_path / "out", evaluation_scenes=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "trained"), [("stage1", ()), ("stage2", ("unfreeze_vision",)), ("stage2", ("unfreeze_language",))]
)
def test_frozen_dtype_is_kept_where_a_part_is_frozen(stage: str, trained: tuple[str, ...]) -> None:
    lines = "".join(f"{key} = true\n" for key in trained)
    config = parse_config(f"{PARTS}[loop]\nfrozen_dtype = 'bfloat16'\n[stage1]\nsteps = 1\n{STEPS}{lines}")
    given = read_model_config(CHECKPOINT)
    assert isinstance(given, CaptionerConfig)
    check_phases(config, given, [stage])
    if "unfreeze_vision" in trained:
        loop = "[loop]\nautocast = 'bfloat16'\nencoder_autocast = false\n"
        with pytest.raises(
            ConfigError, match="encoder_autocast has no effect in stage2: the picture encoder is trained"
        ):
            check_phases(parse_config(f"{PARTS}{loop}{STEPS}{lines}"), given, [stage])


def test_the_recipe_without_an_error_builds_the_model(root: Path, tmp_path: Path) -> None:
    """The cases above differ from it by one value, or they would be refused for another reason."""
    path = root / "right.toml"
    path.write_text(FOLDER + PARTS + STEPS)
    record = train("stage2", path, tmp_path / "out", evaluation_scenes=0)
    assert record["phases"]["stage2"]["steps"] == 2


@pytest.mark.parametrize(
    ("sizes", "bert", "said"),
    [
        ("hidden_size = 64", {"hidden_size": 32}, r"\[model.qformer\] hidden_size = 64, but the BERT b .* has 32; set"),
        ("intermediate_size = 64", {"intermediate_size": 32}, r"intermediate_size = 64, but the BERT b .* has 32"),
        ("num_layers = 3", {"num_hidden_layers": 2}, r"num_layers = 3, but the BERT b .* has 2; .* at most 2"),
        ("num_layers = 3", {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 512}, ""),
    ],
)
def test_a_bert_of_other_sizes_is_refused_by_its_config(sizes: str, bert: dict[str, int], said: str) -> None:
    config = parse_config(f'{PARTS}bert = "b"\n[model.qformer]\n{sizes}\n')
    if not said:
        check_bert_sizes(config, bert)
        return
    with pytest.raises(ConfigError, match=said):
        check_bert_sizes(config, bert)
