"""The wheel of onnxruntime-gpu, cut to one GPU: only the code for other GPUs changes."""

from __future__ import annotations

import importlib
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("cut_onnxruntime")


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).integers(1, 256, size, np.uint8).tobytes()


def library(*fat_binaries: list[tuple[int, bytes]]) -> bytes:
    """An ELF file of 64 bits with the sections .text, .nv_fatbin and .shstrtab."""
    fat = b""
    for entries in fat_binaries:
        body = b""
        for architecture, code in entries:
            header = struct.pack("<HHIQ", 2, 0x101, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", architecture)
            body += header.ljust(64, b"\0") + code
        fat += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body + bytes(8)
    names = b"\0.text\0.nv_fatbin\0.shstrtab\0"
    text, start = noise(0, 64), 64
    sections, content = [(0, 0, 0)], b""
    for name, part in ((1, text), (7, fat), (18, names)):
        sections.append((name, start + len(content), len(part)))
        content += part
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0) for name, offset, size in sections
    )
    head = b"\x7fELF\x02".ljust(0x28, b"\0") + struct.pack("<Q", 64 + len(content))
    head = head.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, 4, 3)
    return head.ljust(64, b"\0") + content + table


FAT = [[(75, noise(1, 40)), (90, noise(2, 80))], [(90, noise(3, 16)), (120, noise(4, 24))]]


def test_code_of_other_gpus_becomes_zeros(script: Any) -> None:
    whole = library(*FAT)
    cut = script.cut_library(whole, {90})
    assert len(cut) == len(whole)
    codes = list(script.codes_of(whole))
    assert [code.architecture for code in codes] == [75, 90, 90, 120]
    assert [code.architecture for code in script.codes_of(cut)] == [75, 90, 90, 120]  # the list stays readable
    changed = {at for at, (one, two) in enumerate(zip(whole, cut, strict=True)) if one != two}
    others = {at for code in codes if code.architecture != 90 for at in range(code.start, code.start + code.size)}
    assert changed == others
    assert not any(cut[at] for at in others)
    with pytest.raises(ValueError, match=r"capabilities \[75, 90, 120\], not for \[87\]"):
        script.cut_library(whole, {87})


def test_wheel_is_cut_and_joined(script: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "onnxruntime_gpu-1-py3-none-any.whl"
    files = {
        "onnxruntime/capi/libcuda.so": library(*FAT),
        "onnxruntime/plain.so": library(),
        "onnxruntime/a.py": b"a = 1\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("onnxruntime/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    sizes = script.cut(wheel, {90}, tmp_path / "pieces", 0.0002)
    assert len(sizes) > 1
    assert script.join(tmp_path / "pieces", tmp_path / "packages") == 3
    expected = {**files, "onnxruntime/capi/libcuda.so": script.cut_library(library(*FAT), {90})}
    assert {name: (tmp_path / "packages" / name).read_bytes() for name in files} == expected
    index = json.loads((tmp_path / "pieces" / "pieces.json").read_text())
    index["files"][0]["sha256"] = "0" * 64
    (tmp_path / "pieces" / "pieces.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="differs from its recorded hash"):
        script.join(tmp_path / "pieces", tmp_path / "again")
