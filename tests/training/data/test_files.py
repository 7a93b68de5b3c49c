"""Data files, correct and broken ones."""

from __future__ import annotations

import json
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from blip2edge.errors import ConfigError, DataError, ImageError
from blip2edge.training.data.coco import read_captions, read_vqa
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.detect import detect_data
from blip2edge.training.data.entries import BrokenSamples
from blip2edge.training.data.folder import read_folder
from blip2edge.training.data.shard_source import ShardSource
from blip2edge.training.data.shards import ShardPicture, ShardWriter, read_shards, shard_names, shard_paths


def change(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_captions_as_coco_writes_them(captions: Path) -> None:
    entries, broken = read_captions(captions, captions.parent / "pictures", 0)
    assert len(entries) == 20
    assert not broken.problems
    assert entries[3].text == "caption 3 a"
    assert (entries[3].sample_id, entries[3].image_id) == ("3", "3")


def test_pictures_are_found_where_coco_puts_them(captions: Path, pictures: Path) -> None:
    annotations = captions.parent / "annotations" / "captions_val2014.json"
    annotations.parent.mkdir()
    captions.rename(annotations)
    pictures.rename(captions.parent / "val2014")
    assert len(read_captions(annotations, None, 0)[0]) == 20


def test_a_caption_file_that_does_not_parse_names_the_line(captions: Path) -> None:
    lines = captions.read_text().splitlines()
    lines[6] = lines[6].replace(":", "=")
    captions.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"captions\.json, line 7, column \d+: expected JSON"):
        read_captions(captions, None, 0)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        read_captions(tmp_path / "none.json", None, 0)
    (tmp_path / "bytes.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(DataError, match="UTF-8"):
        read_captions(tmp_path / "bytes.json", None, 0)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match=r"expected a JSON object in .*, got a value of type list"):
        read_captions(tmp_path / "list.json", None, 0)


def test_a_field_that_is_missing_or_of_another_type_is_told_by_its_number(captions: Path) -> None:
    change(captions, lambda content: content["annotations"][4].pop("caption"))
    with pytest.raises(DataError, match=r"annotations\[4\] has no field 'caption', only id, image_id"):
        read_captions(captions, None, 0)
    change(captions, lambda content: content["annotations"][4].update(caption=7))
    with pytest.raises(DataError, match=r"annotations\[4\]\.caption must be a text, not 7"):
        read_captions(captions, None, 0)
    change(captions, lambda content: content.update(annotations={}))
    with pytest.raises(DataError, match="expected a list 'annotations'"):
        read_captions(captions, None, 0)


def test_missing_pictures_are_counted_and_three_named(captions: Path, pictures: Path) -> None:
    for number in (2, 4, 6, 8):
        (pictures / f"{number}.png").unlink()
    with pytest.raises(DataError, match="8 of the 20 samples have no picture; 4 files are missing") as raised:
        read_captions(captions, pictures, 7)
    message = str(raised.value)
    assert all(f"{number}.png" in message for number in (2, 4, 6))
    assert "8.png" not in message
    entries, broken = read_captions(captions, pictures, 8)
    assert len(entries) == 12
    assert len(broken.problems) == 8
    for path in pictures.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"at least one sample with its picture, got none; 20 samples are broken"):
        read_captions(captions, pictures, 100)


def test_a_caption_of_a_picture_that_is_not_listed(captions: Path) -> None:
    change(captions, lambda content: content["annotations"][0].update(image_id=99))
    entries, broken = read_captions(captions, captions.parent / "pictures", 1)
    assert len(entries) == 19
    assert "99 is not in the list" in broken.named()


def test_questions_with_their_answers(questions: Path) -> None:
    entries, broken = read_vqa(questions, None, questions.parent / "pictures", 0)
    assert len(entries) == 10
    assert entries[2].question == "How many of 2?"
    assert entries[2].answers == ("two",) * 7 + ("three",) * 3
    assert entries[2].kinds == {"answer_type": "number", "question_type": "how many"}
    assert not broken.problems


def test_answers_that_are_not_there(questions: Path) -> None:
    answers = questions.with_name("v2_tiny_val2014_annotations.json")
    change(answers, lambda content: content["annotations"].pop(3))
    assert len(read_vqa(questions, None, questions.parent / "pictures", 1)[0]) == 9
    renamed = answers.rename(answers.with_name("elsewhere.json"))
    with pytest.raises(
        DataError,
        match=r"the answers to these questions was not found: there is no .*v2_tiny_val2014_annotations\.json",
    ):
        read_vqa(questions, None, None, 0)
    assert len(read_vqa(questions, renamed, questions.parent / "pictures", 1)[0]) == 9
    with pytest.raises(DataError, match="the file name does not contain 'questions'"):
        read_vqa(questions.rename(questions.with_name("asked.json")), None, None, 0)


def test_vqa_names_its_pictures_by_number(questions: Path, pictures: Path) -> None:
    change(questions, lambda content: content.pop("images"))
    for number in range(10):
        (pictures / f"{number}.png").rename(pictures / f"COCO_val2014_{number:012d}.jpg")
    assert len(read_vqa(questions, None, pictures, 0)[0]) == 10


def test_a_folder_with_texts(folder: Path) -> None:
    entries, broken = read_folder(folder, 0)
    assert [entry.text for entry in entries[:3]] == ["caption 0", "another", "caption 1"]
    assert [entry.sample_id for entry in entries[:3]] == ["0.png", "0.png#1", "1.png"]
    assert entries[0].image_id == entries[1].image_id
    assert not broken.problems


def test_a_folder_where_something_is_missing(folder: Path) -> None:
    (folder / "1.txt").unlink()
    (folder / "2.png").unlink()
    (folder / "3.txt").write_bytes(b"\xff")
    (folder / "4.txt").write_text("  \n")
    entries, broken = read_folder(folder, 4)
    assert len(entries) == 7
    assert list(broken.problems) == ["1.png", "3.png", "4.png", "2.txt"]
    with pytest.raises(DataError, match="4 samples are broken, and max_broken allows 3"):
        read_folder(folder, 3)


def test_folders_without_anything(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_folder(tmp_path / "nowhere", 0)
    with pytest.raises(DataError, match="got 0 pictures"):
        read_folder(tmp_path, 0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("a dog".encode("utf-16"), r"expected UTF-8, got the byte 0xff at position 0"), (b" \n", "its text is empty")],
)
def test_texts_that_are_empty_or_not_utf8_are_not_called_missing(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"a picture")
    (tmp_path / "0.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"1 sample is broken: 0\.png \(.*{problem}"):
        read_folder(tmp_path, 1)


def test_shards_by_directory_pattern_and_range(shards: Path) -> None:
    names = ["000000.tar", "000001.tar", "000002.tar"]
    for pattern in (shards, shards / "*.tar", shards / "{000000..000002}.tar"):
        assert [path.name for path in shard_paths(pattern)] == names
    assert len(shard_paths(shards / "000001.tar")) == 1
    with pytest.raises(DataError, match="got none"):
        shard_paths(shards / "x*.tar")
    with pytest.raises(DataError, match=r"1 of 4 are missing: .*000003\.tar"):
        shard_paths(str(shards / "{000000..000003}.tar"))
    with pytest.raises(DataError, match=r"to the larger one, got \{000002\.\.000000\}; write \{000000\.\.000002\}"):
        shard_paths(str(shards / "{000002..000000}.tar"))
    (shards / "a.tar.gz").write_bytes(b"")
    assert [path.name for path in shard_paths(shards)] == [*names, "a.tar.gz"]
    (shards / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected \.tar or .*, got a\.zip"):
        shard_paths(shards / "a.zip")


def test_shards_hold_what_was_written(shards: Path, pictures: Path) -> None:
    broken = BrokenSamples("shards", 0)
    entries = list(read_shards(shard_paths(shards), broken))
    assert [entry.text for entry in entries] == [f"caption {number}" for number in range(10)]
    assert entries[5].sample_id == "000001.tar:0005"
    assert entries[5].image_id == "p5"
    assert entries[5].picture.read() == (pictures / "5.png").read_bytes()
    assert entries[5].picture.suffix == ".png"


def test_shards_of_one_name_keep_their_samples_apart(shards: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "parts" / folder).mkdir(parents=True)
        shutil.copyfile(shards / "000000.tar", tmp_path / "parts" / folder / "0.tar")
    paths = shard_paths(tmp_path / "parts" / "*" / "0.tar")
    assert shard_names(paths) == ["a/0.tar", "b/0.tar"]
    ids = [entry.sample_id for entry in read_shards(paths, BrokenSamples("shards", 0))]
    assert len(set(ids)) == len(ids) == 8
    source = ShardSource(paths, DataConfig(kind="shards", path=str(tmp_path)), seed=0)
    assert {sample.sample_id for sample in islice(source, 8)} == set(ids)
    assert source.state_dict()["shards"] == ["a/0.tar", "b/0.tar"]


def test_the_same_samples_make_the_same_bytes(shards: Path, pictures: Path, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "again", 4)
    for number in range(10):
        content = (pictures / f"{number}.png").read_bytes()
        writer.add(f"{number:04d}", content, ".png", [f"caption {number}"], {"image_id": f"p{number}"})
    writer.close()
    assert [path.read_bytes() for path in writer.paths] == [path.read_bytes() for path in shard_paths(shards)]


def add(tar: tarfile.TarFile, source: Path, name: str) -> None:
    tar.add(source, arcname=name)


def test_samples_of_other_makers(pictures: Path, tmp_path: Path) -> None:
    """Folders in names, captions and questions in JSON, samples that lack a part."""
    (tmp_path / "question.json").write_text(json.dumps({"question": "How many?", "answers": ["two"]}))
    (tmp_path / "caption.json").write_text(json.dumps({"caption": "a caption", "key": 7}))
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, pictures / "0.png", "part/a.JPG")
        add(tar, tmp_path / "question.json", "part/a.json")
        add(tar, pictures / "1.png", "part/b.png")
        add(tar, tmp_path / "caption.json", "part/b.json")
        add(tar, tmp_path / "a.txt", "part/c.txt")  # no picture
        add(tar, pictures / "2.png", "d.png")  # no text
        add(tar, pictures / "3.png", "e.png")
        add(tar, tmp_path / "bad.json", "e.json")  # broken text
        add(tar, pictures / "4.png", "f.png")
        add(tar, tmp_path / "a.txt", "f.txt")
    broken = BrokenSamples("x", 3)
    entries = list(read_shards([tmp_path / "x.tar"], broken))
    assert [(entry.question, entry.text) for entry in entries] == [
        ("How many?", ""),
        ("", "a caption"),
        ("", "one"),
        ("", "two"),
    ]
    assert list(broken.problems) == ["x.tar:part/c", "x.tar:d", "x.tar:e"]


def test_a_shard_that_ends_too_early(shards: Path) -> None:
    whole = (shards / "000000.tar").read_bytes()
    (shards / "000000.tar").write_bytes(whole[:4000])
    broken = BrokenSamples("shards", 1)
    entries = list(read_shards([shards / "000000.tar"], broken))
    assert 0 < len(entries) < 4
    assert "000000.tar (the shard cannot be read further" in broken.named()
    (shards / "000001.tar").write_text("this is no tar file, and long enough to hold a header" * 20)
    with pytest.raises(DataError, match="2 samples are broken"):
        list(read_shards(shard_paths(shards), broken))
    cut = ShardPicture(shards / "000000.tar", "0003.png", 3900, 500)
    with pytest.raises(ImageError, match=r"0003\.png is cut off"):
        cut.read()


def test_a_path_tells_its_kind(captions: Path, questions: Path, folder: Path, shards: Path) -> None:
    kinds = {
        captions: "coco-captions",
        questions: "coco-vqa",
        folder: "folder",
        shards: "shards",
        shards / "000001.tar": "shards",
        shards / "{000000..000002}.tar": "shards",
    }
    for path, kind in kinds.items():
        config, base = detect_data(str(path), "pictures", None, 7)
        assert (config.kind, config.max_broken) == (kind, 7)
        assert base / config.path == path


def test_a_recipe_tells_its_data(folder: Path) -> None:
    pytest.importorskip("tomllib", reason="recipes are read by Python 3.11")
    recipe = folder / "recipe.toml"
    recipe.write_text('[data]\nkind = "folder"\npath = "."\n')
    config, base = detect_data(str(recipe), None, None, 7)
    assert (config.path, config.max_broken, base) == (".", 100, folder)
    recipe.write_text("seed = 1\n")
    with pytest.raises(DataError, match=r"no section \[data\]"):
        detect_data(str(recipe), None, None, 7)
    recipe.write_text("seed =")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        detect_data(str(recipe), None, None, 7)
