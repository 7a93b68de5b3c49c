"""``eval --shots``: the texts after examples equal those of transformers, from checkpoint and bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

import torch

from blip2edge.cli import main
from blip2edge.errors import DataError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.training.data.coco import read_captions
from blip2edge.training.data.entries import Entry
from blip2edge.training.evaluation.few_shots import Examples
from blip2edge.training.evaluation.models import CaptionModel, ModelOptions
from blip2edge.training.evaluation.open_model import open_captioner
from blip2edge.training.evaluation.pipeline import evaluate
from blip2edge.training.evaluation.validation import open_validation, validation_scores
from blip2edge.training.loop_config import ValidationConfig
from tests.drawing import draw_pictures
from tests.families.drawing_idefics import draw_idefics

if TYPE_CHECKING:
    from tests.drawing import Drawn

CAPTIONS = ("a red dog", "two cats", "what is two", "a photo of a dog", "red cats")
NEW_TOKENS = 5
OPTIONS = ModelOptions("cpu", 1, 3, {"max_new_tokens": NEW_TOKENS})


def captioned(folder: Path) -> Path:
    """COCO's file of a caption for each picture."""
    for number, picture in enumerate(draw_pictures(len(CAPTIONS), 2)):
        picture.save(folder / f"{number}.png")
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(len(CAPTIONS))]
    annotations = [{"id": number, "image_id": number, "caption": text} for number, text in enumerate(CAPTIONS)]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def asked(folder: Path) -> Path:
    """VQA's files: a question on each picture; two of three people give the same answer."""
    captioned(folder)
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(len(CAPTIONS))]
    questions = [{"question_id": number, "image_id": number, "question": "what is two"} for number in range(5)]
    answers = [
        {
            "question_id": number,
            "image_id": number,
            "answer_type": "other",
            "answers": [{"answer": "dog"}, {"answer": text}, {"answer": text}],
        }
        for number, text in enumerate(CAPTIONS)
    ]
    path = folder / "questions.json"
    path.write_text(json.dumps({"images": images, "questions": questions}))
    (folder / "answers.json").write_text(json.dumps({"annotations": answers}))
    return path


class Watched:
    """Records the prompts and the numbers of pictures that a captioner is given."""

    def __init__(self, captioner: Any) -> None:
        self.captioner, self.prompts = captioner, captioner.prompts
        self.given: list[tuple[list[Any], str]] = []

    def __call__(self, pictures: Sequence[Any], prompts: Sequence[str | None] | None = None) -> list[str]:
        self.given += zip(pictures, prompts or (), strict=True)  # type: ignore[arg-type]
        said: list[str] = self.captioner(pictures, prompts)
        return said

    def question(self, text: str) -> str:
        return str(self.captioner.question(text))


@torch.no_grad()
def expected(model: Any, processor: Any, pictures: Sequence[Any], prompt: str) -> str:
    """What transformers says to a prompt that is split at the markers of its pictures."""
    parts = prompt.split("{image}")
    row = [part for picture, text in zip(pictures, parts[1:], strict=True) for part in (picture, text)]
    inputs = processor(text=[[part for part in row if part != ""]], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    ids = ids.tolist()
    ids = ids[: ids.index(2)] if 2 in ids else ids
    said: str = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return said.strip()


def test_examples_are_seen_as_transformers_sees_them(tmp_path: Path) -> None:
    model, processor = draw_idefics(tmp_path / "checkpoint", 0)
    entries = list(read_captions(captioned(tmp_path), tmp_path, 0)[0])
    images = [entry.picture.open() for entry in entries]
    examples = Examples(entries, 2)
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle
    said = []
    for path in (tmp_path / "checkpoint", bundle):
        captioner = Watched(open_captioner(path, OPTIONS))
        examples.check(captioner, questions=False)
        said.append(examples.ask(captioner, entries, images, ["a photo of"] * len(entries)))
        for entry, (shown, prompt) in zip(entries, captioner.given, strict=True):
            assert len(shown) == 3
            texts = prompt.removeprefix("{image}").split("{image}")
            assert texts[-1] == "a photo of"
            drawn = [text.removeprefix("a photo of ").removesuffix("</s>") for text in texts[:-1]]
            assert set(drawn) < set(CAPTIONS) - {entry.text}
            assert len(set(drawn)) == 2
        wanted = [expected(model, processor, shown, prompt) for shown, prompt in captioner.given]
        assert said[-1] == wanted
    assert said[0] == said[1]
    assert len(set(said[0])) > 1
    plain = open_captioner(tmp_path / "checkpoint", OPTIONS)(images, ["a photo of"] * len(entries))
    assert plain != said[0]


def test_eval_and_validation_show_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_idefics(tmp_path / "checkpoint", 0)
    (tmp_path / "asked").mkdir()
    captions, questions = captioned(tmp_path), asked(tmp_path / "asked")
    command = ["eval", str(tmp_path / "checkpoint"), "--backend", "cpu", "--max-new-tokens", "5", "--json"]
    predictions = tmp_path / "said.json"
    found = []
    for shots in ("0", "2"):
        given = [*command, "--data", str(captions), "--shots", shots, "--predictions", str(predictions)]
        assert main(given) == 0
        found.append((json.loads(capsys.readouterr().out), json.loads(predictions.read_text())))
    assert found[0][1] != found[1][1]
    config = ValidationConfig(every=1, kind="coco-captions", path=str(captions), shots=2, max_new_tokens=5)
    data = open_validation(config, tmp_path)
    score, metric = validation_scores(data, open_captioner(tmp_path / "checkpoint", OPTIONS)), data.metric
    assert score()[metric] == pytest.approx(found[1][0][metric])
    asks = [*command, "--data", str(questions), "--annotations", str(tmp_path / "asked" / "answers.json")]
    assert main([*asks, "--shots", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == len(CAPTIONS)
    assert main([*asks, "--shots", "2", "--shots-from", str(captions)]) == 2
    assert "expected few-shot examples with questions, got captions" in capsys.readouterr().err
    # Captions of other data as examples: all its pictures may be shown.
    (tmp_path / "one").mkdir()
    one = tmp_path / "one" / "0.png"
    draw_pictures(1, 9)[0].save(one)
    one.with_suffix(".txt").write_text("a dog")
    given = [*command, "--data", str(one.parent), "--shots", "4"]
    assert main([*given, "--shots-from", str(captions)]) == 0
    assert main(given) == 1
    assert "expected more than 4 pictures" in capsys.readouterr().err


def test_the_answer_of_an_example_is_that_of_most_people(tmp_path: Path) -> None:
    draw_idefics(tmp_path / "checkpoint", 0)
    questions = asked(tmp_path)
    watched: list[Watched] = []

    def opened(path: Path, options: ModelOptions) -> CaptionModel:
        watched.append(Watched(open_captioner(path, options)))
        return watched[0]

    from blip2edge.training.data.coco import read_vqa

    entries = list(read_vqa(questions, tmp_path / "answers.json", tmp_path, 0)[0])
    captioner = opened(tmp_path / "checkpoint", OPTIONS)
    prompts = [captioner.question(entry.question) for entry in entries]
    Examples(entries, 1).ask(captioner, entries, [entry.picture.open() for entry in entries], prompts)
    for _, prompt in watched[0].given:
        first, _, last = prompt.removeprefix("{image}").partition("{image}")
        assert last == "Question: what is two Answer:"
        answer = first.removeprefix("Question: what is two Answer: ").removesuffix("</s>")
        assert answer in CAPTIONS


def test_a_broken_picture_is_no_example(tmp_path: Path) -> None:
    draw_idefics(tmp_path / "checkpoint", 0)
    entries: list[Entry] = list(read_captions(captioned(tmp_path), tmp_path, 0)[0])
    images = [entry.picture.open() for entry in entries]
    (tmp_path / "4.png").write_bytes(b"")
    captioner = Watched(open_captioner(tmp_path / "checkpoint", OPTIONS))
    Examples(entries, 3).ask(captioner, entries[:1], images[:1], [None])
    assert CAPTIONS[4] not in captioner.given[0][1]
    with pytest.raises(DataError, match="expected 4 readable pictures for the examples of sample 0, got 3"):
        Examples(entries, 4).ask(captioner, entries[:1], images[:1], [None])


def test_models_of_one_picture_are_refused_by_name(tiny_checkpoint: Drawn, tmp_path: Path) -> None:
    captions = captioned(tmp_path)
    given: dict[str, Any] = {"backend": "cpu", "max_new_tokens": 3}
    with pytest.raises(UsageError, match="reads one picture in a text, and cannot use few-shot examples"):
        evaluate(tiny_checkpoint.directory, data=captions, shots=2, **given)
    draw_idefics(tmp_path / "flamingo", 0)
    with pytest.raises(UsageError, match="shots does not work with generated scenes"):
        evaluate(tmp_path / "flamingo", count=2, shots=2, **given)
    with pytest.raises(UsageError, match="shots_from needs shots"):
        evaluate(tmp_path / "flamingo", data=captions, shots_from=captions, **given)
