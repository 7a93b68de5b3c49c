"""Hostile files: small files that ask for much memory, and files with paths outside their directory.

Each is read, or refused with a declared error, within a limit on memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2edge.bundle.safetensors_file import SafetensorsFile
from blip2edge.errors import Blip2EdgeError, BundleError, CheckpointError, DataError, ImageError
from blip2edge.runtime.images.preprocess import load_image

MOST = 300 << 20  # bytes that a file of a few kB may cost


def peak() -> int:
    """The peak of this process's resident memory in bytes, since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """The peak of the process's memory hardly moves."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which earlier tests may have raised
    except OSError:
        pytest.skip("the peak of memory cannot be reset here")
    before = peak()
    yield
    grown = peak() - before
    assert grown < MOST, f"{grown >> 20} MiB"


# Shards


def shard(path: Path, change: Callable[[tarfile.TarInfo], Any], *, form: int = tarfile.GNU_FORMAT) -> Path:
    """A good sample, a hostile member and another good sample."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with tarfile.open(path, "w", format=form) as archive:
        for name, body in (("0.png", buffer.getvalue()), ("0.txt", b"a dog")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        hostile = tarfile.TarInfo("1.png")
        change(hostile)
        archive.addfile(hostile, io.BytesIO(b"x" * min(hostile.size, 512)) if hostile.size < 512 else None)
        for name, body in (("1.txt", b"a hostile one"), ("2.png", buffer.getvalue()), ("2.txt", b"a cat")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def read(path: Path) -> tuple[list[str], dict[str, str]]:
    """The captions of a shard and its broken samples."""
    pytest.importorskip("torch", reason="training data is read with it")
    from blip2edge.training.data.entries import BrokenSamples
    from blip2edge.training.data.shards import read_shard

    broken = BrokenSamples("shard", 100)
    return [entry.text for entry in read_shard(path, broken)], broken.problems


def sparse_header(path: Path, size: int) -> Path:
    """The hostile member's header: a GNU sparse file of ``size`` bytes, of which none is stored."""
    data = bytearray(shard(path, lambda info: None).read_bytes())
    at = data.index(b"1.png\0")
    header = data[at : at + 512]
    header[156:157] = b"S"
    header[257:265] = b"ustar  \0"
    header[386:482] = bytes(96)
    header[482] = 0
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [1 << 20, 1 << 60])
def test_a_sparse_member_is_one_broken_sample(size: int, tmp_path: Path) -> None:
    captions, broken = read(sparse_header(tmp_path / "s.tar", size))
    assert captions == ["a dog", "a cat"]
    assert broken == {"s.tar:1": "its picture is a sparse file"}


def test_a_member_larger_than_the_shard_ends_it_without_memory(tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.size = 1 << 60

    captions, broken = read(shard(tmp_path / "s.tar", change))
    assert captions[0] == "a dog"
    assert "cannot be read further" in broken["s.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_no_pictures(kind: bytes, tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, "/etc/passwd"

    captions, broken = read(shard(tmp_path / "s.tar", change))
    assert captions == ["a dog", "a cat"]
    assert broken == {"s.tar:1": "there is no picture"}


@pytest.mark.parametrize("name", ["../../1.png", "/etc/1.png", "a\n1.png"])
def test_a_name_that_leads_outside_is_a_name(name: str, tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.name = name

    captions, broken = read(shard(tmp_path / "s.tar", change))
    assert captions == ["a dog", "a cat"]
    assert len(broken) == 2  # a picture without a text, and a text without a picture
    assert not (tmp_path.parent / "1.png").exists()


@pytest.mark.parametrize("records", [{"size": str(1 << 60)}, {"size": "-512"}])
def test_pax_records_that_lie_about_the_size(records: dict[str, str], tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.pax_headers = records

    _, broken = read(shard(tmp_path / "s.tar", change, form=tarfile.PAX_FORMAT))
    assert "cannot be read further" in broken["s.tar"]


def test_pax_records_of_a_picture_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training data is read with it")
    from blip2edge.training.data.entries import BrokenSamples
    from blip2edge.training.data.shards import read_shard

    def change(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"GNU.sparse.realsize": str(1 << 60)}

    path = shard(tmp_path / "s.tar", change, form=tarfile.PAX_FORMAT)
    good, hostile, last = read_shard(path, BrokenSamples("s", 0))
    assert good.picture.open().size == last.picture.open().size == (4, 4)
    with pytest.raises(ImageError, match="is cut off: expected 1152921504606846976 bytes"):
        hostile.picture.open()


def test_a_large_pax_header_is_not_read(tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"comment": "x" * (2 << 20)}

    _, broken = read(shard(tmp_path / "s.tar", change, form=tarfile.PAX_FORMAT))
    assert "a header gives the impossible size of" in broken["s.tar"]


def test_a_damaged_header_in_the_middle_is_told(tmp_path: Path) -> None:
    """tarfile takes it for the end of the archive, and says nothing."""
    path = shard(tmp_path / "s.tar", lambda info: None)
    data = path.read_bytes()
    at = data.index(b"2.png\0")
    path.write_bytes(data[:at] + b"?" + data[at + 1 :])
    _, broken = read(path)
    assert f"the header at byte {at} is damaged" in broken["s.tar"]


# Tensors


def safetensors(path: Path, header: bytes, body: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + body)
    return path


ENTRY = '"dtype":"I8","shape":[4],"data_offsets":'
HEADERS = {
    "too long": (b"{}", 1 << 63, "the header has 9223372036854775808 bytes"),
    "double": (f'{{"a":{{{ENTRY}[0,4]}},"a":{{{ENTRY}[0,4]}}}}'.encode(), None, "the key 'a' is given twice"),
    "overlapping": (f'{{"a":{{{ENTRY}[0,4]}},"b":{{{ENTRY}[2,6]}}}}'.encode(), None, "'b' overlaps"),
    "outside": (f'{{"a":{{{ENTRY}[6,10]}}}}'.encode(), None, "'a' ends at byte"),
    "backwards": (f'{{"a":{{{ENTRY}[4,0]}}}}'.encode(), None, "expected 4 bytes"),
    "huge": (b'{"a":{"dtype":"I8","shape":[1099511627776,1099511627776],"data_offsets":[0,8]}}', None, "got 8"),
    "wraps": (b'{"a":{"dtype":"I8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}', None, "got 0"),
    "no integers": (b'{"a":{"dtype":"I8","shape":[true,4.0],"data_offsets":[0,4]}}', None, r"a.shape\[0\]: expected"),
    "deep": (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", None, "nested too deeply"),
    "no text": (b'{"a":"\\ud800"}', None, "surrogates not allowed"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(name: str, tmp_path: Path) -> None:
    header, length, told = HEADERS[name]
    path = safetensors(tmp_path / "t.safetensors", header, bytes(8), length)
    with pytest.raises(BundleError, match=told):
        SafetensorsFile(path)


def test_a_compressed_pth_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the file is written with it")
    from blip2edge.model.checkpoint.stored.pickled import read_pickled

    torch.save({"model": {"a": torch.zeros(4)}}, tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, bytes(64 << 20) if "data/" in name else body)
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save does not do"):
        read_pickled(tmp_path / "bomb.pth")


def test_an_npz_that_inflates_to_gigabytes(tmp_path: Path) -> None:
    from blip2edge.calibration.activations.cache import load_observations

    buffer = io.BytesIO()
    np.savez(buffer, names=np.frombuffer(b'["norm"]', np.uint8))
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("0.counts.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
        for _ in range(20):
            file.write(bytes(1 << 20))
    import hashlib

    body = buffer.getvalue()
    path = tmp_path / "cache.npz"
    path.write_bytes(body + hashlib.sha256(body).digest())
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"0\.counts\.npy' of shape \(1099511627776,\) needs more than its"):
        load_observations(path, ["norm"])


# Graphs


def onnx_graph(**changes: Any) -> bytes:
    onnx = pytest.importorskip("onnx", reason="the graph is made with it")
    pytest.importorskip("onnx_ir", reason="graphs are loaded with it")
    tensor = onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    if "dims" in changes:
        tensor.dims[:] = changes["dims"]
    if "external" in changes:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in changes["external"].items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    helper = onnx.helper
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [tensor])
    return bytes(helper.make_model(graph).SerializeToString())


GRAPHS: dict[str, tuple[dict[str, Any], str]] = {
    "many values": ({"dims": [1 << 40]}, "too many"),
    "overflowing": ({"dims": [1 << 40, 1 << 40, 1 << 40]}, "too many"),
    "fewer values": ({"dims": [5, 3]}, "cannot be read as an ONNX graph"),
    "outside": ({"external": {"location": "../secret"}}, "in a file of its directory, got '../secret'"),
    "absolute": ({"external": {"location": "/etc/passwd"}}, "in a file of its directory, got '/etc/passwd'"),
    "no file": ({"external": {"location": "nothing.data"}}, "No such file"),
    "short": ({"external": {"location": "w.data", "offset": "8"}}, "is not whole in w.data"),
    "far": ({"external": {"location": "w.data", "offset": str(1 << 60)}}, "is not whole in w.data"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_whose_weights_are_not_where_they_say(name: str, tmp_path: Path) -> None:
    changes, told = GRAPHS[name]
    (tmp_path / "model.onnx").write_bytes(onnx_graph(**changes))
    (tmp_path / "w.data").write_bytes(bytes(48))
    from blip2edge.graph_files import load_graph

    with pytest.raises(BundleError, match=told):
        load_graph(tmp_path / "model.onnx")


def test_a_graph_that_is_whole(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_graph(external={"location": "w.data"}))
    (tmp_path / "w.data").write_bytes(bytes(48))
    from blip2edge.graph_files import load_graph

    assert load_graph(tmp_path / "model.onnx").graph.initializers["w"].shape == [4, 3]


# Pictures


def png(*chunks: tuple[bytes, bytes], side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "PNG")
    content = buffer.getvalue()
    extra = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return content[:33] + extra + content[33:]


BOMB = zlib.compress(bytes(200 << 20), 9)
PNGS = {
    "a profile": png((b"iCCP", b"x\0\0" + BOMB)),
    "a text": png((b"zTXt", b"x\0\0" + BOMB)),
    "many texts": png(*[(b"zTXt", b"x\0\0" + BOMB[: len(BOMB) // 2])] * 40),
    "frames": png((b"acTL", struct.pack(">II", 1_000_000, 0))),
}


@pytest.mark.parametrize("name", PNGS)
def test_a_png_that_inflates(name: str) -> None:
    with contextlib.suppress(ImageError):  # some versions of Pillow refuse it
        assert load_image(PNGS[name]).size == (8, 8)


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP"])
def test_a_picture_of_many_frames_is_its_first_one(form: str) -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(200)]
    frames[0].save(
        buffer, form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert load_image(buffer.getvalue()).size == (8, 8)


def test_a_gif_of_a_million_frames() -> None:
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF")
    content = buffer.getvalue()
    start = content.index(b",")
    assert load_image(content[:start] + content[start:-1] * 1_000_000 + b";").size == (1, 1)


def test_a_tiff_whose_directories_are_a_ring() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "TIFF")
    content = bytearray(buffer.getvalue())
    first = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[first : first + 2], "little")
    link = first + 2 + 12 * count
    content[link : link + 4] = first.to_bytes(4, "little")
    assert load_image(bytes(content)).size == (8, 8)


# JSON


@pytest.mark.parametrize("nested", ["[" * 100_000, '{"a":' * 100_000, "[" * 150 + "]" * 150])
def test_json_that_is_nested(nested: str, tmp_path: Path) -> None:
    from blip2edge.bundle.manifest import read_manifest

    (tmp_path / "bundle.json").write_text('{"schema_version": 1, "family": ' + nested + "}")
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        read_manifest(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    from blip2edge.reading import MANIFEST_BYTES, read_json

    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(8 << 40)
    with pytest.raises(DataError, match=f"expected at most {MANIFEST_BYTES} bytes"):
        read_json(path, DataError)


@pytest.mark.parametrize(
    "text", ["1" * 5000, "1e999999", '"' + "x" * 100_000 + '"', "NaN", "-Infinity", "true", "-1", "0"]
)
def test_values_of_a_key(text: str, tmp_path: Path) -> None:
    from blip2edge.bundle.manifest import read_manifest

    (tmp_path / "bundle.json").write_text(json.dumps({"schema_version": "HERE"}).replace('"HERE"', text))
    with pytest.raises(Blip2EdgeError) as caught:
        read_manifest(tmp_path)
    assert len(str(caught.value)) < 500
