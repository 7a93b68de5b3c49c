"""Packs a bundle without its large weights, and fills it with random weights on another machine.

The weights of a model of published size are gigabytes, and its graphs a few megabytes. Speed does not depend on the
values of the weights, so :func:`pack` leaves matrices out, and :func:`fill` writes random numbers in their places.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import read_manifest
from blip2edge.bundle.safetensors_file import SafetensorsFile
from blip2edge.bundle.schema import EMBEDDINGS_FILE, EMBEDDINGS_TENSOR
from blip2edge.bundle.trust.integrity import STAMPS, FileRecord
from blip2edge.runtime.backends.optimized_copy import KIND, RECORD, OptimizedRecord

INDEX, KEPT = "weights.json", "weights.kept.xz"
"""The two files of a packed bundle that replace its files of weights.

The first has the size of each file of weights, and the places of the matrices that are left out. The second has all
other bytes of these files.
"""

LEAST = 1 << 16
"""Bytes of the smallest matrix that is left out. Vectors are kept: norms with random scales would change the values."""

DTYPES = {"FLOAT16": "float16", "F16": "float16", "FLOAT": "float32", "F32": "float32"}
DEVIATION = 0.02
BLOCK = (1 << 22) + 7  # random numbers that are drawn; they are repeated
PIECE = 1 << 24

Hole = tuple[int, int, str]
"""Offset and length in bytes, and dtype, of a matrix that is left out."""


def pack(bundle: Path, folder: Path, least: int = LEAST) -> None:
    """Writes a bundle, with its optimized copies, to another folder, without matrices of at least ``least`` bytes."""
    holes = _holes(bundle, least)
    folder.mkdir(parents=True)
    kept, index = lzma.LZMACompressor(), {}
    with (folder / KEPT).open("wb") as output:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != STAMPS):
            name = path.relative_to(bundle).as_posix()
            if name not in holes:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
                continue
            index[name] = {"size": path.stat().st_size, "holes": holes[name]}
            with path.open("rb") as file:
                for offset, length, dtype in _parts(index[name]):
                    if not dtype:
                        file.seek(offset)
                        output.write(kept.compress(file.read(length)))
        output.write(kept.flush())
    (folder / INDEX).write_text(json.dumps(index))


def _holes(bundle: Path, least: int) -> dict[str, list[Hole]]:
    """Finds the matrices of a bundle that are left out; returns them by file, in the order of the file."""
    import onnx_ir as ir

    found: dict[str, set[Hole]] = defaultdict(set)
    for graph in bundle.rglob("*.onnx"):
        for value in ir.load(graph).graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and len(tensor.shape) > 1 and tensor.nbytes >= least:
                dtype = DTYPES.get(tensor.dtype.name)
                if dtype:
                    found[str(tensor.location)].add((tensor.offset or 0, tensor.nbytes, dtype))
    table = SafetensorsFile(bundle / EMBEDDINGS_FILE).stored(EMBEDDINGS_TENSOR)
    found[EMBEDDINGS_FILE].add((table.offset, table.nbytes, DTYPES[table.dtype]))
    return {name: sorted(holes) for name, holes in found.items()}


def _parts(record: dict[str, Any]) -> Iterator[Hole]:
    """Yields, in file order, the matrices that are left out, and the bytes between them with an empty dtype."""
    at = 0
    for offset, length, dtype in record["holes"]:
        if offset > at:
            yield at, offset - at, ""
        if offset >= at:  # a matrix that two graphs store is listed once
            yield offset, length, dtype
            at = offset + length
    if record["size"] > at:
        yield at, record["size"] - at, ""


def fill(folder: Path, bundle: Path) -> int:
    """Makes a bundle from a packed one, with random matrices; returns the bytes of the files with weights."""
    shutil.copytree(folder, bundle, ignore=shutil.ignore_patterns(INDEX, KEPT))
    index = json.loads((folder / INDEX).read_text())
    kept, noise = memoryview(lzma.decompress((folder / KEPT).read_bytes())), _noise()
    with ThreadPoolExecutor() as pool:
        waiting, start = {}, 0
        for name, record in index.items():
            size = sum(length for _, length, dtype in _parts(record) if not dtype)
            waiting[name] = pool.submit(_write, bundle / name, record, kept[start : start + size], noise)
            start += size
        records = {name: future.result() for name, future in waiting.items()}
    manifest = read_manifest(bundle)
    own = {name: record for name, record in records.items() if name in manifest.files}
    replace(manifest, files={**manifest.files, **own}).write(bundle)
    for path in bundle.glob(f"{KIND}/*/{RECORD}"):
        copy = OptimizedRecord.from_json(json.loads(path.read_text()))
        prefix = f"{path.parent.relative_to(bundle).as_posix()}/"
        of_copy = {name.removeprefix(prefix): record for name, record in records.items() if name.startswith(prefix)}
        sha256 = Bundle.open(bundle).sha256
        replace(copy, bundle_sha256=sha256, files={**copy.files, **of_copy}).write(path.parent)
    return sum(record.size for record in records.values())


def _noise() -> dict[str, bytes]:
    """Draws random numbers; returns their bytes by dtype."""
    values = np.random.default_rng(0).normal(0, DEVIATION, BLOCK)
    return {dtype: values.astype(dtype).tobytes() for dtype in set(DTYPES.values())}


def _write(path: Path, record: dict[str, Any], kept: memoryview, noise: dict[str, bytes]) -> FileRecord:
    """Writes a file of weights, and computes its record."""
    digest, at = hashlib.sha256(), 0
    with path.open("wb") as file:
        for _, length, dtype in _parts(record):
            for start in range(0, length, PIECE):
                size = min(PIECE, length - start)
                if dtype:
                    block = noise[dtype]
                    first = start % len(block)
                    piece = (block[first:] + block * (1 + size // len(block)))[:size]
                else:
                    piece = bytes(kept[at : at + size])
                    at += size
                digest.update(piece)
                file.write(piece)
    return FileRecord(digest.hexdigest(), record["size"])
