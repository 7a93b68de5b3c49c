"""What a data set is made of: pictures that can be opened, texts about them, and a count of what is broken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from blip2edge.errors import Blip2EdgeError, DataError, ImageError
from blip2edge.runtime.images.preprocess import load_image
from blip2edge.training.data.sources import Sample

_NAMED = 3  # broken samples that a message names


class StoredPicture(Protocol):
    """A picture file, wherever it lies; small, and sent to other processes as it is."""

    @property
    def suffix(self) -> str:
        """Of its file name, such as ".jpg"."""

    @property
    def identity(self) -> str:
        """Equal where the bytes are: the file's path, size and time. What cached features are filed under."""

    def read(self) -> bytes:
        """The file's bytes, unchanged.

        Raises:
            ImageError: It cannot be read.
        """

    def open(self) -> Image.Image:
        """The picture, upright, RGB.

        Raises:
            ImageError: It cannot be read, or is no picture.
        """


def file_identity(path: Path) -> str:
    """A file's path, size in bytes and time of change in nanoseconds; the path alone where it is not there."""
    try:
        status = path.stat()
    except OSError:  # told when it is opened
        return str(path.absolute())
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


@dataclass(frozen=True)
class FilePicture:
    """A picture in a file of its own."""

    path: Path

    @property
    def suffix(self) -> str:
        """Of the file's name."""
        return self.path.suffix.lower()

    @property
    def identity(self) -> str:
        """The file's."""
        return file_identity(self.path)

    def read(self) -> bytes:
        """The file."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ImageError(f"{self.path}: cannot be opened ({error.strerror or error})") from error

    def open(self) -> Image.Image:
        """The picture."""
        return load_image(self.path)


@dataclass(frozen=True)
class Entry:
    """One text about one picture, as a file has it.

    Attributes:
        sample_id: Unique within its data.
        image_id: Equal for two entries that show the same picture.
        picture: What is shown.
        text: A caption; empty for a question.
        question: What is asked; empty for a caption.
        answers: What people answered.
        kinds: How a question is sorted in scores, such as `{"answer_type": "yes/no"}`.
    """

    sample_id: str
    image_id: str
    picture: StoredPicture
    text: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)


class BrokenSamples:
    """Counts and names samples that cannot be used, up to a limit.

    Args:
        name: What is read, for messages.
        limit: How many are skipped; one more is an error.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self.problems: dict[str, str] = {}

    def add(self, sample_id: str, problem: str) -> None:
        """Counts a sample; one that was counted before does not count again.

        Raises:
            DataError: There are more than the limit; how many, and the first three.
        """
        if sample_id in self.problems:
            return
        self.problems[sample_id] = problem
        self.check()

    def check(self) -> None:
        """Refuses what is above the limit.

        Raises:
            DataError: See `add`.
        """
        count = len(self.problems)
        if count > self._limit:
            raise DataError(
                f"{self._name}: {count} samples are broken, and max_broken allows {self._limit}: {self.named()}",
                "mend or remove them, or raise max_broken in [data]",
            )

    def named(self) -> str:
        """The first few, with what is wrong with them."""
        first = [f"{name} ({problem})" for name, problem in list(self.problems.items())[:_NAMED]]
        return ", ".join(first) + (", …" if len(self.problems) > _NAMED else "")


def missing_pictures(
    name: str, missing: Mapping[str, str], total: int, broken: BrokenSamples, limit: int
) -> None:
    """Counts pictures that are not there.

    Args:
        name: The file that names them.
        missing: From samples to the picture files that they lack.
        total: How many samples there are.
        broken: Counts them.
        limit: How many may be missing.

    Raises:
        DataError: More are missing than that; how many, and the first three.
    """
    files = sorted(set(missing.values()))
    if len(missing) > limit:
        raise DataError(
            f"{name}: {len(files)} pictures of {len(missing)} of the {total} samples are missing:"
            f" {', '.join(files[:_NAMED])}" + (", …" if len(files) > _NAMED else ""),
            "say where they are with images in [data], or raise max_broken",
        )
    for sample_id, file in missing.items():
        broken.add(sample_id, f"{file} is missing")


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture with all that its data says of it.

    Attributes:
        image_id: Of the picture.
        picture: What is shown.
        entries: The texts about it, in the order of the data.
    """

    image_id: str
    picture: StoredPicture
    entries: tuple[Entry, ...]

    @property
    def captions(self) -> list[str]:
        """Its captions."""
        return [entry.text for entry in self.entries if entry.text]


def by_picture(entries: Iterable[Entry]) -> list[AnnotatedPicture]:
    """Entries gathered by their picture, in the order in which pictures come first."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.image_id, []).append(entry)
    return [AnnotatedPicture(image_id, group[0].picture, tuple(group)) for image_id, group in groups.items()]


class RejectingSource:
    """The part of a source that counts what cannot be used.

    Args:
        broken: What counts.
    """

    def __init__(self, broken: BrokenSamples) -> None:
        self._broken = broken

    @property
    def broken(self) -> Mapping[str, str]:
        """What was left out when the data was read, and what was rejected since."""
        return self._broken.problems

    def reject(self, sample: Sample, error: Blip2EdgeError) -> None:
        """Counts a sample that could not be used; see :class:`Broken`."""
        self._broken.add(sample.sample_id, error.problem)
