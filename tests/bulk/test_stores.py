"""Object stores that cannot be opened, or do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2edge.bulk import stores
from blip2edge.bulk.listed import BROKEN, FILE, ListedPicture
from blip2edge.bulk.read_errors import ATTEMPTS, StorageError
from blip2edge.bulk.sources import PictureSource

fsspec = pytest.importorskip("fsspec")


class NameNode:
    """A file system of fsspec that connects when it is made, as Hadoop's. The first ``failures`` attempts fail."""

    protocol, failures, tried = "down", 0, 0

    def __init__(self) -> None:
        NameNode.tried += 1
        if NameNode.tried <= NameNode.failures:
            raise ValueError("the namenode does not answer")

    def info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "size": 3, "type": "file"}

    def cat_file(self, *_: object, **__: object) -> bytes:
        return b"abc"


@pytest.fixture
def name_node(monkeypatch: pytest.MonkeyPatch) -> type[NameNode]:
    fsspec.register_implementation("down", NameNode, clobber=True)
    stores._remote.cache_clear()
    monkeypatch.setattr(NameNode, "tried", 0)
    monkeypatch.setattr("blip2edge.bulk.read_errors.time.sleep", lambda _: None)
    return NameNode


def test_a_store_whose_server_is_down_ends_the_run(
    tmp_path: Path, name_node: type[NameNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pictures are no broken rows, neither in the list nor when they are read."""
    table = tmp_path / "list.csv"
    table.write_text("path\ndown://x/y.png\n")
    monkeypatch.setattr(name_node, "failures", 2 * ATTEMPTS)
    down = r"^down:// cannot be opened \(the namenode does not answer\); make the storage readable"
    for number, read in enumerate(
        (lambda: list(PictureSource(str(table)).items()), ListedPicture("x", FILE, ("down://x/y.png",)).read), start=1
    ):
        with pytest.raises(StorageError, match=down):
            read()
        assert name_node.tried == number * ATTEMPTS
    picture = next(PictureSource(str(table)).items())
    assert (picture.read(), name_node.tried) == (b"abc", 2 * ATTEMPTS + 1)


def test_a_refused_protocol_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores._remote.cache_clear()
    looked_up: list[str] = []

    def unknown(protocol: str) -> None:
        looked_up.append(protocol)
        raise ValueError(f"Protocol not known: {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", unknown)
    (tmp_path / "list.csv").write_text("path\nother://b/x.png\nother://b/y.png\n")
    assert [item.kind for item in PictureSource(str(tmp_path / "list.csv")).items()] == [BROKEN, BROKEN]
    assert looked_up == ["other"]
