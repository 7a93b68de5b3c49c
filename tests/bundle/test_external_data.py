"""The external data of a graph is found without the package onnx, and must be a listed file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="graphs are written with onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper

from blip2edge.bundle.trust.external_data import external_locations
from blip2edge.bundle.trust.integrity import CheckedFiles, FileRecord, Listing
from blip2edge.errors import BundleIntegrityError


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def every_place() -> onnx.ModelProto:
    """A model with external data in every place where ONNX allows a tensor."""
    constant = helper.make_node("Constant", [], ["c"], value=external("c", "constant"))
    many = helper.make_node("Custom", [], ["m"], domain="x")
    many.attribute.append(helper.make_attribute("several", [external("a", "first"), external("b", "second")]))
    inner = helper.make_graph([constant], "inner", [], [], [external("i", "inner")])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    values, indices = external("v", "sparse values"), external("j", "sparse indices")
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(np.ones(1, np.float32)), external("", ""), [3])
    sparse.values.CopyFrom(values)
    sparse.indices.CopyFrom(indices)
    graph = helper.make_graph([branch, many], "g", [], [], [external("w", "weights.data")], sparse_initializer=[sparse])
    function = helper.make_function("x", "f", [], ["o"], [helper.make_node("Constant", [], ["o"])], [])
    function.node[0].attribute.append(helper.make_attribute("value", external("f", "in a function")))
    model = helper.make_model(graph, functions=[function])
    training = model.training_info.add()
    training.algorithm.CopyFrom(helper.make_graph([], "t", [], [], [external("t", "training")]))
    return model


def test_locations_in_every_place_are_found(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(every_place().SerializeToString())
    assert external_locations(tmp_path / "g.onnx") == {
        "weights.data", "constant", "first", "second", "inner", "sparse values", "sparse indices", "in a function",
        "training",
    }  # fmt: skip


def test_graph_without_external_data(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.frombuffer(b"location" * 100, np.uint8), "location")
    graph = helper.make_graph([], "location", [], [], [weights], doc_string="\n\x08location\x12\x04evil")
    (tmp_path / "g.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert external_locations(tmp_path / "g.onnx") == set()
    (tmp_path / "g.onnx").write_bytes(b"")
    assert external_locations(tmp_path / "g.onnx") == set()


def entry(content: bytes) -> bytes:
    """A model with one initializer that has one entry of external data, written byte by byte."""
    for tag in (b"\x6a", b"\x2a", b"\x3a"):  # external_data = 13, initializer = 5, graph = 7
        content = tag + bytes([len(content)]) + content
    return content


@pytest.mark.parametrize(
    "content",
    [
        b"\x0a\x08location\x12\x04evil",
        b"\x12\x04evil\x0a\x08location",  # the value first
        b"\x0a\x88\x00location\x12\x84\x80\x00evil",  # longer integers than needed
        b"\x0a\x01x\x0a\x08location\x12\x01x\x12\x04evil",  # a parser keeps the last key and value
        b"\x0a\x08location\x13\x0a\x01x\x14\x12\x04evil",  # an unknown group
    ],
)
def test_unusual_encodings_are_read_as_onnx_reads_them(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(entry(content))
    read = onnx.load(tmp_path / "g.onnx", load_external_data=False).graph.initializer[0].external_data[0]
    assert (read.key, read.value) == ("location", "evil")
    assert "evil" in external_locations(tmp_path / "g.onnx")


@pytest.mark.parametrize(
    "content",
    [
        b"graph",
        b"\x3a",
        b"\x3a\x05ab",
        b"\x0d\x00",
        b"\x0c",
        b"\x0b",
        b"\x80" * 11,
        b"\xba\x80\x80\x80\x10\x00",  # field 7 after the bits above 32 are dropped
        entry(b"\x0a\x08location\x12\x01\xff"),
        b"location" + b"\x3a" * 50,
    ],
)
def test_what_is_no_message_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"\w"):
        external_locations(tmp_path / "g.onnx")


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    content = b"location"
    for tag in (b"\x32\x2a\x0a" * 40 + b"\x3a").decode("latin-1"):  # a graph in an attribute of a node of a graph
        size = len(content)
        content = tag.encode("latin-1") + bytes([size & 127 | 128, size >> 7]) + content
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        external_locations(tmp_path / "g.onnx")


@pytest.mark.parametrize("location", ["../out", "/etc/passwd", "not listed", "sub/../w.data", "*/_ORT_MEM_ADDR_/*"])
def test_external_data_must_be_listed(location: str, tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(b"x" * 8)
    listed = check_graph(tmp_path, "w.data")
    CheckedFiles().check(listed)
    with pytest.raises(BundleIntegrityError, match=r"external data .* is not listed in bundle\.json"):
        CheckedFiles().check(check_graph(tmp_path, location))


def check_graph(folder: Path, location: str) -> Listing:
    graph = helper.make_graph([], "g", [], [], [external("w", location)])
    (folder / "g.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    files = {name: FileRecord.of(folder / name) for name in ("g.onnx", "w.data")}
    return Listing(folder, files, "bundle.json", "copy it again")


@pytest.mark.parametrize("name", ["../x", "..", "", "a\0b", "a\\b", "fifo"])
def test_listed_names_are_those_of_regular_files(name: str, tmp_path: Path) -> None:
    if name == "fifo":
        os.mkfifo(tmp_path / name)
    with pytest.raises(BundleIntegrityError, match=r"which is not the name of a file|regular file"):
        CheckedFiles().check(Listing(tmp_path, {name: FileRecord("0" * 64, 0)}, "bundle.json", "copy it again"))


def test_data_behind_a_link_is_checked_by_its_content(tmp_path: Path) -> None:
    """Caches of model hubs hold links; a required signature accepts none."""
    (tmp_path / "blob").write_bytes(b"x" * 8)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "w.data").symlink_to("../blob")
    listing = check_graph(folder, "w.data")
    CheckedFiles().check(listing)
    with pytest.raises(BundleIntegrityError, match="regular file, got a symbolic link"):
        CheckedFiles(strict=True).check(listing)
    shutil.copy(tmp_path / "blob", tmp_path / "other")
    (tmp_path / "other").write_bytes(b"y" * 8)
    (folder / "w.data").unlink()
    (folder / "w.data").symlink_to("../other")
    with pytest.raises(BundleIntegrityError, match=r"w\.data does not match"):
        CheckedFiles().check(listing)
