"""Reads a folder of pictures, each with its captions in a text file of the same name: `dog.jpg` and `dog.txt`.

A file of features (`dog.npy`, the output of the picture encoder) may take the place of a picture: it is read only if it
has a text, and there is no picture of its name. Other `.npy` files, such as embeddings beside pictures, are no samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blip2edge.errors import DataError
from blip2edge.picture_files import PICTURE_SUFFIXES, visible_files
from blip2edge.reading import read_text
from blip2edge.training.data.entries import BrokenSamples, Entry, FeatureFile, FilePicture, single_spaced

FEATURES = ".npy"
"""Suffix of a file with features in place of a picture."""


def captions_of(text: str) -> list[str]:
    """Splits the content of a text file into captions: each line is a caption; blank lines are skipped.

    Only the line feed ends a line. Other separators (U+2028, form feed) are white space within a caption.
    """
    return [single_spaced(line) for line in text.split("\n") if line.strip()]


def read_folder(directory: Path, max_broken: int) -> tuple[list[Entry], BrokenSamples]:
    """Reads pictures and captions of a folder and of all folders below it.

    Args:
        directory: The folder.
        max_broken: Largest number of pictures without a text and texts without a picture.

    Returns:
        An entry for each caption, ordered by file name, and the skipped samples.

    Raises:
        DataError: There is no such folder, it has no picture with a text, or more than `max_broken` samples are broken.
    """
    if not directory.is_dir():
        raise DataError(f"expected a folder of pictures and texts, but {directory} is not a folder")
    files, unreadable = visible_files(directory)
    texts = {path.with_suffix(""): path for path in files if path.suffix == ".txt"}
    pictures = _pictures(files, texts)
    broken = BrokenSamples(str(directory), max_broken)
    _add_unreadable(unreadable, directory, broken)
    entries = []
    for path in pictures:
        name = str(path.relative_to(directory))
        captions = _captions(texts.get(path.with_suffix("")), name, broken)
        entries += [
            Entry(f"{name}#{number}" if number else name, name, _stored(path), caption)
            for number, caption in enumerate(captions)
        ]
    lonely = texts.keys() - {path.with_suffix("") for path in pictures}
    for path in sorted(texts[stem] for stem in lonely):
        broken.add(str(path.relative_to(directory)), "there is no picture of this name")
    if not entries and texts.keys() & {path.with_suffix("") for path in pictures}:
        raise broken.none_usable("picture with a text in UTF-8")  # the reasons say which texts are empty or unreadable
    if not entries:
        raise DataError(
            f"{directory}: expected pictures with .txt files of the same name (dog.jpg and dog.txt), "
            f"got {len(pictures)} pictures and no text for them",
            "write the captions of each picture to a .txt file next to the picture, one caption per line",
        )
    return entries, broken


def _pictures(files: Sequence[Path], texts: Mapping[Path, Path]) -> list[Path]:
    """Returns the pictures among the files, and the features that take the place of one, in the order of the files."""
    shown = {path.with_suffix("") for path in files if path.suffix.lower() in PICTURE_SUFFIXES}
    replaced = texts.keys() - shown
    return [
        path
        for path in files
        if path.suffix.lower() in PICTURE_SUFFIXES
        or (path.suffix.lower() == FEATURES and path.with_suffix("") in replaced)
    ]


def _stored(path: Path) -> FilePicture:
    """Returns a file as a picture, or as features."""
    return FeatureFile(path) if path.suffix.lower() == FEATURES else FilePicture(path)


def read_pictures(directory: Path, broken: BrokenSamples) -> list[Entry]:
    """Returns an entry without text for each picture in a folder and its subfolders; none if there are .txt files.

    Subfolders that cannot be read are added to `broken`, if there are no .txt files.
    """
    files, unreadable = visible_files(directory)
    if any(path.suffix == ".txt" for path in files):
        return []
    _add_unreadable(unreadable, directory, broken)
    names = [(str(path.relative_to(directory)), path) for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    return [Entry(name, name, FilePicture(path)) for name, path in names]


def _add_unreadable(unreadable: Mapping[Path, str], directory: Path, broken: BrokenSamples) -> None:
    """Adds each folder that cannot be read to the broken samples, as one sample."""
    for path, problem in unreadable.items():
        broken.add(str(path.relative_to(directory)), problem)


def _captions(path: Path | None, picture: str, broken: BrokenSamples) -> list[str]:
    """Returns a picture's captions; without a readable text, adds the picture to `broken` and returns no caption."""
    if path is None:
        broken.add(picture, "it has no .txt file with captions")
        return []
    try:
        captions = captions_of(read_text(path, DataError))
    except DataError as error:
        broken.add(picture, f"its text cannot be read: {error.problem}")
        return []
    if not captions:
        broken.add(picture, "its text is empty")
    return captions
