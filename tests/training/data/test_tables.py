"""Tables of many forms give the same entries; a bad row is a broken sample, and the rows after it are read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip2edge.errors import ConfigError, DataError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.detect import detect_data
from blip2edge.training.data.entries import BrokenSamples, Entry
from blip2edge.training.data.readers.rows import (
    ANSWERS,
    CAPTIONS,
    DIALOGUES,
    PICTURES,
    CellPicture,
    RowReader,
    WebPicture,
    dialogue,
)
from blip2edge.training.data.registry import open_sample_source, read_entries

Rows = list[dict[str, Any]]


def read(kind: str, path: Path, **values: Any) -> tuple[list[Entry], dict[str, str]]:
    config = DataConfig(kind=kind, path=str(path), **values)
    entries, broken = read_entries(config, base=path.parent)
    return list(entries), broken.problems


def listed(folder: Path, rows: Rows) -> Path:
    (folder / "list.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    return folder / "list.json"


def lines(folder: Path, rows: Rows) -> Path:
    (folder / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    return folder / "rows.jsonl"


def delimited(folder: Path, rows: Rows, name: str = "rows.csv") -> Path:
    with open(folder / name, "w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if name.endswith("tsv") else ",")
        table.writeheader()
        table.writerows(rows)
    return folder / name


def imagefolder(folder: Path, rows: Rows) -> Path:
    lines(folder, rows).rename(folder / "metadata.jsonl")
    return folder


def parquet(folder: Path, rows: Rows) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=3
    )
    return folder / "rows.parquet"


FORMS: dict[str, Callable[[Path, Rows], Path]] = {
    "list": listed,
    "jsonl": lines,
    "csv": delimited,
    "tsv": lambda folder, rows: delimited(folder, rows, "rows.tsv"),
    "imagefolder": imagefolder,
    "parquet": parquet,
}


@pytest.mark.parametrize("form", FORMS)
def test_captions_in_every_form(form: str, pictures: Path) -> None:
    rows = [{"file_name": f"{number}.png", "caption": f' a "dog",\u2028{number}\n'} for number in range(10)]
    rows[3]["caption"] = " "
    rows[5]["file_name"] = "gone.png"
    path = FORMS[form](pictures, rows)
    config, base = detect_data(str(path), None, None, 2)
    assert config.kind == ("parquet" if form == "parquet" else "table")
    found, broken = read_entries(config, base=base)
    entries = list(found)
    kept = [number for number in range(10) if number not in (3, 5)]
    assert [entry.text for entry in entries] == [f'a "dog", {number}' for number in kept]
    assert [np.asarray(entry.picture.open())[0, 0, 0] for entry in entries] == [number * 20 for number in kept]
    problems = list(broken.problems.values())
    assert problems == ["the caption is empty", f"{pictures / 'gone.png'} is missing"]
    with pytest.raises(DataError, match="2 samples are broken, and max_broken allows 1"):
        read(config.kind, path, max_broken=1)


def test_lists_of_lavis(pictures: Path) -> None:
    """Captions with text ids; several captions of a picture; questions with one answer, or with a list of them."""
    rows = [
        {"image": "0.png", "image_id": "coco_0", "caption": "a dog"},
        {"image": "1.png", "image_id": 7, "caption": ["a cat", "two cats", ""]},
        {"image": "2.png", "question_id": 5, "question": "red?", "answer": ["yes", "yes", "no"], "dataset": "vqa"},
        {"image": "3.png", "question_id": 5, "question": " why? ", "answer": "so", "image_id": None},
        {"image": "4.png", "question": "?", "answers": [{"answer": "a"}]},
        {"image": "5.png", "question": "?", "answer": ["", " "]},
        "no object",
        {"image": "6.png"},
        {"caption": "no picture"},
    ]
    entries, problems = read("table", listed(pictures, rows))  # type: ignore[arg-type]  # a row that is no object
    assert [(one.sample_id, one.text or one.question, one.answers) for one in entries] == [
        ("0", "a dog", ()),
        ("1", "a cat", ()),
        ("1#1", "two cats", ()),
        ("5", "red?", ("yes", "yes", "no")),
        ("5#2", "why?", ("so",)),
        ("4", "?", ("a",)),
    ]
    assert [one.image_id for one in entries] == ["coco_0", "7", "7", "2.png", "3.png", "4.png"]
    assert [one.numbered for one in entries] == [False, True, True, True, True, True]
    assert list(problems) == ["5#3", "6", "7", "8"]


def test_karpathys_splits(pictures: Path) -> None:
    images: list[Any] = [
        {
            "filepath": "pictures",
            "filename": f"{number}.png",
            "cocoid": 100 + number,
            "split": ("train", "restval", "val", "test")[number % 4],
            "sentences": [{"raw": f"caption {number} {letter}", "sentid": 1} for letter in "ab"],
        }
        for number in range(8)
    ]
    images += [{"split": "train", "filename": 5, "sentences": []}, {**images[0], "sentences": None}]
    path = pictures.parent / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    entries, problems = read("karpathy", path)
    assert [entry.image_id for entry in entries] == ["100", "100", "101", "101", "104", "104", "105", "105"]
    assert entries[1].text == "caption 0 b"
    assert entries[0].numbered
    assert len({entry.sample_id for entry in entries}) == 8
    assert list(problems) == ["8", "9"]
    config, base = detect_data(str(path), None, None, 0)
    assert config.kind == "karpathy"
    assert [entry.image_id for entry in read_entries(config, base=base)[0]] == ["103", "103", "107", "107"]
    with pytest.raises(DataError, match="expected pictures of the splits dev, got "):
        read("karpathy", path, splits=("dev",))


def test_a_broken_row_is_not_the_end(pictures: Path) -> None:
    good = [json.dumps({"image": f"{number}.png", "text": f"caption {number}"}).encode() for number in range(3)]
    content = b"\n".join([good[0], b"{", good[1], b'{"text": "\xff"}', b"[1]", b"[" * 100_000, good[2]])
    (pictures / "rows.jsonl").write_bytes(content)
    entries, problems = read("table", pictures / "rows.jsonl")
    assert [entry.text for entry in entries] == ["caption 0", "caption 1", "caption 2"]
    assert list(problems) == ["1", "3", "4", "5"]
    (pictures / "rows.csv").write_bytes(b"image,text\r\n0.png,a\r\n1.png\r\n2.png,b,c\r\n3.png,\xff\r\n\r\n4.png,d\r\n")
    entries, problems = read("table", pictures / "rows.csv")
    assert [entry.text for entry in entries] == ["a", "d"]
    assert list(problems.values()) == ["expected 2 cells, got 1", "expected 2 cells, got 3", "the text is not UTF-8"]


def test_a_damaged_row_group_of_parquet(pictures: Path) -> None:
    path = parquet(pictures, [{"image_path": f"{number}.png", "TEXT": f"caption {number}"} for number in range(9)])
    column = pytest.importorskip("pyarrow.parquet").read_metadata(path).row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(bytes(content))
    entries, problems = read("parquet", path)
    assert [entry.text[-1] for entry in entries] == list("012678")
    assert list(problems) == ["rows.parquet:3"]
    assert "row group 1 cannot be read as Parquet" in problems["rows.parquet:3"]


def test_pictures_in_cells(pictures: Path) -> None:
    """LAION's columns: bytes, or an address. A column of the package datasets has bytes and a path."""
    content = (pictures / "4.png").read_bytes()
    rows: Rows = [
        {"jpg": content, "URL": None, "TEXT": "a"},
        {"jpg": None, "URL": "https://host.example/x/cat.png?w=3", "TEXT": "b"},
        {"jpg": b"no picture", "URL": None, "TEXT": "c"},
    ]
    entries, problems = read("parquet", parquet(pictures, rows))
    assert problems == {}
    assert [type(entry.picture) for entry in entries] == [CellPicture, WebPicture, CellPicture]
    assert entries[0].picture.read() == content
    assert (entries[1].picture.identity, entries[1].picture.suffix) == (rows[1]["URL"], ".png")
    assert len({entry.picture.identity for entry in entries}) == 3
    assert [entries[number].picture.suffix for number in (0, 2)] == [".png", ".jpg"]
    entries, _ = read("parquet", parquet(pictures, [{"image": {"bytes": content, "path": "x.png"}, "text": "d"}]))
    assert np.asarray(entries[0].picture.open())[0, 0, 0] == 80
    assert entries[0].sample_id == "rows.parquet:0"


def test_parquet_is_streamed_shuffled_and_resumed(pictures: Path) -> None:
    rows: Rows = [
        {"image": (pictures / f"{number}.png").read_bytes(), "caption": f"caption {number}"} for number in range(10)
    ]
    parquet(pictures, rows)
    config = DataConfig(kind="parquet", path="pictures", shuffle_buffer=4)
    whole = open_sample_source(config, seed=1, base=pictures.parent)
    stream = iter(whole)
    texts = [next(stream).text for _ in range(13)]
    assert sorted(texts[:10]) == sorted(row["caption"] for row in rows)
    state = json.loads(json.dumps(whole.state_dict()))
    again = open_sample_source(config, seed=1, base=pictures.parent)
    again.load_state_dict(state)
    assert [sample.text for sample, _ in zip(iter(again), range(5), strict=False)] == [
        next(stream).text for _ in range(5)
    ]


def test_dialogues_of_llava(pictures: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "It barks."},
    ]
    rows = [
        {"id": "a", "image": "0.png", "conversations": turns},
        {"id": "b", "image": "1.png", "conversations": [{"from": "human", "value": "<image>"}, turns[1]]},
        {"id": "c", "image": "2.png", "conversations": turns[:1]},
        {"id": "d", "conversations": turns},
        {"id": "e", "image": "3.png", "conversations": turns[1:]},
    ]
    path = listed(pictures, rows)
    entries, problems = read("table", path)
    assert [one.sample_id for one in entries] == ["a", "a#1", "b"]
    assert (entries[1].question, entries[1].answers) == ("Why?", ("It barks.",))
    assert entries[1].history == (("What is it?", "A dog."),)
    assert (entries[2].text, entries[2].question) == ("A dog.", "")
    assert set(problems) == {"c", "d", "e"}
    config = DataConfig(kind="table", path=str(path), question="Q: {} A:", prompt_share=0.0)
    samples = {
        one.sample_id: one for one, _ in zip(open_sample_source(config, seed=0, base=pictures), "123", strict=False)
    }
    assert samples["a"].prompt == "Q: What is it? A:"
    assert (samples["a#1"].prompt, samples["a#1"].text) == ("Q: What is it? A: A dog. Q: Why? A:", "It barks.")


def test_messages_with_parts() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ]
    assert list(dialogue(turns)) == [{"question": "What?", "answers": ("A dog.",), "history": ()}]
    for wrong in ([], "text", [5], [{"from": "human", "value": 5}], [{"from": "tool", "value": "x"}]):
        with pytest.raises(DataError, match="expected"):
            list(dialogue(wrong))


def test_columns_that_are_named_and_columns_that_are_missing(pictures: Path) -> None:
    rows = [{"photo": "0.png", "image": "gone.png", "german": "ein Hund", "caption": "a dog"}]
    entries, _ = read("table", lines(pictures, rows), image_column="photo", text_column="German")
    assert entries[0].text == "ein Hund"
    path = pictures / "rows.tsv"
    path.write_text("a dog\thttps://host.example/a.jpg\n")  # as CC3M is published
    with pytest.raises(DataError, match="expected the first line to name the columns"):
        read("table", path)
    for name, text, found in (
        ("rows.csv", "image;caption\n", "got 'image;caption': the separator seems to be ';'; write .* a comma between"),
        ("rows.tsv", "image,caption\n", "got 'image,caption': the separator seems to be ','; write .* a tab between"),
        ("rows.csv", "", "got no column; add a first line"),
    ):
        (pictures / name).write_text(text)
        with pytest.raises(DataError, match=found):
            read("table", pictures / name)
    with pytest.raises(DataError, match=r"expected one of metadata\.jsonl"):
        read("table", pictures)
    reader = RowReader(pictures, BrokenSamples("x", 9))
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    assert [
        one.text for one in reader.entries(0, {"image": buffer.getvalue(), "caption": float("nan"), "text": "a"})
    ] == []


def test_several_templates_of_a_question(questions: Path) -> None:
    config = DataConfig(
        kind="coco-vqa", path=questions.name, images="pictures", question="Q: {} A:", more_questions=("{} Short:", "{}")
    )
    source = open_sample_source(config, seed=0, base=questions.parent)
    ends = [sample.prompt[-2:] for sample, _ in zip(source, range(300), strict=False)]
    assert all(70 < ends.count(end) < 130 for end in ("A:", "t:")), ends
    assert set(ends) - {"A:", "t:"} != set()
    with pytest.raises(ConfigError, match=r"more_questions must contain \{\} once"):
        DataConfig(more_questions=("no place",))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("from", "value", "bytes", "path")), inner)
    ),
    max_leaves=5,
)
COLUMNS = st.sampled_from((*PICTURES[:8], *CAPTIONS[:3], *ANSWERS, *DIALOGUES, "question", "id", "image_id", "TEXT"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(COLUMNS, VALUES, max_size=5), max_size=4))
def test_any_row_gives_entries_or_is_broken(rows: Rows) -> None:
    broken = BrokenSamples("x", 99)
    reader = RowReader(Path("/nowhere"), broken)
    entries = [entry for number, row in enumerate(rows) for entry in reader.entries(number, row)]
    assert all(entry.text or entry.answers for entry in entries)
    assert len({entry.sample_id for entry in entries} | set(broken.problems)) == len(entries) + len(broken.problems)
    assert len(entries) + len(broken.problems) >= len(rows)
