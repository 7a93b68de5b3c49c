"""Cuts the wheel of onnxruntime-gpu to the code for one GPU, splits it into small pieces to copy, and joins the pieces.

    pip download onnxruntime-gpu==1.31.1 --no-deps --python-version 3.12 --only-binary=:all: \
        --platform manylinux_2_28_x86_64 -d wheels
    python benchmarks/cut_onnxruntime.py cut wheels/onnxruntime_gpu-*.whl --sm 90 -o pieces
    python benchmarks/cut_onnxruntime.py join pieces -o packages        # on the other machine: PYTHONPATH=$PWD:packages

``docs/engines.md`` has all commands for a machine without a network.

Nearly all of the wheel is machine code of the CUDA provider for seven kinds of GPU. `cut` replaces the code for the
other kinds by zeros: every offset in the library stays as it is, and zeros compress to nothing. The code is in the
section ``.nv_fatbin`` of the library, as a list of fat binaries; the layout is that of CUDA's header
``fatbinary_section.h`` and of the entries that ``cuobjdump --list-elf`` shows.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reporting import parser_of

from blip2edge.cli import run_script

MAGIC = 0xBA55ED50  # of a fat binary
FATBIN_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of the header, bytes of the entries
ENTRY_HEADER = struct.Struct("<HHIQ")  # kind, version, bytes of the header, bytes of the code
ARCHITECTURE = 28  # offset of the compute capability in the header of an entry, uint32: 90 is 9.0
SECTION = ".nv_fatbin"
INDEX = "pieces.json"
MIB = 1 << 20


@dataclass(frozen=True)
class Code:
    """Position of the machine code for one kind of GPU in a library.

    Attributes:
        architecture: Compute capability, 90 for 9.0.
        start: Offset of the code in the library, in bytes.
        size: Size of the code in bytes.
    """

    architecture: int
    start: int
    size: int


def section_of(library: bytes | bytearray, name: str) -> tuple[int, int]:
    """Returns the offset and the size of a section of a 64-bit ELF file, in bytes; size 0 without such a section."""
    if library[:5] != b"\x7fELF\x02":
        return 0, 0
    (table,) = struct.unpack_from("<Q", library, 0x28)
    length, count, of_names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + at * length) for at in range(count)]
    names = headers[of_names][4]
    for header in headers:
        start = names + header[0]
        if bytes(library[start : library.index(b"\0", start)]).decode() == name:
            return header[4], header[5]
    return 0, 0


def codes_of(library: bytes | bytearray) -> Iterator[Code]:
    """Yields the position of each block of GPU code in a library, with the kind of GPU.

    Raises:
        ValueError: A fat binary is damaged.
    """
    at, size = section_of(library, SECTION)
    end = at + size
    while at < end:
        magic, _, header, length = FATBIN_HEADER.unpack_from(library, at)
        if magic != MAGIC:
            at += 8  # fat binaries are aligned to 8 bytes
            continue
        entry, last = at + header, at + header + length
        while entry < last:
            _, _, own, code = ENTRY_HEADER.unpack_from(library, entry)
            if not own:
                raise ValueError(f"the fat binary at {at} is damaged")
            (architecture,) = struct.unpack_from("<I", library, entry + ARCHITECTURE)
            yield Code(architecture, entry + own, code)
            entry += own + code
        at = last


def cut_library(library: bytes, architectures: set[int]) -> bytes:
    """Returns the library with zeros in place of the code for all GPUs except ``architectures``.

    Raises:
        ValueError: The library has no code for one of ``architectures``.
    """
    codes = list(codes_of(library))
    absent = architectures - {code.architecture for code in codes}
    if absent:
        known = sorted({code.architecture for code in codes})
        raise ValueError(f"the library has code for the compute capabilities {known}, not for {sorted(absent)}")
    result = bytearray(library)
    for code in codes:
        if code.architecture not in architectures:
            result[code.start : code.start + code.size] = bytes(code.size)
    return bytes(result)


def cut(wheel: Path, architectures: set[int], output: Path, piece_mib: float) -> dict[str, float]:
    """Removes the code for all GPUs except ``architectures`` from a wheel.

    The files of the wheel are written as one compressed stream, which is split into pieces.

    Returns the size of each piece in MiB, by file name.
    """
    output.mkdir(parents=True)
    compressor = lzma.LZMACompressor(preset=6)
    stream = bytearray()
    index: list[dict[str, object]] = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(name for name in archive.namelist() if not name.endswith("/")):
            content = archive.read(name)
            if name.endswith(".so") and section_of(content, SECTION)[1]:
                content = cut_library(content, architectures)
            index.append({"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()})
            stream += compressor.compress(content)
    stream += compressor.flush()
    step = int(piece_mib * MIB)
    names = []
    for number, start in enumerate(range(0, len(stream), step)):
        names.append(f"onnxruntime-gpu.{number:02}")
        (output / names[-1]).write_bytes(stream[start : start + step])
    (output / INDEX).write_text(json.dumps({"wheel": wheel.name, "pieces": names, "files": index}, indent=1) + "\n")
    return {name: round((output / name).stat().st_size / MIB, 1) for name in names}


def join(pieces: Path, output: Path) -> int:
    """Writes the files of the cut wheel to a directory; returns their number.

    Raises:
        ValueError: A file differs from its recorded hash.
    """
    index = json.loads((pieces / INDEX).read_text())
    decompressor = lzma.LZMADecompressor()
    content = bytearray()
    for name in index["pieces"]:
        content += decompressor.decompress((pieces / name).read_bytes())
    start = 0
    for file in index["files"]:
        part = bytes(content[start : start + file["size"]])
        start += file["size"]
        if hashlib.sha256(part).hexdigest() != file["sha256"]:
            raise ValueError(f"{file['name']} differs from its recorded hash")
        path = output / file["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part)
    return len(index["files"])


def main() -> int:
    """Cuts a wheel into pieces, or joins the pieces."""
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cut", help="keep only the code for the GPUs of --sm in a wheel, and write it in pieces")
    one.add_argument("wheel", type=Path)
    one.add_argument(
        "--sm", type=int, action="append", required=True, help="keep the code for this compute capability, 90 for 9.0"
    )
    one.add_argument("-o", "--output", type=Path, required=True)
    one.add_argument("--piece-mib", type=float, default=55, help="largest size of a piece in MiB")
    other = commands.add_parser("join", help="write the files of the pieces to a directory")
    other.add_argument("pieces", type=Path)
    other.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "cut":
        sizes = cut(options.wheel, set(options.sm), options.output, options.piece_mib)
        print(json.dumps({"pieces_mib": sizes}))
    else:
        print(json.dumps({"files": join(options.pieces, options.output)}))
    return 0


if __name__ == "__main__":
    run_script(main)
