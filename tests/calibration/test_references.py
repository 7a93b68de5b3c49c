"""References of ``calibrate --references``: which are left out, which flags need pictures, which captions are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="captions of the cpu backend")
pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

from blip2edge.cli import main
from blip2edge.training.data.entries import FilePicture
from blip2edge.training.evaluation.references import KnownText
from tests.confident import NEW, written_references


def test_references_that_are_left_out_are_named(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row whose picture is missing, a line that is not JSON, a text in Latin-1, and a picture that is damaged."""
    folder = written_references(tmp_path / "refs", tiny_bundle)
    flags = ["--max-new-tokens", str(NEW), "--threads", "1", "--no-optimize"]
    rows = [json.dumps({"image": f"{at:02d}.png", "text": "a dog"}) for at in range(24)]
    rows[3:3] = [json.dumps({"image": "gone.png", "text": "a dog"}), "{broken"]
    table = folder / "table.jsonl"
    table.write_text("\n".join(rows))
    assert main(["calibrate", str(tiny_bundle), "-o", str(tmp_path / "a"), "--references", str(table), *flags]) == 0
    said = capsys.readouterr()
    assert "on 24 pictures" in said.out
    assert "warning: 2 references are left out; the first is " in said.err
    (folder / "02.txt").write_bytes("un caf\xe9".encode("latin-1"))
    (folder / "03.png").write_bytes(b"no picture")
    table.unlink()
    assert main(["calibrate", str(tiny_bundle), "-o", str(tmp_path / "b"), "--references", str(folder), *flags]) == 0
    said = capsys.readouterr()
    assert "on 22 pictures" in said.out
    assert "warning: 1 reference is left out; the first is 02.png: its text cannot be read: " in said.err
    assert "expected UTF-8, got the byte 0xe9" in said.err
    assert "1 picture cannot be read; the first is 03.png: " in said.err
    for at in range(10):
        (folder / f"{at:02d}.txt").write_text(" \n")
    assert main(["calibrate", str(tiny_bundle), "-o", str(tmp_path / "c"), "--references", str(folder), *flags]) == 1
    assert "got 14; 10 references are left out; the first is 00.png: its text is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--weights", "int4"],
        ["--weights", "none"],
        ["--format", "decoder=int8"],
        ["--drop-limit", "0"],
        ["--method", "smooth"],
        ["--int8-activations", "decoder"],
        ["--count", "3"],
        ["--max-pixels", "1000000"],
    ],
)
def test_flags_of_the_quantisation_need_pictures(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", str(tmp_path), "-o", str(tmp_path / "out"), "--references", str(tmp_path), *flags]
    assert main(words) == 2
    assert f"{flags[0]} needs --images; give --images, or leave {flags[0]} out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "known", "right"),
    [
        ("a dog", "A dog!!", True),
        ("a dog", "A dog?!", True),
        ("a dog", "A (dog)...", True),
        ("a dog vs. a cat", "a dog vs a cat", True),
        ("a dog", "a dog's", False),
        ("a dog", "dog", False),
    ],
)
def test_a_right_caption_may_differ_in_case_and_punctuation(said: str, known: str, right: bool) -> None:
    assert KnownText("0", FilePicture(Path("0.png")), ("another", known)).is_right(said) == right
