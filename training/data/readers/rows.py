"""Makes entries from the rows of a table; the names of a row's columns decide what the row is.

A row is a mapping from column names to values, for every file format. There are three kinds of rows:

    a caption       a column such as ``caption`` or ``text``: a text, or a list of texts
    a question      ``question``, and ``answers`` or ``answer``: a text, a list of texts, or VQA's objects
    a dialogue      ``conversations`` (LLaVA) or ``messages``: turns of a person and of the model

The picture is in a column of bytes, of paths or of web addresses. Names of columns are compared in lower case.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from blip2edge.errors import Blip2EdgeError, DataError
from blip2edge.picture_files import is_file
from blip2edge.runtime.images.download import WEB, download
from blip2edge.runtime.images.preprocess import load_image
from blip2edge.training.data.entries import (
    BrokenSamples,
    Entry,
    FilePicture,
    StoredPicture,
    UniqueIds,
    answer_texts,
    single_spaced,
)

Row = Mapping[str, Any]

PICTURES = (
    *("image", "jpg", "png", "image_bytes", "bytes", "file_name", "filename", "image_path", "img", "img_path"),
    *("path", "file_path", "filepath", "file", "url", "image_url"),
)
"""Columns of the picture, in the order in which they are tried."""
CAPTIONS = ("caption", "captions", "text", "texts", "sentence", "sentences", "title", "alt_text")
"""Columns of the caption, in the order in which they are tried."""
ANSWERS = ("answers", "answer", "direct_answers")
DIALOGUES = ("conversations", "messages")
_PEOPLE, _MODELS = ("human", "user"), ("gpt", "assistant", "model")
_STARTS = {b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"RIFF": ".webp", b"II*\0": ".tif", b"MM\0*": ".tif"}
_PLACE = re.compile(r"<image>|<ImageHere>", re.IGNORECASE)  # the picture's place in a dialogue; the family sets its own


@dataclass(frozen=True)
class CellPicture:
    """A picture stored as bytes in a table (interface: :class:`blip2edge.training.data.entries.StoredPicture`)."""

    content: bytes

    @property
    def suffix(self) -> str:
        """Returns the file suffix that fits the first bytes of the picture; ".jpg" for unknown bytes."""
        return next((suffix for start, suffix in _STARTS.items() if self.content.startswith(start)), ".jpg")

    @property
    def identity(self) -> str:
        """Returns a hash of the picture's bytes."""
        return hashlib.sha256(self.content).hexdigest()

    def read(self) -> bytes:
        """Returns the bytes of the picture file."""
        return self.content

    def open(self) -> Image.Image:
        """Decodes the picture; returns it upright, in RGB."""
        return load_image(self.content)


@dataclass(frozen=True)
class WebPicture:
    """A picture at a web address, downloaded each time it is opened."""

    address: str

    @property
    def suffix(self) -> str:
        """Returns the suffix of the address's path, or ".jpg" without a suffix."""
        return PurePosixPath(self.address.partition("?")[0]).suffix.lower() or ".jpg"

    @property
    def identity(self) -> str:
        """Returns the picture's web address."""
        return self.address

    def read(self) -> bytes:
        """Downloads the picture file; raises ImageError."""
        return download(self.address)

    def open(self) -> Image.Image:
        """Downloads and decodes the picture; returns it upright, in RGB."""
        return load_image(self.read())


class RowReader:
    """Makes entries from rows. A row that cannot be used is counted as broken, and has no entry.

    Args:
        images: Directory that the paths of pictures are relative to.
        broken: Collects the broken rows.
        image_column: Column of the picture; empty for the first of :data:`PICTURES` with a value.
        text_column: Column of the caption; empty for the first of :data:`CAPTIONS` with a value.
        prefix: Beginning of all sample ids.
    """

    def __init__(
        self, images: Path, broken: BrokenSamples, image_column: str = "", text_column: str = "", prefix: str = ""
    ) -> None:
        self._images, self._broken, self._prefix = images, broken, prefix
        self._pictures = (image_column.lower(),) if image_column else PICTURES
        self._captions = (text_column.lower(),) if text_column else CAPTIONS
        self._ids = UniqueIds()
        self._exists: dict[Path, bool] = {}

    def entries(self, number: int | str, row: Row | Blip2EdgeError) -> Iterator[Entry]:
        """Makes the entries of a row.

        Args:
            number: Number of the row; used as id if the row has no id.
            row: The row, or the error that was raised when the row was read.

        Yields:
            An entry for each caption, question or answer of a dialogue.

        Raises:
            DataError: More rows are broken than allowed.
        """
        if isinstance(row, Blip2EdgeError):
            self._broken.add(self._ids(f"{self._prefix}{number}"), row.problem)
            return
        row = {str(key).lower(): value for key, value in row.items()}
        given = next((row[key] for key in ("question_id", "id") if isinstance(row.get(key), (int, str))), number)
        sample_id = self._ids(f"{self._prefix}{number if given == '' else given}")
        try:
            picture, name = self._picture(row)
            found = list(texts_of(row, self._captions))
        except DataError as error:
            self._broken.add(sample_id, error.problem)
            return
        named = row.get("image_id")
        image_id = str(named) if isinstance(named, (int, str)) and named != "" else name
        for place, entry in enumerate(found):
            own = f"{sample_id}#{place}" if place else sample_id
            written = given if "question" in entry else named
            yield Entry(own, image_id, picture, numbered=isinstance(written, int), **entry)

    def _picture(self, row: Row) -> tuple[StoredPicture, str]:
        """Returns a row's picture and its name: path, address or hash of the bytes; DataError without a picture."""
        for column in self._pictures:
            value = row.get(column)
            if isinstance(value, Mapping):  # as the package datasets stores pictures
                value = value.get("bytes") or value.get("path")
            if isinstance(value, (bytes, bytearray)) and value:
                cell = CellPicture(bytes(value))
                return cell, cell.identity
            if isinstance(value, str) and value.strip():
                return self._named(value.strip()), value.strip()
        empty = [column for column in self._pictures if column in row]
        raise DataError(
            "the picture is empty" if empty else f"the row has no picture, only the columns {', '.join(row)}"
        )

    def _named(self, name: str) -> StoredPicture:
        if name.lower().startswith(WEB):
            return WebPicture(name)
        path = self._images / name
        if path not in self._exists:
            self._exists[path] = is_file(path)
        if not self._exists[path]:
            raise DataError(f"{path} is missing")
        return FilePicture(path)


def texts_of(row: Row, captions: Sequence[str] = CAPTIONS) -> Iterator[dict[str, Any]]:
    """Yields the text fields of each entry of a row: a caption, a question with answers, or a turn of a dialogue.

    Args:
        row: The row; its column names are in lower case.
        captions: Names of columns that may hold the caption; the first column with a value is used.

    Raises:
        DataError: The row has no text, or a text column has a value of an unknown type.
    """
    turns = next((row[key] for key in DIALOGUES if row.get(key) is not None), None)
    if turns is not None:
        yield from dialogue(turns)
    elif asks(row):
        yield _question(row)
    else:
        yield from ({"text": text} for text in _captions_of(row, captions))


def asks(row: Row) -> bool:
    """Returns whether a row is a question with answers, or a dialogue (and not a caption)."""
    answered = row.get("question") is not None and any(row.get(key) is not None for key in ANSWERS)
    return answered or any(row.get(key) is not None for key in DIALOGUES)


def _captions_of(row: Row, columns: Sequence[str]) -> list[str]:
    value = next((row[key] for key in columns if row.get(key) not in (None, "", [])), None)
    if value is None:
        known = [key for key in columns if key in row]
        raise DataError("the caption is empty" if known else f"the row has no text, only the columns {', '.join(row)}")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"expected the caption to be a text, got {value!r:.60}")
    captions = [text for text in map(single_spaced, texts) if text]
    if not captions:
        raise DataError("the caption is empty")
    return captions


def _question(row: Row) -> dict[str, Any]:
    """Returns the fields `question`, `answers` and `kinds` of the entry for a row."""
    if not isinstance(row["question"], str):
        raise DataError(f"expected the question to be a text, got {row['question']!r:.60}")
    question = single_spaced(row["question"])
    given = next(row[key] for key in ANSWERS if row.get(key) is not None)
    answers = answer_texts(given if isinstance(given, list) else [given])
    if not question or not answers:
        raise DataError("the answers are empty" if question else "the question is empty")
    kinds = {key: str(row[key]) for key in ("answer_type", "question_type") if row.get(key) is not None}
    return {"question": question, "answers": answers, "kinds": kinds}


def dialogue(turns: Any) -> Iterator[dict[str, Any]]:
    """Makes an entry for each answer of a dialogue, with the earlier turns as its history.

    Args:
        turns: LLaVA's list of ``{"from": "human", "value": …}``, or one of ``{"role": "user", "content": …}``. Turns of
            the system are skipped.

    Yields:
        The fields ``question``, ``answers`` and ``history`` of an entry. If the question is only a picture,
        without text and earlier turns, the answer becomes the field ``text``: a caption.

    Raises:
        DataError: A turn is not such an object, or a question has no answer.
    """
    if not isinstance(turns, list) or not turns:
        raise DataError(f"expected a list of turns, got {turns!r:.60}")
    asked: str | None = None
    history: list[tuple[str, str]] = []
    for turn in turns:
        speaker, text = _turn(turn)
        if speaker in _PEOPLE:
            asked = text if asked is None else f"{asked} {text}".strip()
        elif speaker in _MODELS:
            if asked is None or not text:
                raise DataError(f"an answer in the dialogue {'is empty' if not text else 'has no question before it'}")
            alone = not asked and not history
            yield {"text": text} if alone else {"question": asked, "answers": (text,), "history": tuple(history)}
            history.append((asked, text))
            asked = None
        elif speaker != "system":
            raise DataError(f"expected a turn of {_PEOPLE[0]} or {_MODELS[0]}, got {speaker!r:.60}")
    if asked is not None and not history:
        raise DataError("the dialogue has no answer")


def _turn(turn: Any) -> tuple[str, str]:
    """Returns the speaker and the text of a turn of a dialogue; the marker of the picture is removed from the text."""
    if not isinstance(turn, Mapping):
        raise DataError(f"expected a turn to be an object, got {turn!r:.60}")
    speaker = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list):  # parts, as chat templates have them
        parts = [part.get("text") for part in text if isinstance(part, Mapping) and part.get("type") == "text"]
        text = " ".join(part for part in parts if isinstance(part, str))
    if not isinstance(text, str):
        raise DataError(f"expected the value of a turn to be a text, got {text!r:.60}")
    return str(speaker).lower(), single_spaced(_PLACE.sub(" ", text))


Rows = Callable[[Path], Iterator[tuple[int, Row | Blip2EdgeError]]]
"""A function that yields (number, row) for each row of a file.

If a row cannot be read, the error is yielded in place of the row.
"""
