"""Reads the JSON files of COCO (captions, `captions_val2014.json`) and of VQA (questions and answers)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2edge.errors import DataError
from blip2edge.picture_files import is_file
from blip2edge.reading import DATA_BYTES, read_json
from blip2edge.training.data.entries import (
    BrokenSamples,
    Entry,
    FilePicture,
    UniqueIds,
    answer_texts,
    missing_pictures,
    single_spaced,
)

_Kind = type | tuple[type, ...]
_IDENTITY = (int, str)
_KINDS: dict[_Kind, str] = {
    _IDENTITY: "a whole number or a text",
    str: "a text",
    list: "a list",
}  # types of fields, for errors
_PICTURE_FOLDERS = ("", "images")  # folders next to a file that are searched for its pictures by default


def load_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        DataError: The file is missing, cannot be parsed (the error names the line), or does not contain an object.
    """

    def explain(error: Exception) -> DataError | None:
        if isinstance(error, json.JSONDecodeError):
            return DataError(
                f"{path}, line {error.lineno}, column {error.colno}: expected JSON: {error.msg}",
                f"correct line {error.lineno} of the file",
            )
        return None

    return read_json(path, DataError, "give a file in COCO's or VQA's form", explain=explain, limit=DATA_BYTES)


def rows_of(content: Mapping[str, Any], key: str, fields: Mapping[str, _Kind], path: Path) -> list[Any]:
    """Returns the list `key` of a JSON file, after checking that each object in it has the required fields.

    Args:
        content: Parsed content of the file.
        key: Name of the list.
        fields: Name and type of each required field; further fields are ignored.
        path: The file, for messages.

    Raises:
        DataError: The list or a field is missing, or has another type; the error names the number of the object.
    """
    rows = content.get(key)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list {key!r}, got the keys {', '.join(content) or '(none)'}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: {key}[{number}] must be an object, not {row!r:.60}")
        for field, kind in fields.items():
            if field not in row:
                raise DataError(f"{path}: {key}[{number}] has no field {field!r}, only {', '.join(row)}")
            if not isinstance(row[field], kind):
                raise DataError(f"{path}: {key}[{number}].{field} must be {_KINDS[kind]}, not {row[field]!r:.60}")
    return rows


def read_captions(path: Path, images: Path | None, max_broken: int) -> tuple[list[Entry], BrokenSamples]:
    """Reads captions from a JSON file in the format of COCO.

    Args:
        path: A file with the lists `images` (id, file_name) and `annotations` (id, image_id, caption).
        images: Directory of the pictures; None for the directory of the file.
        max_broken: Largest number of samples without a picture or text.

    Returns:
        An entry for each caption, in the file's order, and the skipped samples.

    Raises:
        DataError: The file cannot be read, or more than `max_broken` samples are broken.
    """
    content = load_json_object(path)
    names = {
        row["id"]: row["file_name"] for row in rows_of(content, "images", {"id": _IDENTITY, "file_name": str}, path)
    }
    rows = rows_of(content, "annotations", {"image_id": _IDENTITY, "caption": str}, path)
    directory = images if images is not None else _beside(path, names.values())
    entries = []
    broken = BrokenSamples(str(path), max_broken)
    unique = UniqueIds()
    for number, row in enumerate(rows):
        sample_id = unique(str(row.get("id", number)))
        caption = single_spaced(row["caption"])
        if row["image_id"] not in names:
            broken.add(sample_id, f"its picture {row['image_id']} is not in the list images")
        elif not caption:
            broken.add(sample_id, "the caption is empty")
        else:
            picture = FilePicture(directory / names[row["image_id"]])
            numbered = isinstance(row["image_id"], int)
            entries.append(Entry(sample_id, str(row["image_id"]), picture, caption, numbered=numbered))
    return _with_pictures(path, entries, broken, max_broken), broken


def read_vqa(
    path: Path, annotations: Path | None, images: Path | None, max_broken: int
) -> tuple[list[Entry], BrokenSamples]:
    """Reads questions on pictures with the answers of people.

    Args:
        path: A file with the list `questions` (question_id, image_id, question).
        annotations: The file with the list `annotations` (question_id, answers); None for the file in the directory
            of `path` with VQA's usual name.
        images: Directory of the pictures; None for the directory of the file.
        max_broken: Largest number of samples without a picture or an answer.

    Returns:
        An entry for each question, in the file's order, and the skipped samples.

    Raises:
        DataError: A file cannot be read, or more than `max_broken` samples are broken.
    """
    content = load_json_object(path)
    questions = rows_of(content, "questions", {"question_id": _IDENTITY, "image_id": _IDENTITY, "question": str}, path)
    answers = annotations if annotations is not None else _annotations_of(path)
    fields: dict[str, _Kind] = {"question_id": _IDENTITY, "answers": list}
    given = {row["question_id"]: row for row in rows_of(load_json_object(answers), "annotations", fields, answers)}
    names = {row["image_id"]: _file_name(content, row["image_id"]) for row in questions}
    if isinstance(content.get("images"), list):
        listed = rows_of(content, "images", {"id": _IDENTITY, "file_name": str}, path)
        names |= {row["id"]: row["file_name"] for row in listed}
    directory = images if images is not None else _beside(path, names.values())
    entries = []
    broken = BrokenSamples(str(path), max_broken)
    unique = UniqueIds()
    for row in questions:
        sample_id, question = unique(str(row["question_id"])), single_spaced(row["question"])
        found = given.get(row["question_id"])
        texts = _answers(found, answers) if found is not None else ()
        if found is None or not texts or not question:
            broken.add(sample_id, f"no answer in {answers.name}" if question else "the question is empty")
            continue
        entries.append(
            Entry(
                sample_id,
                str(row["image_id"]),
                FilePicture(directory / names[row["image_id"]]),
                question=question,
                answers=texts,
                kinds={key: str(found[key]) for key in ("answer_type", "question_type") if key in found},
                numbered=isinstance(row["question_id"], int),
            )
        )
    return _with_pictures(path, entries, broken, max_broken), broken


def _answers(row: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Returns the answers in one annotation of VQA. In the file, an answer is a text or an object with `answer`."""
    try:
        return answer_texts(row["answers"])
    except DataError as error:
        raise DataError(f"{path}, question {row['question_id']}: {error.problem}") from error


def _file_name(content: Mapping[str, Any], image_id: int | str) -> str:
    """Returns the file name of the picture with this number, as in COCO: `COCO_val2014_000000000042.jpg`."""
    number = f"{image_id:012d}" if isinstance(image_id, int) else image_id
    split = content.get("data_subtype")
    return f"COCO_{split if isinstance(split, str) else 'val2014'}_{number}.jpg"


def _annotations_of(path: Path) -> Path:
    """Returns the path of the answers to a file of questions, by VQA's file names (v2_OpenEnded_…_questions.json).

    Raises:
        DataError: There is no such file.
    """
    named = path.with_name(path.name.replace("OpenEnded_", "").replace("MultipleChoice_", ""))
    answers = named.with_name(named.name.replace("questions", "annotations"))
    if answers == path or not answers.is_file():
        reason = "the file name does not contain 'questions'" if answers == path else f"there is no {answers}"
        raise DataError(
            f"{path}: the file with the answers to these questions was not found: {reason}",
            "set annotations ([data] in a recipe) to the path of the file with the answers",
        )
    return answers


def _beside(path: Path, names: Iterator[str] | Sequence[str] | Any) -> Path:
    """Returns the folder with the pictures of a JSON file, searched in the usual places near the file.

    The places are: the folder of the file and some subfolders, then folders next to that folder, named after the split
    or `images`. The first place that has the first picture is returned; without such a place, the folder of the file.
    """
    first = next(iter(names), None)
    parent = path.parent
    split = path.stem.rpartition("_")[2]
    places = [parent / place for place in _PICTURE_FOLDERS] + [parent.parent / place for place in (split, "images")]
    for place in places:
        if first is not None and is_file(place / first):
            return place
    return parent


def _with_pictures(path: Path, entries: list[Entry], broken: BrokenSamples, limit: int) -> list[Entry]:
    """Returns the entries whose picture file exists; adds the other entries to `broken`.

    Raises:
        DataError: The picture files of more than `limit` entries, or of all entries, are missing.
    """
    files: dict[Path, bool] = {}
    missing = {}
    for entry in entries:
        picture = entry.picture.path if isinstance(entry.picture, FilePicture) else path
        if picture not in files:
            files[picture] = is_file(picture)
        if not files[picture]:
            missing[entry.sample_id] = str(picture)
    missing_pictures(str(path), missing, len(entries), broken, limit)
    kept = [entry for entry in entries if entry.sample_id not in missing]
    if missing and not kept:
        raise broken.none_usable("sample with its picture")
    return kept
