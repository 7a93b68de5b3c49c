"""The choice of pictures for a calibration."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from blip2edge.calibration.pictures import choose_pictures
from blip2edge.errors import DataError
from blip2edge.limits import Limits


def draw(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        colour = (index * 20 % 256, 30, 90)
        PIL.Image.new("RGB", (8, 6), colour).save(folder / f"{index:03d}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw(tmp_path / "images", 9)
    return tmp_path / "images"


def test_all_are_taken_in_the_order_of_their_names(folder: Path) -> None:
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "more").mkdir()
    (folder / "000.png").rename(folder / "more" / "last.png")
    chosen = choose_pictures(folder)
    assert [picture.path.name for picture in chosen] == [f"{i:03d}.png" for i in range(1, 9)] + ["last.png"]


def test_fewer_are_spread_over_all_and_always_the_same(folder: Path) -> None:
    first, second = choose_pictures(folder, 3), choose_pictures(folder, 3)
    assert [picture.path.name for picture in first] == ["000.png", "003.png", "006.png"]
    assert first == second
    assert first.sha256 != choose_pictures(folder, 4).sha256


def test_a_shard_gives_what_the_folder_gives(folder: Path, tmp_path: Path) -> None:
    shard = tmp_path / "shards" / "000.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as archive:
        for path in sorted(folder.iterdir(), reverse=True):  # the order of a shard does not count
            archive.add(path, path.name)
            (tmp_path / "caption.txt").write_text("a caption")
            archive.add(tmp_path / "caption.txt", f"{path.stem}.txt")
    for source in (shard, shard.parent):
        chosen = choose_pictures(source)
        assert chosen.sha256 == choose_pictures(folder).sha256
        assert [picture.read() for picture in chosen] == [path.read_bytes() for path in sorted(folder.iterdir())]


def test_pictures_above_the_limits_are_skipped(folder: Path) -> None:
    PIL.Image.new("RGB", (9, 6)).save(folder / "wide.png")
    chosen = choose_pictures(folder, limits=Limits(side=8))
    assert chosen.skipped == (str(folder / "wide.png"),)
    assert len(chosen) == 9
    with pytest.raises(DataError, match="none of the 10 pictures can be read"):
        choose_pictures(folder, limits=Limits(pixels=5))


def test_a_change_of_a_picture_changes_the_hash(folder: Path) -> None:
    before = choose_pictures(folder).sha256
    PIL.Image.fromarray(np.full((6, 8, 3), 7, np.uint8)).save(folder / "004.png")
    assert choose_pictures(folder).sha256 != before


def test_a_broken_picture_is_left_out_by_name(folder: Path) -> None:
    content = (folder / "002.png").read_bytes()
    (folder / "002.png").write_bytes(content[: len(content) // 2])
    chosen = choose_pictures(folder)
    assert chosen.skipped == (str(folder / "002.png"),)
    assert len(chosen) == 8


def test_a_link_to_a_file_that_does_not_exist_is_left_out_by_name(folder: Path) -> None:
    (folder / "002.png").unlink()
    (folder / "002.png").symlink_to(folder / "gone.png")
    chosen = choose_pictures(folder)
    assert chosen.skipped == (str(folder / "002.png"),)
    assert len(chosen) == 8


def test_no_picture_is_an_error_that_says_what_to_give(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found none; give images a folder"):
        choose_pictures(tmp_path / "empty")
    with pytest.raises(DataError, match="found neither"):
        choose_pictures(tmp_path / "absent")
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 9 pictures can be read"):
        choose_pictures(folder)


def test_a_broken_shard_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        choose_pictures(tmp_path)
