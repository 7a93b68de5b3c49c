"""Packed shards and those of an object store are copied once, within a limit, and read like local ones."""

from __future__ import annotations

import gzip
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from blip2edge.errors import DataError, ImageError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.detect import detect_data
from blip2edge.training.data.entries import BrokenSamples
from blip2edge.training.data.readers.copies import LocalCopies, remote_files
from blip2edge.training.data.registry import open_sample_source, read_entries
from blip2edge.training.data.shards import read_shard

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pack(shards: Path) -> list[Path]:
    for path in sorted(shards.glob("*.tar")):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return sorted(shards.iterdir())


def shown(path: str, base: Path) -> list[tuple[str, int]]:
    config, _ = detect_data(path, None, None, 0)
    assert config.kind == "shards"
    entries = read_entries(config, base=base)[0]
    return [(entry.text, int(np.asarray(entry.picture.open())[0, 0, 0])) for entry in entries]


def test_packed_shards(shards: Path, tmp_path: Path) -> None:
    plain = shown(str(shards), tmp_path)
    assert not (tmp_path / "cache").exists()
    first = pack(shards)[0]
    assert shown(str(shards), tmp_path) == plain == [(f"caption {number}", number * 20) for number in range(10)]
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 3
    assert shown(str(first), tmp_path) == plain[:4]
    source = open_sample_source(DataConfig(kind="shards", path=str(shards)), seed=0, base=tmp_path)
    samples = list(islice(source, 10))
    assert {sample.sample_id for sample in samples} >= {"000000.tar.gz:0000"}
    assert len({sample.image_id for sample in samples}) == 10


def test_a_packed_shard_that_is_cut_off(shards: Path, tmp_path: Path) -> None:
    path = pack(shards)[0]
    path.write_bytes(path.read_bytes()[:-60])
    broken = BrokenSamples("x", 9)
    read = LocalCopies(tmp_path / "copies", GIB).reader(read_shard)
    assert [entry.text for entry in read(path, broken, path.name)][:2] == ["caption 0", "caption 1"]
    assert "cannot be read further" in broken.problems["000000.tar.gz"]


def test_shards_of_an_object_store(shards: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe_file(f"/set/{path.name}", path.read_bytes())
    store.pipe_file("/set/readme.md", b"")
    address = "memory://set"
    assert [name.rpartition("/")[2] for name in remote_files(address, (".tar",))] == [
        "000000.tar", "000001.tar", "000002.tar"
    ]  # fmt: skip
    plain = [(f"caption {number}", number * 20) for number in range(10)]
    assert shown("memory://set/{000000..000002}.tar", tmp_path) == plain
    assert shown("memory://set/*.tar", tmp_path) == plain
    config = DataConfig(kind="shards", path=address)
    samples = list(islice(open_sample_source(config, seed=0, base=tmp_path), 10))
    assert sorted(sample.text for sample in samples) == [text for text, _ in plain]
    store.rm("/set", recursive=True)
    with pytest.raises(DataError, match="got none"):
        remote_files(address, (".tar",))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_entries(DataConfig(kind="shards", path="memory://set/{7..8}.tar"), base=tmp_path)[0])


def test_copies_stay_within_the_limit_and_are_made_again(shards: Path, tmp_path: Path) -> None:
    paths = pack(shards)
    size = max(len(gzip.decompress(path.read_bytes())) for path in paths)
    copies = LocalCopies(tmp_path / "copies", 2 * size)
    read = copies.reader(read_shard)
    entries = [entry for path in paths for entry in read(path, BrokenSamples("x", 0), path.name)]
    assert len(list(copies.directory.iterdir())) == 2
    pictures = [int(np.asarray(entry.picture.open())[0, 0, 0]) for entry in entries]
    assert pictures == [number * 20 for number in range(10)]
    shutil.rmtree(copies.directory)
    paths[0].write_bytes(gzip.compress(b"other" * 200))
    with pytest.raises(ImageError, match="was changed while it was read"):
        entries[0].picture.open()
    with pytest.raises(DataError, match="expected at most 100 bytes, got more"):
        LocalCopies(tmp_path / "small", 100).path(paths[1])
    assert list((tmp_path / "small").iterdir()) == []
