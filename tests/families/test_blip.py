"""BLIP captioning and VQA: exported models generate the same as transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2edge import Captioner, Matcher
from blip2edge.cli import main
from blip2edge.errors import BundleError, CheckpointError, UnsupportedModelError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from tests.drawing import draw_pictures
from tests.families import drawing_blip as drawing

PROMPTS: dict[str, list[str | None]] = {
    "caption": [None, "a photo of", "Two red cats"],
    "vqa": ["what is it?", "how many cats", "where is the red dog in the photo ?"],
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.5, "min_new_tokens": 4},
    {"num_beams": 3},
    {"num_beams": 3, "length_penalty": -1.0, "repetition_penalty": 1.3},
    {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 0.4, "forced_bos_token_id": 20, "min_length": 7},
    {"num_beams": 2, "no_repeat_ngram_size": 1, "begin_suppress_tokens": [20], "forced_bos_token_id": 21},
)
VARIANTS: dict[int, dict[str, Any]] = {
    0: {"num_hidden_layers": 2},
    1: {"hidden_act": "relu"},
    2: {"num_attention_heads": 2},
}


@dataclass(frozen=True)
class Exported:
    """A drawn checkpoint, its processor and its bundle."""

    model: Any
    processor: Any
    bundle: Path
    graphs: list[str]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Exported]:
    """Draws and exports a kind and seed, once."""

    @cache
    def export(kind: str, seed: int) -> Exported:
        directory = tmp_path_factory.mktemp(f"{kind}-{seed}")
        model, processor = drawing.save_blip(directory / "checkpoint", kind, seed, **VARIANTS[seed])
        verify = "sample" if (kind, seed) == ("caption", 1) else "full"
        report = export_checkpoint(directory / "checkpoint", directory / "bundle", verify=verify)
        return Exported(model, processor, report.bundle, [graph.name for graph in report.graphs])

    return export


def expected(model: Any, processor: Any, kind: str, image: Any, prompt: str | None, **options: Any) -> list[int]:
    """What transformers generates for one picture; behind the prompt where it repeats that."""
    text = {} if prompt is None else {"text": prompt}
    inputs = processor(images=image, return_tensors="pt", **text)
    ids = model.generate(**inputs, max_new_tokens=9, **options)[0].tolist()
    if kind == "vqa":
        return ids
    return ids[1 if prompt is None else inputs["input_ids"].shape[1] - 1 :]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_texts_equal_transformers(kind: str, seed: int, exported: Callable[[str, int], Exported]) -> None:
    drawn = exported(kind, seed)
    encoder = ["text_encoder"] if kind == "vqa" else []
    assert drawn.graphs == ["vision_encoder", *encoder, "cross_kv", "decoder"]
    captioner = Captioner.load(drawn.bundle, threads=1)
    pictures, prompts = draw_pictures(3, seed), PROMPTS[kind]
    seen = set()
    for options in OPTIONS:
        together = captioner.caption_many(pictures, prompts=prompts, batch_size=3, max_new_tokens=9, **options)
        for picture, prompt, result in zip(pictures, prompts, together, strict=True):
            ids = expected(drawn.model, drawn.processor, kind, picture, prompt, **options)
            assert list(result.tokens) == ids, (options, prompt)
            if kind == "caption":
                alone = captioner.caption(picture, prompt=prompt, max_new_tokens=9, **options)
            else:
                alone = captioner.ask(picture, str(prompt), max_new_tokens=9, **options)
            assert alone.tokens == result.tokens
            seen.add(result.tokens)
    assert len(seen) > 3  # the texts depend on picture, prompt and options


@pytest.fixture(scope="module")
def captioning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioning checkpoint."""
    directory: Path = tmp_path_factory.mktemp("blip") / "checkpoint"
    drawing.save_blip(directory, "caption", 3)
    return directory


@pytest.fixture(scope="module")
def half(captioning: Path) -> Path:
    """Its bundle in fp16."""
    output = captioning.parent / "half"
    export_checkpoint(captioning, output, precision="fp16")
    return output


def test_half_precision_stays_near(captioning: Path, half: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model = BlipForConditionalGeneration.from_pretrained(captioning)
    processor = BlipProcessor.from_pretrained(captioning, backend="pil")
    captioner = Captioner.load(half, threads=1)
    picture = draw_pictures(1, 3)[0]
    wanted = expected(model, processor, "caption", picture, "a photo of")
    assert list(captioner.caption(picture, prompt="a photo of", max_new_tokens=9).tokens)[:4] == wanted[:4]


def test_a_captioner_answers_no_questions(half: Path) -> None:
    captioner = Captioner.load(half, threads=1)
    with pytest.raises(UsageError, match="cannot answer questions; caption the picture instead"):
        captioner.ask(draw_pictures(1)[0], "what is it?")
    with pytest.raises(BundleError, match="cannot compare them with texts; use caption"):
        Matcher.load(half)


def test_questions_are_needed(
    exported: Callable[[str, int], Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(exported("vqa", 1).bundle)
    picture = tmp_path / "picture.png"
    draw_pictures(1)[0].save(picture)
    assert main(["caption", str(picture), "-b", bundle]) == 2
    assert "answers questions, but no question was given; use ask" in capsys.readouterr().err
    assert main(["match", str(picture), "--text", "a", "-b", bundle]) == 1
    assert "use ask" in capsys.readouterr().err
    ask = ["ask", str(picture), "what is it?", "-b", bundle, "--json"]
    assert main([*ask, "--max-new-tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"][0] == drawing.BOS


def test_a_checkpoint_is_written_as_it_was_read(captioning: Path, tmp_path: Path) -> None:
    from transformers import BlipForConditionalGeneration

    save_checkpoint(load_checkpoint(captioning), tmp_path / "copy", like=captioning)
    ours = BlipForConditionalGeneration.from_pretrained(tmp_path / "copy").state_dict()
    theirs = BlipForConditionalGeneration.from_pretrained(captioning).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def change_config(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another ``config.json``."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    values = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        values[key] = value | values[key] | value if isinstance(value, dict) else value
    (target / "config.json").write_text(json.dumps(values))
    return target


def test_an_architecture_outside_the_table(captioning: Path, tmp_path: Path) -> None:
    broken = change_config(captioning, tmp_path / "broken", architectures=["BlipModel"])
    with pytest.raises(UnsupportedModelError, match=r"class BlipModel.*BlipForConditionalGeneration"):
        export_checkpoint(broken, tmp_path / "bundle")


def test_another_class_than_the_weights(captioning: Path, tmp_path: Path) -> None:
    broken = change_config(captioning, tmp_path / "broken", architectures=["BlipForImageTextRetrieval"])
    with pytest.raises(CheckpointError, match=r"lacks itm_head\.bias"):
        export_checkpoint(broken, tmp_path / "bundle")
