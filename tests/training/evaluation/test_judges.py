"""Models that judge captions: a CLIP's scores and a reader's answers equal those computed with transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

import torch

from blip2edge.cli import main
from blip2edge.errors import BundleSignatureError, DataError, PromptError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.training.data.coco import read_captions, read_vqa
from blip2edge.training.evaluation.models import EvaluatedModel, ModelOptions
from blip2edge.training.evaluation.open_model import open_model
from blip2edge.training.evaluation.pipeline import evaluate
from blip2edge.training.evaluation.reader import MAX_ANSWER_TOKENS, filled, open_reader
from blip2edge.training.evaluation.scoring import ScoringOptions, score_entries
from blip2edge.training.metrics.vqa import answer_accuracy
from tests.drawing import Variant, draw_pictures, draw_processor
from tests.families import drawing_blip, drawing_idefics, test_t5

if TYPE_CHECKING:
    from PIL import Image

    from tests.drawing import Drawn

OPTIONS = ModelOptions("cpu", 1, 2)
SAID = ["a photo of two cats", "Red dog", "what is the dog where it is"]
KNOWN = [["two cats", "a red dog is"], ["the dog"], ["how many cats", "what is it", "a photo"]]
TEMPLATE = "{caption} what is {question}"


class Saying:
    """Says known captions, in order."""

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str | None] | None = None) -> list[str]:
        return SAID[: len(pictures)]

    def question(self, text: str) -> str:
        return text


def captioned(folder: Path) -> Path:
    """COCO's file of the known captions, beside its pictures."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (picture, texts) in enumerate(zip(draw_pictures(3), KNOWN, strict=True)):
        picture.save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        annotations += [
            {"id": len(annotations) + at, "image_id": number, "caption": text} for at, text in enumerate(texts)
        ]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def asked(folder: Path, answers: Sequence[str]) -> Path:
    """VQA's files: two questions on the first picture, one on the second."""
    questions = [(0, "it ?"), (0, "two"), (1, "a photo")]
    for number, picture in enumerate(draw_pictures(2)):
        picture.save(folder / f"{number}.png")
    path = folder / "questions.json"
    content = [
        {"question_id": number, "image_id": image, "question": text} for number, (image, text) in enumerate(questions)
    ]
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(2)]
    path.write_text(json.dumps({"images": images, "questions": content}))
    given = [
        {"question_id": number, "image_id": image, "answer_type": "other", "answers": [{"answer": answer}]}
        for number, ((image, _), answer) in enumerate(zip(questions, answers, strict=True))
    ]
    (folder / "answers.json").write_text(json.dumps({"annotations": given}))
    return path


@torch.no_grad()
def of_transformers(model: Any, processor: Any) -> dict[str, float]:
    """CLIPScore and RefCLIPScore with transformers' CLIP, written out."""

    def vector(**given: Any) -> Any:
        found = model(**processor(return_tensors="pt", **({"text": "a", "images": draw_pictures(1)[0]} | given)))
        value = found.text_embeds if "text" in given else found.image_embeds
        return value[0] / value[0].norm()

    scores, with_references = [], []
    for picture, said, known in zip(draw_pictures(3), SAID, KNOWN, strict=True):
        caption = vector(text=f"A photo depicts {said}")
        score = 2.5 * max(float(vector(images=picture) @ caption), 0.0)
        near = max(0.0, *(float(vector(text=f"A photo depicts {text}") @ caption) for text in known))
        scores.append(score)
        with_references.append(2 * score * near / (score + near) if score + near else 0.0)
    return {"clip_score": sum(scores) / 3, "ref_clip_score": sum(with_references) / 3}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    directory = tmp_path_factory.mktemp("clip")
    return directory, of_transformers(*drawing_blip.save_clip(directory, 0))


def test_clip_scores_equal_transformers(clip: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    checkpoint, wanted = clip
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle").bundle
    entries, broken = read_captions(captioned(tmp_path), tmp_path, 0)
    assert wanted["clip_score"] > 0.01
    for path in (checkpoint, bundle):
        judge = open_model(path, OPTIONS).matcher
        figures = score_entries(EvaluatedModel(captioner=Saying()), list(entries), broken, ScoringOptions(clip=judge))
        assert {name: figures[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
        assert "cider_d" in figures
        only = ScoringOptions(metrics=("clip",), clip=judge)
        assert "cider_d" not in score_entries(EvaluatedModel(captioner=Saying()), list(entries), broken, only)


def test_long_captions_are_cut_before_their_end_token(clip: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    checkpoint, _ = clip
    matcher = Matcher.load(export_checkpoint(checkpoint, tmp_path / "bundle").bundle, threads=1)
    long = " ".join(["dog"] * 300)
    assert matcher.token_ids(long, cut=True) == [*matcher.token_ids(" ".join(["dog"] * 18))[:-1], drawing_blip.SEP]
    with pytest.raises(PromptError):
        matcher.embed_texts([long])
    judge = open_model(checkpoint, OPTIONS).matcher
    assert judge is not None
    assert judge.text_vectors([long]) == pytest.approx(matcher.embed_texts([long], cut=True), abs=1e-5)


def test_pictures_without_captions_have_a_clip_score_alone(
    clip: tuple[Path, dict[str, float]], tiny_checkpoint: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(draw_pictures(3)):
        picture.save(pictures / f"{number}.png")
    command = ["eval", str(tiny_checkpoint.directory), "--backend", "cpu", "--max-new-tokens", "4", "--json"]
    assert main([*command, "--data", str(pictures), "--clip", str(clip[0])]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == {"n", "clip_score", "broken", "broken_named"}
    assert figures["n"] == 3
    # The same pictures with captions, and generated scenes.
    scored = evaluate(
        tiny_checkpoint.directory, data=captioned(pictures), clip=clip[0], max_new_tokens=4, backend="cpu"
    )
    assert scored["clip_score"] == pytest.approx(figures["clip_score"])
    assert scored["ref_clip_score"] >= 0
    on_scenes = evaluate(tiny_checkpoint.directory, count=2, clip=clip[0], max_new_tokens=4, backend="cpu")
    assert {"clip_score", "ref_clip_score", "exact_match"} <= on_scenes.keys()
    assert main([*command, "--data", str(pictures / "0.png")]) == 1


@torch.no_grad()
def read_by(model: Any, tokenizer: Any, caption: str, question: str) -> str:
    """What transformers' language model answers."""
    text = TEMPLATE.replace("{caption}", caption).replace("{question}", question)
    ids = tokenizer(text, return_tensors="pt").input_ids
    row = model.generate(input_ids=ids, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)[0].tolist()
    row = row if model.config.is_encoder_decoder else row[ids.shape[1] :]
    said: str = tokenizer.decode(row, skip_special_tokens=True)
    return said.partition("\n")[0].strip()


PAIRS = [("a photo of", "two"), ("", "it is"), ("two", "a photo of what"), ("what is two", "what")]


def check_reader(path: Path, model: Any, tokenizer: Any) -> None:
    wanted = [read_by(model, tokenizer, *pair) for pair in PAIRS]
    assert len(set(wanted)) > 2
    reader = open_reader(path, OPTIONS, TEMPLATE)
    assert reader([caption for caption, _ in PAIRS], [question for _, question in PAIRS]) == wanted


def test_a_reader_answers_as_transformers_language_model(
    tiny_checkpoint: Drawn, tiny_bundle: Path, tmp_path: Path
) -> None:
    model, tokenizer = tiny_checkpoint.model.language_model, tiny_checkpoint.processor.tokenizer
    check_reader(tiny_bundle, model, tokenizer)
    check_reader(tiny_checkpoint.directory, model, tokenizer)
    model.save_pretrained(tmp_path)  # the language model alone
    tokenizer.save_pretrained(tmp_path)
    check_reader(tmp_path, model, tokenizer)


def test_a_reader_with_an_encoder(tmp_path: Path) -> None:
    model = test_t5.draw(0, tmp_path, **test_t5.KINDS[0])
    check_reader(tmp_path, model.language_model, draw_processor(Variant()).tokenizer)


def test_the_score_of_a_reader_on_questions(
    tiny_checkpoint: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner = open_model(tiny_checkpoint.directory, ModelOptions("cpu", generation={"max_new_tokens": 5})).captioner
    assert captioner is not None
    said = captioner(draw_pictures(2))
    model, tokenizer = tiny_checkpoint.model.language_model, tiny_checkpoint.processor.tokenizer
    known = [read_by(model, tokenizer, said[0], "it ?"), "no such answer", "no such answer"]
    path = asked(tmp_path, known)
    command = ["eval", str(tiny_checkpoint.directory), "--backend", "cpu", "--max-new-tokens", "5", "--json"]
    command += ["--data", str(path), "--annotations", str(tmp_path / "answers.json")]
    command += ["--reader", str(tiny_checkpoint.directory), "--reader-prompt", TEMPLATE]
    assert main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    blind = [read_by(model, tokenizer, "", question) for question in ("it ?", "two", "a photo")]
    assert figures["reader_accuracy"] == pytest.approx(1 / 3)
    assert figures["blind_accuracy"] == pytest.approx(
        sum(answer_accuracy(answer, [truth]) for answer, truth in zip(blind, known, strict=True)) / 3
    )
    assert figures["reader_answer_type"] == {"other": pytest.approx(1 / 3)}
    assert "vqa_accuracy" in figures
    assert main([*command, "--metrics", "reader"]) == 0
    assert "vqa_accuracy" not in json.loads(capsys.readouterr().out)


def test_what_cannot_judge_is_refused_by_name(
    clip: tuple[Path, dict[str, float]], tiny_checkpoint: Drawn, tiny_bundle: Path, tmp_path: Path
) -> None:
    captions = captioned(tmp_path)
    given: dict[str, Any] = {"backend": "cpu", "max_new_tokens": 3}
    for path in (tiny_bundle, tiny_checkpoint.directory):
        with pytest.raises(
            UsageError, match=rf"clip to be a model that compares .* but {path} is a captioner; give .*CLIP"
        ):
            evaluate(tiny_checkpoint.directory, data=captions, clip=path, **given)
    questions = asked(tmp_path, ["a", "b", "c"])
    of_clip = export_checkpoint(clip[0], tmp_path / "of-clip").bundle
    for path in (clip[0], of_clip):
        with pytest.raises(UsageError, match=rf"reader to have a language model, but {path} compares .* is for clip"):
            evaluate(
                tiny_checkpoint.directory, data=questions, annotations=tmp_path / "answers.json", reader=path, **given
            )
    with pytest.raises(UsageError, match="reader scores a captioner on questions"):
        evaluate(tiny_checkpoint.directory, data=captions, reader=tiny_checkpoint.directory, **given)
    with pytest.raises(UsageError, match="clip scores a captioner on captions of pictures"):
        evaluate(clip[0], data=captions, clip=clip[0], backend="cpu")
    with pytest.raises(UsageError, match="reader_prompt needs reader"):
        evaluate(tiny_checkpoint.directory, data=captions, reader_prompt=TEMPLATE, **given)
    with pytest.raises(UsageError, match=r"reader_prompt to contain \{question\}"):
        open_reader(tiny_bundle, OPTIONS, "{caption}")
    drawing_blip.save_blip(tmp_path / "blip", "caption", 0)
    drawing_idefics.draw_idefics(tmp_path / "idefics", 0)
    for path in (tmp_path / "blip", tmp_path / "idefics"):
        with pytest.raises(UsageError, match="attends to a picture in each layer"):
            open_reader(path, OPTIONS)
    with pytest.raises(UsageError, match="attends to a picture in each layer"):
        open_reader(export_checkpoint(tmp_path / "blip", tmp_path / "bundle").bundle, OPTIONS)
    with pytest.raises(PromptError, match="the reader's prompt has"):
        open_reader(tiny_bundle, OPTIONS, TEMPLATE)(["two " * 500], ["what"])


def test_a_required_signature_holds_for_the_judges_too(
    clip: tuple[Path, dict[str, float]], tiny_bundle: Path, tmp_path: Path
) -> None:
    """Only the scored model is signed; a judge without a signature does not run."""
    pytest.importorskip("model_signing", reason="pip install 'blip2edge[sign]'", exc_type=ImportError)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from blip2edge.bundle.trust.signing import sign_bundle

    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private, public = tmp_path / "own.pem", tmp_path / "own.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    signed = Path(shutil.copytree(tiny_bundle, tmp_path / "signed"))
    sign_bundle(signed, private)
    judge = export_checkpoint(clip[0], tmp_path / "judge").bundle
    given: dict[str, Any] = {"backend": "cpu", "max_new_tokens": 3, "require_signature": public}
    captions = captioned(tmp_path)
    with pytest.raises(BundleSignatureError):
        evaluate(signed, data=captions, clip=judge, **given)
    with pytest.raises(UsageError, match=r"require_signature works with bundles only, but .* is a checkpoint"):
        evaluate(signed, data=captions, clip=clip[0], **given)
    questions, answers = asked(tmp_path, ["a", "b", "c"]), tmp_path / "answers.json"
    with pytest.raises(BundleSignatureError):
        evaluate(signed, data=questions, annotations=answers, reader=tiny_bundle, **given)
    with pytest.raises(UsageError, match=r"require_signature works with bundles only, but .* is a checkpoint"):
        evaluate(signed, data=questions, annotations=answers, reader=clip[0], **given)
    sign_bundle(judge, private)
    assert "clip_score" in evaluate(signed, data=captions, clip=judge, **given)
    scored = evaluate(signed, data=questions, annotations=answers, reader=signed, reader_prompt=TEMPLATE, **given)
    assert "reader_accuracy" in scored


def test_a_wrong_prompt_of_the_reader_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    captions = captioned(tmp_path)
    with pytest.raises(UsageError, match="reader_prompt needs reader"):
        evaluate(tmp_path / "absent", data=captions, reader_prompt=TEMPLATE)
    with pytest.raises(UsageError, match=r"reader_prompt to contain \{question\}"):
        evaluate(tmp_path / "absent", data=captions, reader=tmp_path / "absent", reader_prompt="{caption}")


@pytest.mark.parametrize(
    ("name", "told"), [("clip", "--clip BUNDLE, .*CLIP"), ("reader", "--reader BUNDLE, .*questions")]
)
def test_a_metric_without_its_judge_is_refused_before_a_model_is_loaded(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(tmp_path / "absent"), "--data", str(tmp_path), "--metrics"]
    assert main([*words, name]) == 2
    assert re.search(
        rf"error: the metric {name} needs .*, and --{name} is not given; .*{told}", capsys.readouterr().err
    )
    assert main([*words, "captions", f"--{name}", str(tmp_path)]) == 2
    assert f"--{name} is given, but --metrics has no {name}" in capsys.readouterr().err


def test_pictures_without_captions_name_what_scores_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, picture in enumerate(draw_pictures(2)):
        picture.save(tmp_path / f"{number}.png")
    (tmp_path / "recipe.toml").write_text(f'[data]\nkind = "folder"\npath = "{tmp_path}"\n')
    for data in (tmp_path, tmp_path / "recipe.toml"):
        assert main(["eval", str(tmp_path / "absent"), "--data", str(data)]) == 1
        told = capsys.readouterr().err
        assert "2 of the 2 pictures have no captions to compare with" in told
        assert re.search("--clip BUNDLE, .*, or --reader BUNDLE, ", told)
    (tmp_path / "0.txt").write_text("a cat")
    assert main(["eval", str(tmp_path / "absent"), "--data", str(tmp_path)]) == 1
    assert "there is no directory" in capsys.readouterr().err


def test_braces_within_a_caption_are_not_filled() -> None:
    assert filled("{caption}: {question}", "a sign {question}", "what {caption}") == "a sign {question}: what {caption}"


def test_the_context_of_a_reader_has_room_for_an_answer(tiny_bundle: Path) -> None:
    reader = open_reader(tiny_bundle, OPTIONS, "{caption}{question}")
    generator = reader._generator
    room = generator.max_positions - MAX_ANSWER_TOKENS + 1  # the last token needs no slot
    texts = {len(generator.tokenizer.encode(text)): text for text in (" ".join(["two"] * n) for n in range(1, 600))}
    assert reader([texts[room]], [""])
    for length in (room + 1, generator.max_positions):
        with pytest.raises(PromptError, match=rf"prompt has {length} tokens and its answer up to {MAX_ANSWER_TOKENS}"):
            reader([texts[length]], [""])


def test_data_of_which_no_picture_opens_is_an_error(
    clip: tuple[Path, dict[str, float]], tiny_bundle: Path, tmp_path: Path
) -> None:
    captions, questions = captioned(tmp_path), asked(tmp_path, ["a", "b", "c"])
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    message = r"expected at least one picture that opens, got none; \d samples are broken: "
    judge = open_model(clip[0], OPTIONS).matcher
    saying, options = EvaluatedModel(captioner=Saying()), ScoringOptions(metrics=("clip",), clip=judge)
    entries, broken = read_captions(captions, tmp_path, 9)
    with pytest.raises(DataError, match=message):
        score_entries(saying, list(entries), broken, options)
    entries, broken = read_vqa(questions, tmp_path / "answers.json", tmp_path, 9)
    read = ScoringOptions(metrics=("reader",), reader=open_reader(tiny_bundle, OPTIONS))
    for wanted in (read, ScoringOptions()):
        with pytest.raises(DataError, match=message):
            score_entries(saying, list(entries), broken, wanted)


def test_pictures_without_captions_among_others_are_counted(
    clip: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    entries, broken = read_captions(captioned(tmp_path), tmp_path, 0)
    entries = [replace(entry, text="") if entry.image_id == "1" else entry for entry in entries]
    saying = EvaluatedModel(captioner=Saying())
    figures = score_entries(saying, entries, broken, ScoringOptions(clip=open_model(clip[0], OPTIONS).matcher))
    assert figures["without_captions"] == 1
    assert not figures.keys() & {"cider_d", "ref_clip_score"}
    with pytest.raises(UsageError, match="1 of the 3 pictures have no captions to compare with"):
        score_entries(saying, entries, broken, ScoringOptions())
