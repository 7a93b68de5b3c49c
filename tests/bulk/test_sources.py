"""Lists of pictures: folders, shards, tables, object stores, and what is wrong with them."""

from __future__ import annotations

import errno
import gc
import io
import shutil
import socket
import tarfile
import urllib.error
from email.message import Message
from pathlib import Path

import pytest
from PIL import Image

from blip2edge.bulk.listed import BROKEN, CELL, FILE, WEB, ListedPicture
from blip2edge.bulk.read_errors import ATTEMPTS, StorageError
from blip2edge.bulk.sources import PictureSource
from blip2edge.errors import DataError, ImageError, MissingPackageError, UsageError


def png(colour: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(content, "PNG")
    return content.getvalue()


def shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for number, name in enumerate(("b.png", "a/z.png", "a.png", "a/b/c.jpg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    for name in (".hidden.png", "notes.txt"):
        (root / name).write_bytes(b"x")
    return root


def names(source: PictureSource) -> list[str]:
    return [item.image for item in source.items()]


def test_a_folder_is_sorted_by_the_parts_of_its_paths(folder: Path) -> None:
    items = list(PictureSource(str(folder)).items())
    assert [item.image for item in items] == ["a/b/c.jpg", "a/z.png", "a.png", "b.png"]
    assert [item.read() for item in items] == [png(3), png(1), png(2), png(0)]
    assert [ListedPicture.from_json(item.to_json()) for item in items] == items
    (folder / "b.png").write_bytes(png(9) + b"more")
    assert list(PictureSource(str(folder)).items()) != items  # its version is another one


def test_a_link_to_a_file_that_does_not_exist_is_a_broken_picture(folder: Path) -> None:
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(folder / "gone.png")
    items = list(PictureSource(str(folder)).items())
    assert [item.image for item in items] == ["a/b/c.jpg", "a/z.png", "a.png", "b.png"]
    with pytest.raises(ImageError, match=r"a\.png cannot be read \(No such file"):
        items[2].read()
    (folder / "gone.png").write_bytes(png(2))
    assert list(PictureSource(str(folder)).items())[2] != items[2]  # its version is another one


def test_shards_give_their_pictures_and_say_where_they_are_cut(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {"x.png": png(1), "x.txt": b"words", "d/.y.png": b"", "d/y.jpg": png(2)})
    shard(tmp_path / "1.tar", {"x.png": png(3), "z.png": b"0" * 5000})
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:3000])
    items = list(PictureSource(str(tmp_path)).items())
    assert [item.image for item in items] == ["0.tar:x.png", "0.tar:d/y.jpg", "1.tar:x.png", "1.tar:z.png", "1.tar"]
    assert [item.read() for item in items[:3]] == [png(1), png(2), png(3)]
    for item, reason in zip(items[3:], ("is cut off", "cannot be read further"), strict=True):
        with pytest.raises(ImageError, match=reason):
            item.read()
    assert names(PictureSource(str(tmp_path / "{0..1}.tar"))) == [item.image for item in items]
    with pytest.raises(DataError, match=r"2\.tar: no such file \(1 of 3 are missing\)"):
        names(PictureSource(str(tmp_path / "{0..2}.tar")))


def test_a_table_of_paths_may_name_anything(folder: Path) -> None:
    table = folder / "list.csv"
    table.write_text(f"id,path\n1,a.png\n2,\n3,{folder}/b.png\n4,https://localhost/x.png\n5,missing.png\n6\n")
    items = list(PictureSource(str(table)).items())
    assert [item.kind for item in items] == ["file", "broken", "file", "web", "file", "broken"]
    assert [items[0].read(), items[2].read()] == [png(2), png(0)]
    with pytest.raises(ImageError, match="names no picture"):
        items[1].read()
    with pytest.raises(ImageError, match="No such file"):
        items[4].read()
    assert names(PictureSource(str(table), column="id"))[0] == "1"
    with pytest.raises(DataError, match="expected a column url, got id, path; name it with column"):
        names(PictureSource(str(table), column="url"))
    with pytest.raises(UsageError, match="expected column with a table"):
        names(PictureSource(str(folder), column="url"))


def test_a_table_in_parquet_has_bytes_or_paths(folder: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [png(5), None, png(6)]
    parquet.write_table(arrow.table({"image": values}), folder / "bytes.parquet", row_group_size=2)
    nested = [{"bytes": value, "path": None} for value in values]
    parquet.write_table(arrow.table({"image": nested}), folder / "nested.parquet")
    parquet.write_table(arrow.table({"file_name": ["a.png"]}), folder / "paths.parquet")
    for name in ("bytes", "nested"):
        items = list(PictureSource(str(folder / f"{name}.parquet")).items())
        assert [item.image for item in items] == [f"{name}.parquet#{number}" for number in range(3)]
        assert [items[0].read(), items[2].read()] == [png(5), png(6)]
        with pytest.raises(ImageError, match="has no bytes"):
            items[1].read()
    assert [item.read() for item in PictureSource(str(folder / "paths.parquet")).items()] == [png(2)]
    parquet.write_table(arrow.table({"path": arrow.array(["a.png"]).dictionary_encode()}), folder / "few.parquet")
    assert [item.read() for item in PictureSource(str(folder / "few.parquet")).items()] == [png(2)]
    parquet.write_table(arrow.table({"image": [1, 2]}), folder / "numbers.parquet")
    with pytest.raises(DataError, match=r"the column image to hold paths, addresses or bytes, got int64; .*column"):
        names(PictureSource(str(folder / "numbers.parquet")))
    (folder / "bytes.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="cannot be read as a Parquet file"):
        names(PictureSource(str(folder / "bytes.parquet")))


def test_an_object_store_is_read_as_the_disk_is(folder: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe_file(f"/bulk/pictures/{path.relative_to(folder)}", path.read_bytes())
    shard(folder / "s.tar", {"x.png": png(1)})
    store.pipe_file("/bulk/s.tar", (folder / "s.tar").read_bytes())
    store.pipe_file("/bulk/list.csv", b"path\npictures/a.png\n")
    there = list(PictureSource("memory://bulk/pictures").items())
    assert [(item.image, item.read()) for item in there] == [
        (item.image, item.read()) for item in PictureSource(str(folder), "folder").items()
    ]
    assert [item.read() for item in PictureSource("memory://bulk/s.tar").items()] == [png(1)]
    assert [item.read() for item in PictureSource("memory://bulk/list.csv").items()] == [png(2)]
    store.rm("/bulk", recursive=True)


@pytest.mark.parametrize("stray", ["x.tar", "x.parquet"])
def test_a_folder_of_two_kinds_needs_the_kind(folder: Path, stray: str) -> None:
    shard(folder / stray, {"x.png": png(1)})
    for name in ("a.png", "b.png"):  # then pictures are in subfolders only
        with pytest.raises(
            DataError, match=r"expected one kind of source in .*, got .* and folder; name .*source_format"
        ):
            names(PictureSource(str(folder)))
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"got .* and folder"):
        names(PictureSource(str(folder)))
    assert names(PictureSource(str(folder), "folder")) == ["a/b/c.jpg", "a/z.png"]


def test_an_output_in_its_source_is_no_part_of_it(folder: Path) -> None:
    """The same command after the end of a run finds the same source."""
    before = names(PictureSource(str(folder)))
    for name in ("out.tar", "out.parquet"):
        shard(folder / name, {"x.png": png(1)})
        assert names(PictureSource(str(folder), leave_out=folder / name)) == before
        (folder / name).unlink()
    for one in folder.iterdir():
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    for name in ("a.tar", "out.tar"):
        shard(folder / name, {"x.png": png(1)})
    assert names(PictureSource(str(folder), leave_out=folder / "out.tar")) == ["a.tar:x.png"]


NO_STORES = (
    "ftp://h/y.png", "github://a/b", "webhdfs://h/x", "reference://x", "dir://x", "zip://x::y", "tar://x", "generic://a",
    "filecache://x", "simplecache://x", "blockcache://x", "asyncwrapper://x", "nowhere://x/y.png",
)  # fmt: skip


@pytest.mark.filterwarnings("error")  # also pytest's own for an exception in __del__
def test_addresses_that_are_no_store_are_broken_rows(folder: Path) -> None:
    pytest.importorskip("fsspec")
    table = folder / "list.csv"
    table.write_text("\n".join(("path", "a.png", *NO_STORES)))
    first, *others = PictureSource(str(table)).items()
    assert first.read() == png(2)
    assert [item.image for item in others] == list(NO_STORES)
    for item in others:
        protocol = item.image.partition(":")[0]
        for one in (item, ListedPicture("x", FILE, (item.image,))):
            with pytest.raises(ImageError, match=rf"{protocol}:// is no (protocol of an )?object store that"):
                one.read()
        with pytest.raises(DataError, match=rf"^{protocol}:// is no (protocol of an )?object store that .*; "):
            names(PictureSource(item.image))
        gc.collect()
    assert "(it also needs host); copy the files" in refused("ftp://h/pictures")
    assert "(it reads files inside another file or store); copy the files" in refused("zip://x")


def test_addresses_of_folders_and_of_nothing_are_broken_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/kept/x.png", png(1))
    (folder / "list.csv").write_text("path\nmemory://\nhf:///\nmemory://kept\ndata://x\n")
    nothing, other, kept, data = PictureSource(str(folder / "list.csv")).items()
    assert [nothing.kind, other.kind] == [BROKEN, BROKEN]
    assert other.place == ("hf:///: the address names no file",)
    for item in (kept, data):
        assert attempts_to_read(item, ImageError, monkeypatch) == 1


def refused(path: str) -> str:
    with pytest.raises(DataError) as raised:
        names(PictureSource(path))
    return str(raised.value)


def test_a_package_for_an_address_in_a_table_is_named_before_any_picture_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")

    def missing(protocol: str) -> None:
        raise ImportError(f"Install the package of {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    (folder / "list.csv").write_text("path\na.png\nfar://b/x.png\n")
    with pytest.raises(MissingPackageError, match=r"far:// cannot be read \(Install the package of far\); install"):
        names(PictureSource(str(folder / "list.csv")))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("t.csv", "path;x\na.png;1\n", "got path;x: the separator seems to be ';'; write the table with a comma"),
        ("t.csv", "path\tx\na.png\t1\n", r"the separator seems to be '\\t'; write the table with a comma"),
        ("t.tsv", "path,x\na.png,1\n", "the separator seems to be ','; write the table with a tab"),
        ("t.csv", "name;x,y\n", "expected one of the columns image, .*, got name;x, y; name it with column"),
        ("t.csv", "", "expected a first line with the names of the columns, got an empty file; write"),
        ("t.csv", "\npath\na.png\n", "expected a first line with the names of the columns, got an empty line; write"),
    ],
)
def test_the_first_line_of_a_table(name: str, text: str, problem: str, folder: Path) -> None:
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=problem):
        names(PictureSource(str(folder / name)))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, problem in (
        (str(tmp_path / "nothing"), "which does not exist"),
        (str(tmp_path / "one.jpg"), "which is one picture; give the folder"),
        (str(tmp_path / "*.jpg"), "which is a pattern; give the folder"),
        (str(tmp_path), "expected at least one picture, got none"),
        (str(tmp_path / "x.tar"), "no such file"),
        (str(tmp_path / "p-{002..000}.tar"), r"to the larger one, got \{002\.\.000\}; write \{000\.\.002\}"),
    ):
        with pytest.raises(DataError, match=problem):
            names(PictureSource(path))
    with pytest.raises(DataError, match="nowhere:// is no protocol of an object store that fsspec knows"):
        names(PictureSource("nowhere://bucket"))
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    for path in ("gs://bucket/pictures", str(tmp_path / "x.parquet")):
        with pytest.raises(MissingPackageError, match=r"pip install 'blip2edge\[bulk\]'"):
            names(PictureSource(path))


def attempts_to_read(item: ListedPicture, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> int:
    """Reads a picture that cannot be read; returns the number of attempts."""
    pauses: list[float] = []
    monkeypatch.setattr("blip2edge.bulk.read_errors.time.sleep", pauses.append)
    with pytest.raises(error) as raised:
        item.read()
    assert type(raised.value) is error
    return len(pauses) + 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (OSError(errno.EIO, "Input/output error"), StorageError),
        (OSError(errno.ESTALE, "Stale file handle"), StorageError),
        (OSError(errno.EMFILE, "Too many open files"), StorageError),
        (PermissionError("the credentials are expired"), StorageError),
        (TimeoutError(), StorageError),
        (RuntimeError("an error of the client"), StorageError),
        (FileNotFoundError("NoSuchKey"), ImageError),
        (AttributeError("'NoneType' object has no attribute 'get': the session is closed"), StorageError),
        (TypeError("'NoneType' object is not subscriptable: the answer is cut off"), StorageError),
        (RecursionError(), StorageError),
        (ValueError("the file is cut off"), ImageError),
    ],
)
def test_a_storage_that_fails_is_no_broken_picture(
    fault: Exception, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("pyarrow")

    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("blip2edge.reading.open_file", fail)
    monkeypatch.setattr(fsspec.filesystem("memory"), "cat_file", fail)
    monkeypatch.setattr(fsspec.filesystem("memory"), "info", lambda _: {"size": 5, "type": "file"})
    monkeypatch.setattr(fsspec.filesystem("memory"), "open", fail)
    for item in (
        ListedPicture("x", FILE, ("x.png",)),
        ListedPicture("x", FILE, ("memory://x.png",)),
        ListedPicture("x", CELL, ("memory://x.parquet", 0, 0, "image")),
    ):
        assert attempts_to_read(item, error, monkeypatch) == (ATTEMPTS if error is StorageError else 1)


@pytest.mark.parametrize(("path", "error"), [("x.png", ImageError), ("memory://x.png", StorageError)])
def test_a_file_without_permission(path: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the disk it is the file's own; an object store answers so if credentials are expired."""
    fsspec = pytest.importorskip("fsspec")

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("blip2edge.reading.open_file", fail)
    monkeypatch.setattr(fsspec.filesystem("memory"), "cat_file", fail)
    monkeypatch.setattr(fsspec.filesystem("memory"), "info", lambda _: {"size": 5, "type": "file"})
    monkeypatch.setattr(fsspec.filesystem("memory"), "open", fail)
    attempts_to_read(ListedPicture("x", FILE, (path,)), error, monkeypatch)


def test_a_damaged_table_is_a_broken_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table({"image": [png(1) * 99]}), path)
    content = bytearray(path.read_bytes())
    content[4:80] = b"\xff" * 76
    path.write_bytes(content)
    assert attempts_to_read(ListedPicture("x", CELL, (str(path), 0, 0, "image")), ImageError, monkeypatch) == 1
    assert attempts_to_read(ListedPicture("x", FILE, ("nowhere://x/y.png",)), ImageError, monkeypatch) == 1


@pytest.mark.parametrize(
    ("fault", "attempts"),
    [
        (404, 1),
        (429, ATTEMPTS),
        (503, ATTEMPTS),
        (urllib.error.URLError(TimeoutError("timed out")), ATTEMPTS),
        (urllib.error.URLError(ConnectionRefusedError(111, "refused")), ATTEMPTS),
        (urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "unknown")), 1),
        (urllib.error.URLError("the server redirects to file:///x"), 1),
        (ValueError("no address"), 1),
        (ConnectionResetError(), ATTEMPTS),
    ],
)
def test_only_passing_web_errors_are_tried_again(
    fault: Exception | int, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise urllib.error.HTTPError("x", fault, "", Message(), None) if isinstance(fault, int) else fault

    monkeypatch.setattr("urllib.request.OpenerDirector.open", fail)
    assert attempts_to_read(ListedPicture("x", WEB, ("https://localhost/x.png",)), ImageError, monkeypatch) == attempts
