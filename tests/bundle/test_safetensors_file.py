"""safetensors files: the library reads our files, and we read the library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip2edge.bundle.safetensors_file import PAGE, SafetensorsFile, StoredTensor, write_safetensors
from blip2edge.errors import BundleError

INTEGERS = np.arange(-15, 15, dtype=np.int8).reshape(10, 3)
SCALES = np.linspace(0, 1, 10, dtype=np.float32)[:, None]


def test_the_library_reads_what_is_written_in_pieces(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="the file is read with the library")
    tensors = {"table": StoredTensor("I8", (10, 3)), "table.scale": StoredTensor("F32", (10, 1))}
    pieces: list[Any] = [INTEGERS[:4], INTEGERS[4:], memoryview(SCALES.tobytes())]
    write_safetensors(tmp_path / "t", tensors, pieces, {"bits": "8"})
    found = safetensors.load_file(tmp_path / "t")
    assert np.array_equal(found["table"], INTEGERS)
    assert np.array_equal(found["table.scale"], SCALES)
    again = SafetensorsFile(tmp_path / "t")
    assert again.metadata == {"bits": "8"}
    assert again.tensors["table"] == StoredTensor("I8", (10, 3), PAGE)
    assert np.array_equal(again.array("table.scale"), SCALES)


def test_what_the_library_writes_is_read_and_not_written_to(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="the file is written with the library")
    safetensors.save_file({"table": INTEGERS, "table.scale": SCALES}, tmp_path / "t")
    file = SafetensorsFile(tmp_path / "t")
    assert np.array_equal(file.array("table"), INTEGERS)
    with pytest.raises(ValueError, match="read-only"):
        file.array("table")[0] = 1


@pytest.mark.parametrize("missing", [1, -1])
def test_pieces_must_fill_the_tensors(missing: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{30 - missing} bytes were given for tensors of 30"):
        write_safetensors(tmp_path / "t", {"a": StoredTensor("I8", (30,))}, [np.zeros(30 - missing, np.int8)])


@pytest.mark.parametrize("cut", [1, 30, 4000])
def test_a_cut_file_is_refused(cut: int, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "t", {"a": StoredTensor("I8", (30,))}, [np.zeros(30, np.int8)])
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-cut])
    with pytest.raises(BundleError, match=r"the file is (damaged or )?incomplete"):
        SafetensorsFile(tmp_path / "t").array("a")


def test_a_length_that_is_not_that_of_the_shape(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_safetensors(path, {"a": StoredTensor("I8", (30,))}, [np.zeros(30, np.int8)])
    path.write_bytes(path.read_bytes().replace(b"[30]", b"[29]"))
    with pytest.raises(BundleError, match="got 30: the file is damaged"):
        SafetensorsFile(path)
