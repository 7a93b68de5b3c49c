"""The eval command, on scenes and files, for checkpoints and bundles; and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from blip2edge.cli import main
from blip2edge.errors import DataError, UsageError
from blip2edge.training.data.entries import BrokenSamples, Entry, FilePicture
from blip2edge.training.data.scenes import COLOURS, SHAPES, scenes
from blip2edge.training.evaluation.models import EvaluatedModel, Vectors
from blip2edge.training.evaluation.scoring import ScoringOptions, score_entries, score_scenes
from blip2edge.training.metrics.captions import caption_scores

if TYPE_CHECKING:
    from tests.drawing import Drawn

SEED = 1000


class Knowing:
    """Knows the captions of the held-out scenes, by their pixels; answers questions by them."""

    def __init__(self, count: int) -> None:
        self.captions = {scene.picture.tobytes(): scene.caption for scene in scenes(count, split="heldout", seed=SEED)}

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str | None] | None = None) -> list[str]:
        known = [self.captions[picture.tobytes()] for picture in pictures]
        if prompts is None or prompts[0] is None:
            return known
        return [
            "yes" if " ".join((prompt or "").split()[3:5]) in caption else "no, it is not"
            for prompt, caption in zip(prompts, known, strict=True)
        ]

    def question(self, text: str) -> str:
        return text


class Seeing:
    """Compares by words: a vector is a bag of them, the head wants the very caption."""

    has_head = True
    words = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

    def __init__(self, count: int) -> None:
        self.known = Knowing(count)

    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        bags = np.array([[float(word in text) for word in self.words] for text in texts], np.float32)
        bags += 1e-6
        return bags / np.linalg.norm(bags, axis=1, keepdims=True)

    def image_vectors(self, pictures: Sequence[Image.Image]) -> Vectors:
        return self.text_vectors(self.known(pictures))

    def probabilities(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]], *, logits: bool = False
    ) -> list[list[float]]:
        captions = self.known(pictures)
        most = 20.0 if logits else 1.0
        return [[most * (text == caption) for text in own] for own, caption in zip(texts, captions, strict=True)]


def test_one_who_knows_the_scenes() -> None:
    figures = score_scenes(EvaluatedModel(captioner=Knowing(60)), 60, "heldout", ScoringOptions())
    assert figures["exact_match"] == figures["chair_recall"] == 1.0
    assert figures["bleu_4"] == pytest.approx(figures["rouge_l"]) == pytest.approx(1.0)
    assert figures["cider_d"] == pytest.approx(10.0)
    assert figures["chair_i"] == figures["chair_s"] == 0.0
    assert figures["pope"]["by"] == "captions"
    assert figures["pope"]["adversarial"]["f1"] == 1.0
    asked = score_scenes(
        EvaluatedModel(captioner=Knowing(60)), 60, "heldout", ScoringOptions(metrics=("pope",), ask=True)
    )
    assert asked["pope"]["by"] == "questions"
    assert asked["pope"]["random"]["accuracy"] == 1.0
    assert "exact_match" not in asked


def test_one_who_sees_things_and_no_relation() -> None:
    without = score_scenes(EvaluatedModel(matcher=Seeing(80)), 80, "heldout", ScoringOptions(top=0))
    figures = score_scenes(EvaluatedModel(matcher=Seeing(80)), 80, "heldout", ScoringOptions(top=10))
    assert without["text_r1"] < figures["text_r1"] == 1.0  # the head tells scenes of the same things apart
    assert without["text_r10"] == figures["text_r10"] == 1.0
    assert figures["reranked"] == 10
    assert figures["pope"]["by"] == "matching"
    assert figures["pope"]["adversarial"]["accuracy"] == 1.0


def test_lavis_ranks_128_candidates_by_logit_and_cosine() -> None:
    figures = score_scenes(EvaluatedModel(matcher=Seeing(80)), 80, "heldout", ScoringOptions(ranking="lavis"))
    assert (figures["ranking"], figures["reranked"]) == ("lavis", 128)
    assert figures["text_r1"] == figures["image_r1"] == 1.0


def test_metrics_that_cannot_be_had() -> None:
    with pytest.raises(UsageError, match="the metric vqa cannot be computed"):
        score_scenes(EvaluatedModel(captioner=Knowing(2)), 2, "heldout", ScoringOptions(metrics=("vqa",)))
    with pytest.raises(UsageError, match="at least 2 pictures"):
        score_scenes(EvaluatedModel(captioner=Knowing(2)), 1, "heldout", ScoringOptions())
    entry = Entry("1", "1", FilePicture(Path("none.png")), question="What?", answers=("a",))
    with pytest.raises(UsageError, match="the data set has questions"):
        score_entries(EvaluatedModel(matcher=Seeing(2)), [entry], BrokenSamples("data", 0), ScoringOptions())
    with pytest.raises(DataError, match="data: expected at least one sample to score, got none; the data set is empty"):
        score_entries(EvaluatedModel(captioner=Knowing(2)), [], BrokenSamples("data", 0), ScoringOptions())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four scenes with two captions each, one picture broken, and questions about them."""
    shown = list(scenes(4, split="heldout", seed=SEED))
    for number, scene in enumerate(shown):
        scene.picture.save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"")
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(4)]
    captions = [
        {"id": 10 * copy + number, "image_id": number, "caption": f"{scene.caption}{' !' * copy}"}
        for copy in range(2)
        for number, scene in enumerate(shown)
    ]
    write(tmp_path / "captions.json", {"images": images, "annotations": captions})
    questions = [{"question_id": number, "image_id": number, "question": "How many?"} for number in range(4)]
    answers = [{"question_id": number, "answer_type": "number", "answers": ["two"] * 10} for number in range(4)]
    write(tmp_path / "questions.json", {"images": images, "questions": questions})
    write(tmp_path / "annotations.json", {"annotations": answers})
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    def run(model: Path, *flags: str) -> dict[str, Any]:
        assert main(["eval", str(model), "--threads", "1", "--json", *flags]) == 0
        figures: dict[str, Any] = json.loads(capsys.readouterr().out)
        return figures

    return run


def test_captions_of_a_file(
    ask: Ask, data: Path, tiny_checkpoint: Drawn, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = data / "said.json"
    flags = ["--data", str(data / "captions.json"), "--max-new-tokens", "6"]
    figures = ask(tiny_checkpoint.directory, *flags, "--predictions", str(predictions))
    assert figures["n"] == 3
    assert figures["broken"] == 1
    assert "the file is empty" in figures["broken_named"]["3"]
    said = json.loads(predictions.read_text())
    assert [row["image_id"] for row in said] == [0, 1, 2]
    references = [
        [f"{scene.caption}{' !' * copy}" for copy in range(2)] for scene in scenes(3, split="heldout", seed=SEED)
    ]
    expected = caption_scores([row["caption"] for row in said], references)
    assert {name: figures[name] for name in expected} == expected
    assert ask(tiny_bundle, *flags) == figures  # the same figures, torch or runtime
    full = ["eval", str(tiny_bundle), "--threads", "1", "--json", *flags, "--predictions", "/dev/full"]
    assert main(full) == 1
    output = capsys.readouterr()
    assert json.loads(output.out) == figures
    assert "the disk is full" in output.err
    assert ask(tiny_bundle, *flags, "--num-beams", "3", "--count", "2")["n"] == 2


def test_answers_of_a_file(ask: Ask, data: Path, tiny_checkpoint: Drawn) -> None:
    flags = ["--data", str(data / "questions.json"), "--max-new-tokens", "3"]
    figures = ask(tiny_checkpoint.directory, *flags)
    assert figures["vqa_accuracy"] == 0.0
    assert figures["answer_type"] == {"number": 0.0}
    assert figures["n"] == 3


def test_retrieval_on_a_file(ask: Ask, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
    from tests.families.drawing_blip import save_blip2

    save_blip2(tmp_path / "matcher", 0)
    figures = ask(tmp_path / "matcher", "--data", str(data / "captions.json"), "--top", "2")
    assert (figures["n"], figures["texts"], figures["reranked"]) == (3, 6, 2)
    assert 0.0 <= figures["image_r1"] <= figures["image_r5"] == 1.0


def test_what_is_printed_for_people(data: Path, tiny_checkpoint: Drawn, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_checkpoint.directory)
    assert main(["eval", model, "--data", str(data / "captions.json"), "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "bleu_4" in printed
    assert "broken: 3: " in printed
    assert main(["eval", model, "--count", "3", "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr().out
    assert "exact_match     0.0000" in printed
    assert "pope captions" in printed
    assert "wrong: " in printed


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--data", "nowhere.xyz"], 1, "there is no file or folder nowhere.xyz"),
        (["--data", __file__], 1, "expected COCO's JSON"),
        (["--data", "nowhere.json"], 1, "nowhere.json cannot be read"),
        (["--count", "1"], 2, "at least 2 pictures"),
        (["--metrics", "vqa"], 2, "cannot be computed"),
        (["--queries", "2"], 2, "does not take --queries"),
        (["--backend", "openvino"], 2, "auto, cpu or cuda for a checkpoint"),
        (["--count", "2", "--predictions", "said.json"], 2, "--predictions"),
        (["--data", "recipe.toml"], 1, "unknown key 'data.pathh'; did you mean 'path'?"),
    ],
)
def test_wrong_usage_is_told_in_one_line(
    flags: list[str],
    status: int,
    message: str,
    tiny_checkpoint: Drawn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text('[data]\nkind = "folder"\npathh = "x"\n')
    assert main(["eval", str(tiny_checkpoint.directory), "--max-new-tokens", "2", *flags]) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_recipe_says_where_the_data_is(ask: Ask, data: Path, tiny_checkpoint: Drawn, tmp_path: Path) -> None:
    (data / "0.txt").write_text("a caption")
    recipe = data / "recipe.toml"
    recipe.write_text('seed = 3\n[data]\nkind = "folder"\npath = "."\nmax_broken = 3\n')
    assert ask(tiny_checkpoint.directory, "--data", str(recipe), "--max-new-tokens", "2")["n"] == 1


def test_scoring_a_bundle_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt'): sys.modules[name] = None\n"
        "import blip2edge.training.evaluation.scoring, blip2edge.training.data.detect\n"
        "import blip2edge.training.capfilt.pipeline\n"
        "import blip2edge.cli.eval, blip2edge.cli.capfilt\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
