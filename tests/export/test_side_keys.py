"""The tables of side-file keys: complete for the installed transformers, and correct for random keys and values."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the oracle is transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

import transformers
from transformers import GenerationConfig

from blip2edge.errors import CheckpointError
from blip2edge.export.side_files import SideFiles
from blip2edge.model.checkpoint.directory import Checkpoint
from blip2edge.model.checkpoint.image_processor import CLASSES, load_preprocessing, read_image_processor
from blip2edge.model.checkpoint.side_keys import FROM_CONFIG, GENERATION, IMAGE_PROCESSOR, PROCESSOR, KeyTable
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.text.tokenizer import Tokenizer
from tests import side_file_kinds
from tests.drawing import Drawn
from tests.families.drawing_llama import draw_llava, draw_minigpt4
from tests.families.test_pool import save_pool
from tests.side_file_draws import Base, Draws, judge, state_of
from tests.side_file_kinds import KINDS

ROOT = Path(__file__).parents[2]
PICTURE_CLASSES = [name for name in CLASSES if name not in ("InstructBlipVideo", "DINOv3ViT")]
"""DINOv3's class needs torchvision: tests/families/test_encoders.py has its defaults."""


@pytest.fixture
def copied(tiny_checkpoint: Drawn, tmp_path: Path) -> Path:
    """A copy of the tiny BLIP-2."""
    return shutil.copytree(tiny_checkpoint.directory, tmp_path / "checkpoint")


def edit(path: Path, section: str = "", **changes: Any) -> None:
    """Changes keys of a JSON file."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    (values.setdefault(section, {}) if section else values).update(changes)
    path.write_text(json.dumps(values))


def read(directory: Path) -> SideFiles:
    """The side files of a checkpoint."""
    checkpoint = Checkpoint(directory)
    try:
        return SideFiles.read(directory, checkpoint.config)
    finally:
        checkpoint.files.close()


@pytest.mark.parametrize("table", [IMAGE_PROCESSOR, PROCESSOR, GENERATION], ids=lambda table: table.file.split(",")[0])
def test_a_key_has_one_effect(table: KeyTable) -> None:
    names = [*table.honoured, *table.neutral, *table.checked]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", PICTURE_CLASSES)
def test_defaults_are_those_of_the_class(name: str) -> None:
    processor: Any = getattr(transformers, f"{name}ImageProcessorPil")()
    row = CLASSES[name]
    assert dict(processor.size) == row.size
    assert bool(getattr(processor, "do_center_crop", False)) == row.do_crop
    assert (dict(processor.crop_size) if processor.crop_size else None) == row.crop
    assert (int(processor.resample), tuple(processor.image_mean), tuple(processor.image_std)) == (
        row.resample,
        row.mean,
        row.std,
    )
    assert all(getattr(processor, step) for step in ("do_resize", "do_rescale", "do_normalize"))
    unknown = {key for key in processor.valid_kwargs.__annotations__ if IMAGE_PROCESSOR.effect(key) == "unread"}
    assert unknown <= {"transform"}  # an argument of a call, never in a file


def test_every_key_of_a_generation_config_is_in_the_table() -> None:
    keys = GenerationConfig().__dict__
    assert [key for key in keys if GENERATION.effect(key) == "unread"] == []


def test_honoured_keys_are_options_of_the_runtime() -> None:
    options = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert {*GENERATION.honoured} - options == {"eos_token_id", "do_sample"}


def test_every_argument_of_the_processors_is_in_the_table() -> None:
    for name in ("Blip", "Blip2", "InstructBlip", "InstructBlipVideo", "Llava", "Idefics", "CLIP"):
        for key in inspect.signature(getattr(transformers, f"{name}Processor").__init__).parameters:
            if key not in ("self", "args", "kwargs", *FROM_CONFIG):
                assert PROCESSOR.effect(key) != "unread", (name, key)


def test_a_nested_image_processor_goes_before_the_other_file(copied: Path) -> None:
    nested = json.loads((copied / "processor_config.json").read_text())["image_processor"]
    edit(copied / "preprocessor_config.json", **nested | {"image_mean": [0.5, 0.5, 0.5]})
    loaded = load_preprocessing(copied)
    assert list(loaded.preprocessing.mean) == list(nested["image_mean"])
    assert [warning.partition(": ")[2] for warning in loaded.warnings] == [
        f"not used, as {copied / 'processor_config.json'}, image_processor goes before it, as in transformers"
    ]
    edit(copied / "preprocessor_config.json", image_mean=nested["image_mean"])
    assert load_preprocessing(copied).warnings == []
    edit(copied / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    edit(copied / "processor_config.json", image_processor=None)
    assert load_preprocessing(copied).preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "field", "wanted"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "mean", (0.5, 0.5, 0.5)),
        ({"image_processor_type": "ViTImageProcessorFast"}, "resample", 2),
        ({"feature_extractor_type": "ViTFeatureExtractor", "resample": 0}, "resample", 0),
        ({"image_processor_type": "CLIPImageProcessor"}, "size", {"shortest_edge": 224}),
        ({"do_rescale": None}, "do_rescale", False),
        ({"resample": None}, "resample", 2),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": None}, "crop", None),
        ({"image_processor_type": "DeiTImageProcessor"}, "crop", {"height": 224, "width": 224}),
        ({"image_processor_type": "IdeficsImageProcessor", "image_size": 98}, "size", {"height": 98, "width": 98}),
        ({"size": 98}, "size", {"height": 98, "width": 98}),
        ({"size": 98, "default_to_square": False}, "size", {"shortest_edge": 98}),
        ({"image_processor_type": "SiglipImageProcessor", "size": 98}, "size", {"shortest_edge": 98}),
        ({"do_center_crop": True, "crop_size": 98}, "crop", {"height": 98, "width": 98}),
    ],
)
def test_absent_keys_take_the_defaults_of_the_class(values: dict[str, Any], field: str, wanted: Any) -> None:
    assert getattr(read_image_processor(values).preprocessing, field) == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "ConvNextImageProcessor is not supported"),
        ({"do_pad": True}, "do_pad is true, which is not supported"),
        ({"data_format": "channels_last"}, 'data_format is "channels_last"'),
        ({"do_resize": "yes"}, "do_resize: expected true or false"),
        ({"size": None}, "size: expected a value, got null"),
        ({"image_std": None}, "image_std: expected a value, got null"),
    ],
)
def test_a_step_that_is_not_supported_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_image_processor(values)


@pytest.mark.parametrize(
    ("file", "section", "key", "value"),
    [
        ("config.json", "qformer_config", "use_qformer_text_input", True),
        ("processor_config.json", "", "num_query_tokens", 7),
        ("processor_config.json", "image_processor", "do_pad", True),
    ],
)
def test_a_value_that_would_change_captions_is_refused_by_name(
    copied: Path, file: str, section: str, key: str, value: Any
) -> None:
    edit(copied / file, section, **{key: value})
    with pytest.raises(CheckpointError, match=rf"{file}.*{key} is "):
        read(copied)


def test_a_key_that_transformers_does_not_read_is_named_in_a_warning(copied: Path) -> None:
    assert read(copied).warnings == ()
    edit(copied / "config.json", "text_config", favourite=3, dropout=0.9, colour=None)
    edit(copied / "processor_config.json", "image_processor", crop_pct=0.9)
    edit(copied / "generation_config.json", num_beams=3, temperature=0.5, eos_token_id=7)
    edit(copied / "processor_config.json", video_processor={"size": 24})
    config, video, processor, generation = read(copied).warnings
    assert video.endswith("processor_config.json: not used, as transformers does not read it either: video_processor")
    assert config.endswith("config.json, text_config: not used, as transformers does not read it either: favourite")
    assert processor.endswith("image_processor: not used, as transformers does not read it either: crop_pct")
    assert generation.endswith("not used for BLIP-2, as in transformers: eos_token_id, num_beams, temperature")


@pytest.mark.parametrize("video", [False, True])
def test_settings_of_the_other_kind_of_picture_are_not_used(video: bool, copied: Path) -> None:
    path = copied / "processor_config.json"
    values = json.loads(path.read_text())
    own, other = ("video_processor", "image_processor") if video else ("image_processor", "video_processor")
    settings = values.pop("image_processor")
    if video:
        edit(copied / "config.json", model_type="instructblipvideo")
        (copied / "video_preprocessor_config.json").write_text(json.dumps(settings))
    else:
        (copied / "preprocessor_config.json").write_text(json.dumps(settings))
    path.write_text(json.dumps(values | {other: settings | {"image_mean": [0.5, 0.5, 0.5]}}))
    assert list(load_preprocessing(copied).preprocessing.mean) == list(settings["image_mean"])
    edit(path, own, **settings | {"image_std": [0.5, 0.5, 0.5]})
    assert load_preprocessing(copied).preprocessing.std == (0.5, 0.5, 0.5)


def test_empty_nested_settings_are_the_defaults_of_the_class(copied: Path) -> None:
    settings = json.loads((copied / "processor_config.json").read_text())["image_processor"]
    (copied / "preprocessor_config.json").write_text(json.dumps(settings))
    values = json.loads((copied / "processor_config.json").read_text()) | {"image_processor": {}}
    (copied / "processor_config.json").write_text(json.dumps(values))
    assert load_preprocessing(copied).preprocessing.size == {"height": 384, "width": 384}


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_the_processor_of_another_model_is_refused(name: str, copied: Path) -> None:
    for file in ("processor_config.json", "tokenizer_config.json"):
        edit(copied / file, processor_class=None)
    edit(copied / name, processor_class="BlipProcessor")
    with pytest.raises(CheckpointError, match=rf'{name}: processor_class is "BlipProcessor".*Blip2Processor'):
        read(copied)


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "additional_chat_templates/rag.jinja", "tokenizer_config.json"]
)
def test_a_chat_template_that_is_not_used_is_named(file: str, copied: Path) -> None:
    path = copied / file
    if path.suffix == ".jinja":
        path.parent.mkdir(exist_ok=True)
        path.write_text("{{ messages }}")
    else:
        edit(path, chat_template="{{ messages }}")
    (warning,) = read(copied).warnings
    assert warning.startswith(f"{path}: the chat template is not used: prompts of BLIP-2 have the form")


@pytest.mark.parametrize(
    ("file", "template", "message"),
    [
        ("chat_template.jinja", "{{ messages[0]['role'] }}", "it has no place for one picture"),
        ("tokenizer_config.json", "<image>{{ messages[0]['content'][1]['text'] }}", "does not read it from there"),
        ("chat_template.jinja", "<image>{{ messages[0]['content'][1]['text'] | trim }}", "removes spaces"),
        ("chat_template.jinja", "<image>{{ messages[0]['content'][1]['text'] | upper }}", None),
        ("chat_template.jinja", "<image>{{ strftime_now('%Y') }}{{ messages[0]['content'][1]['text'] }}", "the date"),
    ],
)
def test_a_chat_template_that_is_followed_in_part(
    file: str, template: str, message: str | None, tmp_path: Path
) -> None:
    draw_llava(tmp_path, 0)
    if file.endswith(".jinja"):
        (tmp_path / file).write_text(template)
    else:
        edit(tmp_path / file, chat_template=template)
    if message is None:
        with pytest.raises(CheckpointError, match="the chat template changes the text of a message"):
            read(tmp_path)
        return
    (warning,) = read(tmp_path).warnings
    assert message in warning


def test_another_image_token_than_the_tokenizers_is_refused(copied: Path) -> None:
    edit(copied / "config.json", image_token_index=0)
    with pytest.raises(CheckpointError, match=r"but config\.json says image_token_index 0"):
        read(copied)


def test_formats_that_transformers_does_not_know_are_checked_too(tmp_path: Path) -> None:
    draw_minigpt4(tmp_path, 0)
    assert read(tmp_path).warnings == ()
    edit(tmp_path / "config.json", "text_config", favourite=3)
    (warning,) = read(tmp_path).warnings
    assert warning.endswith("text_config: not used, as transformers does not read it either: favourite")
    edit(tmp_path / "config.json", "qformer_config", use_qformer_text_input=True)
    with pytest.raises(CheckpointError, match="use_qformer_text_input is true"):
        read(tmp_path)


def test_unread_keys_of_this_projects_own_format_are_named(tiny_checkpoint: Drawn, tmp_path: Path) -> None:
    save_pool(tmp_path / "pool", tiny_checkpoint)
    edit(tmp_path / "pool" / "config.json", "bridge_config", favourite=3)
    warnings = read(tmp_path / "pool").warnings
    assert any(
        warning.endswith("bridge_config: not used, as transformers does not read it either: favourite")
        for warning in warnings
    ), warnings


def test_pictures_of_varying_sizes_are_refused(copied: Path) -> None:
    edit(copied / "processor_config.json", "image_processor", size={"shortest_edge": 32})
    with pytest.raises(CheckpointError, match="pictures of varying sizes, but the vision encoder takes 32 x 32"):
        read(copied)


def test_settings_of_the_tokenizer_reach_the_bundle(copied: Path) -> None:
    edit(copied / "tokenizer_config.json", split_special_tokens=True, clean_up_tokenization_spaces=True)
    side = read(copied)
    assert side.tokenizer_flags == {"split_special_tokens": True, "clean_up_tokenization_spaces": True}
    (copied / "tokenizer.json").write_bytes(side.tokenizer)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(copied)
    ours = Tokenizer.from_file(copied / "tokenizer.json", **side.tokenizer_flags)
    text = "a photo </s> of"
    assert ours.encode(text) == theirs(text)["input_ids"] != Tokenizer.from_file(copied / "tokenizer.json").encode(text)


@pytest.mark.parametrize(("kind", "key"), [("blip", "add_bos_token"), ("idefics", "add_eos_token")])
def test_other_special_tokens_around_a_text_are_refused(kind: str, key: str, tmp_path: Path) -> None:
    KINDS[kind].save(tmp_path)
    read(tmp_path)
    edit(tmp_path / "special_tokens_map.json", "", **{key: True})
    with pytest.raises(CheckpointError, match=r"expected (one|no) special token"):
        read(tmp_path)


def test_generation_config_becomes_the_defaults(tmp_path: Path) -> None:
    draw_llava(tmp_path, 0)
    path = tmp_path / "generation_config.json"
    edit(path, repetition_penalty=1.3, num_beams=1, temperature=0.4, max_new_tokens=12, eos_token_id=[7, 9])
    found = read(tmp_path).generation
    assert (found["repetition_penalty"], found["max_new_tokens"], found["eos_token_ids"]) == (1.3, 12, [7, 9])
    assert not {"num_beams", "temperature"} & found.keys()  # no effect: the default, and no sampling
    edit(path, do_sample=True)
    found = read(tmp_path).generation
    assert (found["temperature"], found["top_k"], found["top_p"]) == (0.4, 50, 1.0)
    for key, value in (
        ("guidance_scale", 2.0),
        ("num_return_sequences", 2),
        ("stop_strings", ["a"]),
    ):
        edit(path, "", **{key: value})
        with pytest.raises(CheckpointError, match=rf"generation_config.json: {key} is "):
            read(tmp_path)
        edit(path, "", **{key: None})


def test_the_page_is_what_the_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = importlib.import_module("side_files_table").page()
    assert (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8") == page, "run: make docs"


@pytest.mark.parametrize(
    ("kinds", "seed", "count"),
    [(("blip-2, opt", "llava"), 3, 14), pytest.param(tuple(KINDS), 5, 300, marks=pytest.mark.slow)],
    ids=["few", "all"],
)
@pytest.mark.filterwarnings("ignore")  # transformers' own notes on the drawn values
def test_drawn_keys_and_values_give_no_silent_difference(
    kinds: tuple[str, ...], seed: int, count: int, tmp_path: Path
) -> None:
    results = list(Draws(tmp_path, seed, kinds).run(count))
    assert [(result, told) for result, told in results if result.startswith("different")] == []
    seen = collections.Counter(result.split(":")[0] for result, _ in results)
    assert seen["equal"] > count / 4
    assert seen["equal, changed"] > 0
    assert seen["refused"] > 0


def test_a_difference_is_a_tie_only_where_two_scores_nearly_agree(
    tiny_checkpoint: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, kind = tiny_checkpoint.directory, KINDS["blip-2, opt"]
    with side_file_kinds.recorded_scores() as steps:
        answers = side_file_kinds.theirs(directory, kind)
    first, second = steps[2][0].topk(2)[1].tolist()
    place = len(answers[0]) - side_file_kinds.NEW_TOKENS + 2
    assert answers[0][place] == first
    planted = [[*answers[0][:place], second, *answers[0][place + 1 :]], *answers[1:]]
    base = Base(kind, directory, directory, planted, state_of(directory))
    assert judge(base, directory, "").startswith("different: ")
    monkeypatch.setattr(side_file_kinds, "TIE", 1.1)  # more than the range of all scores
    assert judge(base, directory, "").startswith("tie: ")
    shorter = dataclasses.replace(base, answers=[answers[0][:-1], *answers[1:]])
    assert judge(shorter, directory, "").startswith("different: ")
    assert judge(dataclasses.replace(base, answers=answers), directory, "") == "equal"
