"""A subfolder that cannot be read is named by every command that searches a folder of pictures."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="calibration reads graphs")

from blip2edge.bulk.sources import PictureSource
from blip2edge.calibration.advice import picture_warnings
from blip2edge.calibration.pictures import choose_pictures
from blip2edge.cli import picture_arguments
from blip2edge.errors import DataError, ImageError
from blip2edge.picture_files import visible_files
from blip2edge.runtime.images.video import load_frames
from blip2edge.training.data.entries import BrokenSamples
from blip2edge.training.data.folder import read_folder, read_pictures
from tests.drawing import draw_pictures

DENIED = os.strerror(errno.EACCES)
TOLD = f"the folder cannot be read ({DENIED})"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two pictures with texts, and the subfolder ``more/closed`` that the system does not list (also not for root)."""
    root = tmp_path / "pictures"
    (root / "more" / "closed").mkdir(parents=True)
    for name, picture in zip(("a", "more/b"), draw_pictures(2), strict=True):
        picture.save(root / f"{name}.png")
        (root / f"{name}.txt").write_text("a picture\n", encoding="utf-8")
    scandir, listdir = os.scandir, os.listdir

    def refuse(path: Any) -> None:
        if os.fspath(path).rstrip("/").endswith("closed"):
            raise PermissionError(errno.EACCES, DENIED, str(path))

    def scan(path: Any = ".") -> Any:
        refuse(path)
        return scandir(path)

    def names(path: Any = ".") -> Any:
        refuse(path)
        return listdir(path)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(os, "listdir", names)
    yield root
    monkeypatch.undo()
    shutil.rmtree(root)


def test_the_listing(folder: Path) -> None:
    files, unreadable = visible_files(folder)
    assert [path.name for path in files] == ["a.png", "a.txt", "b.png", "b.txt"]
    assert unreadable == {folder / "more" / "closed": TOLD}
    assert visible_files(folder / "more" / "closed") == ([], {folder / "more" / "closed": TOLD})


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("", ["a.png", "b.png"]),
        ("more", ["b.png"]),
        ("more/closed", []),
        ("**/*.png", ["a.png", "b.png"]),
        ("more/*/*.png", []),
        ("more/closed/*.png", []),
        ("*/clos*/x/*.png", []),
    ],
)
def test_words_of_the_command_line(word: str, found: list[str], folder: Path) -> None:
    pictures = picture_arguments.find_pictures([str(folder / word)])
    assert [Path(picture.name).name for picture in pictures if picture.problem is None] == found
    (problem,) = [picture.problem for picture in pictures if picture.problem is not None]
    assert str(problem) == f"{folder}/more/closed: {TOLD}; check the folder's permissions"


def test_a_pattern_that_does_not_reach_the_folder(folder: Path) -> None:
    (picture,) = picture_arguments.find_pictures([f"{folder}/*.png"])
    assert picture.problem is None


def test_training_and_evaluation(folder: Path) -> None:
    entries, broken = read_folder(folder, 1)
    assert len(entries) == 2
    assert broken.problems == {"more/closed": TOLD}
    with pytest.raises(DataError, match=r"1 sample is broken, and max_broken allows 0: more/closed"):
        read_folder(folder, 0)
    for text in folder.rglob("*.txt"):
        text.unlink()
    bare = BrokenSamples("pictures", 1)
    assert len(read_pictures(folder, bare)) == 2
    assert bare.problems == {"more/closed": TOLD}


def test_calibration(folder: Path) -> None:
    pictures = choose_pictures(folder)
    assert len(pictures) == 2
    assert f"{folder}/more/closed: {TOLD}; its pictures are left out" in picture_warnings(pictures)
    with pytest.raises(DataError, match=r"found none; .*/closed: the folder cannot be read"):
        choose_pictures(folder / "more" / "closed")


def test_bulk_ends_with_the_name_of_the_folder(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"more/closed cannot be read \({DENIED}\)"):
        list(PictureSource(str(folder)).items())


def test_the_frames_of_a_video(folder: Path) -> None:
    with pytest.raises(ImageError, match=rf"more/closed cannot be read \({DENIED}\)"):
        load_frames(folder / "more" / "closed", 2)
