"""A bundle of the wrong kind: one sentence that says what it is, what was expected, and what to give."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

from blip2edge.cli import main
from blip2edge.export.pipeline import export_checkpoint
from tests.drawing import draw_pictures
from tests.families import drawing_blip

CASES = {
    "caption PICTURE -b CLIP": "CLIP compares pictures with texts and cannot caption them; use match or embed instead",
    "ask PICTURE what -b CLIP": "CLIP compares pictures with texts and cannot caption them; use match or embed instead",
    "watch FOLDER -b CLIP --once": "CLIP compares pictures with texts and cannot caption them; use match or embed",
    "bulk FOLDER -b CLIP -o out": "CLIP compares pictures with texts and cannot caption them; use match or embed",
    "bench CLIP --draft itg": "CLIP compares pictures with texts and cannot caption them; use match or embed instead",
    "calibrate CLIP -o out --references CAPTIONS": "CLIP compares pictures with texts and cannot caption them",
    "triton CLIP -o out": "CLIP compares pictures with texts and cannot caption them; use serve",
    "plan CLIP": "CLIP compares pictures with texts, and `plan` supports captioning models only; measure it",
    "explain PICTURE -b CLIP -o out": "CLIP (clip) has no queries that attend to patches: it compares the class token",
    "match PICTURE --text a -b CAPTIONER": "CAPTIONER captions pictures and cannot compare them with texts",
    "embed PICTURE -b CAPTIONER": "CAPTIONER captions pictures and cannot compare them with texts",
    "match PICTURE --text a -b VQA": "VQA answers questions on pictures and cannot compare them with texts; use ask",
    "caption PICTURE -b CAPTIONER --draft itg": "--draft itg: the bundle has no draft model; use --draft auto or none",
    "eval CAPTIONER --data CAPTIONS --clip CAPTIONER": "expected --clip to be a model that compares pictures with "
    "texts, but CAPTIONER is a captioner; give a bundle or checkpoint of",
    "eval CAPTIONER --data QUESTIONS --annotations ANSWERS --reader CLIP": "expected --reader to have a language "
    "model, but CLIP compares pictures with texts; give --reader a language model",
    "eval VQA --data CAPTIONS": "expected a model that captions pictures without a question, but VQA answers questions "
    "on pictures; give a captioner, data with questions, or a question for all pictures with --prompt",
    "capfilt CAPTIONS --captioner CLIP --matcher CLIP -o out": "expected --captioner to be a captioner, but CLIP "
    "compares pictures with texts and cannot caption them; give a captioner",
    "capfilt CAPTIONS --captioner CAPTIONER --matcher CAPTIONER -o out": "expected --matcher to have a matching head "
    "(ITM), but CAPTIONER is a captioner: it has no matching head; give the output of stage 1",
    "capfilt CAPTIONS --captioner CAPTIONER --matcher CLIP -o out": "expected --matcher to have a matching head (ITM), "
    "but CLIP compares vectors only: it has no matching head; give the output of stage 1",
    "capfilt CAPTIONS --captioner VQA --matcher CLIP -o out": "expected a model that captions pictures without a "
    "question, but VQA answers questions",
}


@pytest.fixture(scope="module")
def places(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    drawing_blip.save_clip(root / "clip", 0, eos=drawing_blip.SEP)
    drawing_blip.save_blip(root / "vqa", "vqa", 0)
    (root / "folder").mkdir()
    picture = root / "folder" / "a.png"
    draw_pictures(1)[0].save(picture)
    images = [{"id": 1, "file_name": str(picture)}]
    question = {"question_id": 1, "image_id": 1, "question": "what"}
    contents = {
        "captions": {"images": images, "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]},
        "questions": {"images": images, "questions": [question]},
        "answers": {"annotations": [{**question, "answers": [{"answer": "red"}]}]},
    }
    for name, content in contents.items():
        (root / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return {
        "CLIP": export_checkpoint(root / "clip", root / "clip-bundle", verify="sample").bundle,
        "VQA": export_checkpoint(root / "vqa", root / "vqa-bundle", verify="sample").bundle,
        "CAPTIONER": tiny_bundle,
        "FOLDER": root / "folder",
        "PICTURE": picture,
        **{name.upper(): root / f"{name}.json" for name in contents},
    }


@pytest.mark.parametrize("command", CASES)
def test_a_bundle_of_the_wrong_kind(
    command: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = CASES[command]
    for name, path in places.items():
        command, wanted = command.replace(name, str(path)), wanted.replace(name, str(path))
    assert main(shlex.split(command)) in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {wanted}")
    assert not (tmp_path / "out").exists()
