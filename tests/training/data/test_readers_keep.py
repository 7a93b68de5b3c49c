"""Readers keep what they are given: ids, captions with odd separators, answers in every form, odd names and paths."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from blip2edge.training.data.coco import read_captions, read_vqa
from blip2edge.training.data.entries import BrokenSamples, Entry
from blip2edge.training.data.folder import read_folder
from blip2edge.training.data.shards import read_shard, shard_paths
from blip2edge.training.evaluation.scoring import _as_in_data


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, *files: tuple[str, bytes]) -> tuple[list[Entry], dict[str, str]]:
    """Writes a shard, and reads it: its entries, and its broken samples."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    broken = BrokenSamples("x", 9)
    return list(read_shard(path, broken)), broken.problems


def fields(**values: object) -> tuple[str, bytes]:
    return "0.json", json.dumps(values).encode()


@pytest.mark.parametrize("answers", [["yes", "no"], [{"answer": "yes", "answer_id": 1}, {"answer": "no"}]])
def test_answers_in_a_shard_as_in_a_file_of_vqa(tmp_path: Path, answers: list[object]) -> None:
    (entry,), problems = shard(tmp_path / "a.tar", ("0.png", png()), fields(question="red?", answers=answers))
    assert (entry.question, entry.answers, problems) == ("red?", ("yes", "no"), {})


def test_texts_of_a_shard_as_of_a_table(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image> red?"}, {"from": "gpt", "value": "no"}]
    for given, found in (
        ({"question": "red?", "answer": "no"}, ("", "red?", ("no",))),
        ({"conversations": turns}, ("", "red?", ("no",))),
        ({"TEXT": "a dog"}, ("a dog", "", ())),
        ({"captions": ["a dog"]}, ("a dog", "", ())),
    ):
        (entry,), _ = shard(tmp_path / "a.tar", ("0.png", png()), fields(**given))
        assert (entry.text, entry.question, entry.answers) == found
    (entry,), _ = shard(tmp_path / "a.tar", ("0.png", png()), ("0.txt", b"a cat"), fields(caption="a dog", url="x"))
    assert entry.text == "a cat"


@pytest.mark.parametrize(
    ("question", "answers", "told"),
    [
        (" ", ["yes"], "the question is empty"),
        ("red?", [], "the answers are empty"),
        ("red?", ["", " "], "the answers are empty"),
        ("red?", [5], "expected an answer to be a text, got 5"),
    ],
)
def test_blank_questions_and_answers_in_a_shard_are_broken(
    tmp_path: Path, question: str, answers: list[object], told: str
) -> None:
    entries, problems = shard(tmp_path / "a.tar", ("0.png", png()), fields(question=question, answers=answers))
    assert (entries, list(problems.values())) == ([], [told])


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c", "\x0b", "\t", " "])
def test_caption_with_an_odd_separator_is_one_caption(tmp_path: Path, separator: str) -> None:
    text = f"a dog{separator}runs"
    for file in (("0.txt", text.encode()), fields(caption=text), fields(caption="a dog\nruns")):
        entries, problems = shard(tmp_path / "a.tar", ("0.png", png()), file)
        assert ([entry.text for entry in entries], problems) == (["a dog runs"], {})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(png())
    (tmp_path / "folder" / "a.txt").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\ntwo cats\n".encode())
    entries, _ = read_folder(tmp_path / "folder", 0)
    assert [entry.text for entry in entries] == ["a dog runs", "two cats"]


def test_hidden_files_of_macos(tmp_path: Path) -> None:
    files = []
    for key in "01":
        files += [
            (f"a/._{key}.png", b"\0\5"),
            (f"a/{key}.png", png()),
            (f"a/._{key}.txt", b"\0\5"),
            (f"a/{key}.txt", b"a dog"),
        ]
    entries, problems = shard(tmp_path / "a.tar", *files)
    assert ([entry.sample_id for entry in entries], problems) == (["a.tar:a/0", "a.tar:a/1"], {})


@pytest.mark.parametrize("name", ["set[1]", "a*b", "what?", "part-{0..3}"])
def test_path_with_the_characters_of_a_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    tarfile.open(tmp_path / name / "a.tar", "w").close()
    assert shard_paths(tmp_path / name / "a.tar") == [tmp_path / name / "a.tar"]
    assert shard_paths(tmp_path / name) == [tmp_path / name / "a.tar"]


def coco(folder: Path, annotations: list[dict[str, object]]) -> Path:
    for name in "ab":
        (folder / f"{name}.png").write_bytes(png())
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate(("a", "b", "gone"), 1)]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_id_that_is_not_unique_is_no_identity(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": number, "image_id": image, "caption": f"{image} {number}"} for image in (1, 2) for number in range(3)
    ]
    entries, broken = read_captions(coco(tmp_path, [*rows, {"id": 2, "image_id": 3, "caption": "x"}]), tmp_path, 100)
    assert [entry.text for entry in entries] == [row["caption"] for row in rows]
    assert len({entry.sample_id for entry in entries}) == 6
    assert [entry.sample_id for entry in entries] == ["0", "1", "2", "0#2", "1#2", "2#2"]
    assert list(broken.problems) == ["2#3"]


def test_blank_questions_and_answers_of_vqa(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    questions = [
        {"question_id": 1, "image_id": 1, "question": " "},
        {"question_id": 2, "image_id": 1, "question": "x?"},
        {"question_id": 3, "image_id": 1, "question": "y?"},
    ]
    answers = [{"question_id": 1, "answers": ["yes"]}, {"question_id": 2, "answers": ["", " "]}]
    answers.append({"question_id": 3, "answers": [" two  cats ", ""]})
    path = tmp_path / "q_questions.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "questions": questions}))
    (tmp_path / "q_annotations.json").write_text(json.dumps({"annotations": answers}))
    (entry,), broken = read_vqa(path, None, tmp_path, 9)
    assert (entry.sample_id, entry.answers) == ("3", ("two cats",))
    assert set(broken.problems) == {"1", "2"}


@pytest.mark.parametrize(("given", "written"), [("0042", "0042"), ("201307251", "201307251"), (42, 42)])
def test_ids_of_predictions_are_those_of_the_data(tmp_path: Path, given: object, written: object) -> None:
    (tmp_path / "a.png").write_bytes(png())
    content = {
        "images": [{"id": given, "file_name": "a.png"}],
        "annotations": [{"image_id": given, "caption": "a dog"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    (entry,), _ = read_captions(tmp_path / "c.json", tmp_path, 0)
    assert _as_in_data(entry.image_id, entry) == written
