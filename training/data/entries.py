"""Entries of a data set (pictures with texts), and the list of broken samples."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2edge.errors import Blip2EdgeError, DataError, ImageError
from blip2edge.picture_files import MAX_FILE_BYTES
from blip2edge.reading import read_bytes, reading
from blip2edge.runtime.images.preprocess import load_image
from blip2edge.training.data.sources import UNUSABLE, Sample

_NAMED = 3  # broken samples that a message names


class StoredPicture(Protocol):
    """A picture in a file or a shard, not opened yet. The object is small and can be sent to other processes."""

    @property
    def suffix(self) -> str:
        """Returns the suffix of the picture's file name, such as ".jpg"."""

    @property
    def identity(self) -> str:
        """Returns the key of the picture's cached features; for a file: path, size and modification time."""

    def read(self) -> bytes:
        """Reads the bytes of the picture file, unchanged.

        Raises:
            ImageError: The file cannot be read.
        """

    def open(self) -> Image.Image:
        """Decodes the picture; returns it in RGB, turned upright by its EXIF orientation.

        Raises:
            ImageError: The file cannot be read, or is not a picture.
        """


def file_identity(path: Path) -> str:
    """Returns a file's path, size in bytes and modification time in nanoseconds; for a missing file, only the path."""
    try:
        status = path.stat()
    except OSError:  # `open` raises the error
        return str(path.absolute())
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


@dataclass(frozen=True)
class FilePicture:
    """A picture in a file of its own."""

    path: Path

    @property
    def suffix(self) -> str:
        """Returns the suffix of the file's name, such as ".jpg"."""
        return self.path.suffix.lower()

    @property
    def identity(self) -> str:
        """Returns path, size and modification time of the file, as one text."""
        return file_identity(self.path)

    def read(self) -> bytes:
        """Reads the bytes of the file."""
        with reading(self.path, "a picture", ImageError):
            return read_bytes(self.path, MAX_FILE_BYTES)

    def open(self) -> Image.Image:
        """Decodes the picture; returns it upright, in RGB."""
        return load_image(self.path)


@dataclass(frozen=True)
class FeatureFile(FilePicture):
    """The output of a picture encoder in a `.npy` file, in place of a picture. It can be trained on, not shown."""

    def open(self) -> Image.Image:
        """Raises ImageError: there is no picture."""
        raise ImageError(
            f"{self.path} has features, not a picture", "features are used only to train with a frozen picture encoder"
        )

    def features(self) -> NDArray[np.float32]:
        """Reads the features [P, D].

        Raises:
            DataError: The file cannot be read, its array has not two dimensions, or a number in it is not finite.
        """
        with reading(self.path, "features [P, D] in NumPy's format", DataError):
            rows = np.load(io.BytesIO(read_bytes(self.path, MAX_FILE_BYTES)), allow_pickle=False)
        if rows.ndim != 2 or rows.dtype.kind != "f" or not np.isfinite(rows).all():
            raise DataError(
                f"{self.path}: expected finite floating-point features [P, D], got {rows.dtype} {rows.shape}"
            )
        return np.asarray(rows, np.float32)


@dataclass(frozen=True)
class Entry:
    """One caption of a picture, or one question on a picture with its answers.

    Attributes:
        sample_id: Id of the entry, unique within its data.
        image_id: Id of the picture. Entries of the same picture have the same id.
        picture: The picture.
        text: A caption; empty for a question.
        question: A question; empty for a caption.
        answers: Answers of people to the question.
        kinds: Groups in which the question is scored separately, such as `{"answer_type": "yes/no"}`.
        numbered: True if the ids are numbers in the data files, False if they are texts.
        history: Earlier questions of the dialogue with their answers.
    """

    sample_id: str
    image_id: str
    picture: StoredPicture
    text: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    numbered: bool = False
    history: tuple[tuple[str, str], ...] = ()


def single_spaced(text: str) -> str:
    """Returns the text with single spaces: replaces each run of white space, and removes white space at both ends."""
    return " ".join(text.split())


def answer_texts(answers: Iterable[Any]) -> tuple[str, ...]:
    """Returns the texts of the answers to a question; leaves out blank answers.

    Args:
        answers: Strings, or objects with the field `answer`.

    Raises:
        DataError: An answer is neither a string nor such an object.
    """
    texts = []
    for answer in answers:
        text = answer.get("answer") if isinstance(answer, dict) else answer
        if not isinstance(text, str):
            raise DataError(f"expected an answer to be a text, got {answer!r:.60}")
        texts.append(single_spaced(text))
    return tuple(text for text in texts if text)


class UniqueIds:
    """Makes the ids of samples unique: the second sample with the id ``7`` gets the id ``7#2``."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __call__(self, sample_id: str) -> str:
        """Returns `sample_id`, or `sample_id` with a number (``7#2``) if an earlier sample has this id."""
        count = self._counts[sample_id] = self._counts.get(sample_id, 0) + 1
        return sample_id if count == 1 else f"{sample_id}#{count}"


class BrokenSamples:
    """Collects samples that cannot be used, up to a limit.

    Args:
        name: Name of the data, for messages.
        limit: Largest allowed number of broken samples.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self._limit = limit
        self.problems: dict[str, str] = {}

    def empty(self) -> BrokenSamples:
        """Returns a collection of the same name and limit, without broken samples."""
        return BrokenSamples(self.name, self._limit)

    def add(self, sample_id: str, problem: str) -> None:
        """Adds a broken sample. A sample that is added twice counts once.

        Raises:
            DataError: There are more broken samples than the limit; the error names their number and the first three.
        """
        if sample_id in self.problems:
            return
        self.problems[sample_id] = problem
        self.check()

    def check(self) -> None:
        """Raises DataError if there are more broken samples than the limit."""
        if len(self.problems) > self._limit:
            raise DataError(
                f"{self.name}: {self.count} broken, and max_broken allows {self._limit}: {self.named()}",
                "repair or remove the broken samples, or raise max_broken (in the recipe's section of this data)",
            )

    def none_usable(self, expected: str) -> DataError:
        """Returns the error for data without a usable sample; the caller raises the error.

        Args:
            expected: What one sample should be, such as ``a picture with a caption``.
        """
        reason = f"{self.count} broken: {self.named()}" if self.problems else "the data set is empty"
        return DataError(
            f"{self.name}: expected at least one {expected}, got none; {reason}",
            "give another data set" + (", or repair the broken samples" if self.problems else ""),
        )

    @property
    def count(self) -> str:
        """Returns the number of broken samples with its verb, for messages: ``1 sample is``, ``3 samples are``."""
        return "1 sample is" if len(self.problems) == 1 else f"{len(self.problems)} samples are"

    def named(self) -> str:
        """Returns a text with the first three broken samples and their problems, for messages."""
        first = [f"{name} ({problem})" for name, problem in list(self.problems.items())[:_NAMED]]
        return ", ".join(first) + (", …" if len(self.problems) > _NAMED else "")


def missing_pictures(name: str, missing: Mapping[str, str], total: int, broken: BrokenSamples, limit: int) -> None:
    """Adds to the broken samples all samples whose picture file is missing.

    Args:
        name: The file that names the pictures, for messages.
        missing: The missing picture file of each such sample, by sample id.
        total: Number of all samples.
        broken: Collects the broken samples.
        limit: Largest number of missing pictures.

    Raises:
        DataError: More pictures are missing than the limit; the error names their number and the first three.
    """
    files = sorted(set(missing.values()))
    if len(missing) > limit:
        raise DataError(
            f"{name}: {len(missing)} of the {total} samples have no picture; {len(files)} files are missing:"
            f" {', '.join(files[:_NAMED])}" + (", …" if len(files) > _NAMED else ""),
            "set images to the pictures' directory, or raise max_broken (in the recipe's section of this data)",
        )
    for sample_id, file in missing.items():
        broken.add(sample_id, f"{file} is missing")


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture with all of its captions or questions.

    Attributes:
        image_id: Id of the picture.
        picture: The picture.
        entries: The captions or questions, in the order of the data.
    """

    image_id: str
    picture: StoredPicture
    entries: tuple[Entry, ...]

    @property
    def captions(self) -> list[str]:
        """Returns the texts of the picture's captions."""
        return [entry.text for entry in self.entries if entry.text]


def by_picture(entries: Iterable[Entry]) -> list[AnnotatedPicture]:
    """Groups entries by picture. Pictures are in the order of their first entries."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.image_id, []).append(entry)
    return [AnnotatedPicture(image_id, group[0].picture, tuple(group)) for image_id, group in groups.items()]


def opened_pictures(
    pictures: Sequence[tuple[str, StoredPicture]],
    broken: BrokenSamples,
    progress: Callable[[int, int], None],
    at_once: int,
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """Yields chunks of opened pictures, with the pictures' numbers.

    Args:
        pictures: The pictures, each with the id of its sample.
        broken: Pictures that cannot be opened are added.
        progress: Called with (pictures done, all pictures).
        at_once: Largest number of pictures in a chunk.

    Raises:
        DataError: No picture can be opened, or more samples are broken than allowed.
    """
    usable = 0
    for start in range(0, len(pictures), at_once):
        numbers, images = [], []
        for number, (name, picture) in enumerate(pictures[start : start + at_once], start):
            try:
                images.append(picture.open())
                numbers.append(number)
            except ImageError as error:
                broken.add(name, error.problem)
        usable += len(images)
        if images:
            yield numbers, images
        progress(min(start + at_once, len(pictures)), len(pictures))
    if not usable:
        raise broken.none_usable("picture that opens")


class RejectingSource(ABC):
    """Base of sample sources that skip samples which cannot be used.

    A source whose samples are all broken would be read for ever, pass after pass, if it has fewer samples than
    `max_broken` allows. So it raises an error after a whole pass without a usable sample.

    Args:
        broken: Collects the broken samples; rejected samples are added.
        pass_size: Number of samples of a pass; None if it is not known yet.
    """

    def __init__(self, broken: BrokenSamples, pass_size: int | None = None) -> None:
        self._broken = broken
        self._pass_size = pass_size
        self._rejected = 0  # in a row, without a usable sample between them

    @property
    def broken(self) -> Mapping[str, str]:
        """Returns the reasons why samples were skipped or rejected, by sample id."""
        return self._broken.problems

    def accept(self, sample: Sample) -> None:
        """Notes that a sample was used."""
        del sample
        self._rejected = 0

    def reject(self, sample: Sample, error: Blip2EdgeError) -> None:
        """Adds an unusable sample to the broken samples.

        Raises:
            DataError: More samples are broken than allowed, or a whole pass had no usable sample.
        """
        self._broken.add(sample.sample_id, error.problem)
        self._rejected += 1
        # Each pass has its own order: only 2 N - 1 samples in a row are sure to contain a whole pass of N samples.
        if self._pass_size is not None and self._rejected >= 2 * self._pass_size - 1:
            raise self._broken.none_usable("usable sample")

    def check_usable(self, use: Callable[[Sample], object]) -> None:
        """Checks that at least one sample can be used; the position stays (see `SampleSource.check_usable`)."""
        state, found = self.state_dict(), self._broken.empty()
        for number, sample in enumerate(self, 1):
            try:
                use(sample)
                break
            except UNUSABLE as error:
                found.add(sample.sample_id, error.problem)
            if self._pass_size is not None and number >= self._pass_size:
                raise found.none_usable("usable sample")
        self.load_state_dict(state)

    @abstractmethod
    def __iter__(self) -> Iterator[Sample]:
        """Yields the samples from the current position on, without end."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next sample."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the position that `state_dict` returned."""
