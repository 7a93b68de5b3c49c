"""Mutations of files: single bytes, and structures whose lengths and checksums are corrected afterwards.

A wrong length or checksum would stop a parser before the mutated place.

A mutation raises any exception for a file that it cannot parse; the caller then changes its bytes.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Mutate = Callable[[bytes, random.Random], bytes]

INTEGERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
            2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
DEEP = 3000  # levels; json of CPython 3.11 raises RecursionError from about 1000
TEXTS = ("", "\0", "../../etc/passwd", "/etc/passwd", "a" * 5000, "\ud800", "\u2028", "-1", "1e999", "é" * 300,
         "{image}", "{prompt}", "%s%n", "nan", "\x1b[31m", "C:\\x", ".", "..")  # fmt: skip


def values() -> tuple[Any, ...]:
    """JSON values that readers may not expect."""
    floats = (0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"))
    return (None, True, False, *INTEGERS, -5, 10**30, 10**400, *floats, *TEXTS, [], {}, [[]], {"a": {}}, [0] * 2000)


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips, sets, cuts, repeats and inserts bytes, at one to four places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 64, 1024)))
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice((0, 1, 9, 10, 32, 34, 127, 128, 255))
            case 2:
                del data[at:]
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at:end] * rng.choice((1, 2, 50))
            case 5:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 40)))
            case 6:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(INTEGERS) % 2 ** (8 * width)
                data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case _:
                other = rng.randrange(len(data) + 1)
                data[at:end] = data[other : other + end - at]
    return bytes(data)


def of_json(content: bytes, rng: random.Random) -> bytes:
    """Replaces, drops, doubles, swaps and nests values of a JSON file; every eighth time its bytes."""
    if rng.randrange(8) == 0:
        return of_bytes(content, rng)
    tree = [json.loads(content)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(tree, rng)
    text = json.dumps(tree[0], ensure_ascii=rng.random() < 0.5, separators=(",", ":"))
    if rng.randrange(50) == 0:
        text = text.replace('"', '"' + text[2:20].replace('"', "") + '":1,"', 1)  # often a further or a double key
    if rng.randrange(50) == 0:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice("[{") * DEEP + text[at:]
    if rng.randrange(50) == 0:
        text = text.replace("0.", "1e999", 1)
    return text.encode("utf-8", "surrogatepass")


def _change(tree: list[Any], rng: random.Random) -> None:
    """Changes one place of a tree, chosen by walking down at random."""
    places: list[tuple[Any, Any]] = []
    holder: Any = tree
    while holder and isinstance(holder, (dict, list)):
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        places.append((holder, key))
        holder = holder[key]
        if rng.random() < 0.15:
            break
    holder, key = places[-1]
    match rng.randrange(7):
        case 0 if holder is not tree:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice((*TEXTS, "size", "name"))] = holder[key]
        case 1:
            holder.insert(key, copy.copy(holder[key]))
        case 2:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name])
        case 3:
            for _ in range(rng.choice((1, 3, 99, 150))):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        case 4 if isinstance(holder[key], (int, float)) and abs(holder[key]) < 2**62:
            holder[key] = holder[key] * rng.choice((-1, 2, 1000)) + rng.choice((-1, 0, 1))
        case _:
            holder[key] = copy.deepcopy(rng.choice(values()))


def of_text(content: bytes, rng: random.Random) -> bytes:
    """Drops, repeats, swaps and spoils the lines of a text; every third time its bytes."""
    if rng.randrange(3) == 0:
        return of_bytes(content, rng)
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, rng.choice(lines))
        case 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            key = lines[at].partition(b"=")[0]
            value = rng.choice(values())
            lines[at] = key + b"= " + json.dumps(value, default=str).encode("utf-8", "surrogatepass")
        case _:
            lines[at] = lines[at].partition(b"=")[0] + b"= " + rng.choice((b"[", b"{a=")) * rng.choice((1, DEEP))
    return b"\n".join(lines)


def of_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Changes the header of a safetensors file and corrects its length; or the length, or bytes."""
    kind = rng.randrange(4)
    length = int.from_bytes(content[:8], "little")
    if kind == 0 or len(content) < 8 + length:
        return of_bytes(content, rng)
    if kind == 1:
        return rng.choice((*INTEGERS, 10**8, 10**8 + 1)).__mod__(2**64).to_bytes(8, "little") + content[8:]
    header = of_json(content[8 : 8 + length].rstrip(), rng)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def of_zip(content: bytes, rng: random.Random, inner: Mutate = of_bytes, *, packed: bool = False) -> bytes:
    """Changes, drops, doubles or blows up a file of a zip archive; every fourth time the archive's bytes."""
    if rng.randrange(4) == 0:
        return of_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {file.filename: archive.read(file) for file in archive.infolist()}
    name = rng.choice(list(files))
    kind = rng.randrange(6)
    bomb = kind == 0
    if bomb:
        files[name] = files[name][:200] + b"\0" * (1 << 22)
    elif kind == 1:
        del files[name]
    elif kind == 2:
        files[rng.choice(("../x", "/x", "a" * 300, name + "x"))] = files[name]
    else:
        files[name] = inner(files[name], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed or bomb else zipfile.ZIP_STORED) as archive:
        for each, body in files.items():
            archive.writestr(each, body)
    return buffer.getvalue()


def of_hashed_zip(content: bytes, rng: random.Random) -> bytes:
    """A zip archive with its SHA-256 behind it, as of a calibration cache: the hash is corrected."""
    body = of_zip(content[:-32], rng, of_array, packed=True)
    return body + (hashlib.sha256(body).digest() if rng.randrange(20) else content[-32:])


def of_array(content: bytes, rng: random.Random) -> bytes:
    """Changes the header of an ``.npy``: its dtype or its shape."""
    if rng.randrange(3) == 0 or b"'shape': (" not in content[:200]:
        return of_bytes(content, rng)
    if rng.random() < 0.4:
        dtypes = (b"<f2", b"<f4", b"<f8", b"|O", b"<i8", b"<U9", b"|b1", b"<M8[s]", b"|V0", b"<c16")
        return content.replace(content[content.find(b"<") : content.find(b"<") + 3], rng.choice(dtypes), 1)
    shape = ", ".join(
        str(rng.choice((0, 1, -1, 3, 2**31, 2**40, 2**62, 10**30))) for _ in range(rng.choice((1, 2, 40)))
    )
    at, end = content.find(b"'shape': (") + 10, content.find(b")")
    return content[:at] + shape.encode() + b"," + content[end:]


def of_tar(content: bytes, rng: random.Random) -> bytes:
    """Changes a field of a tar header and corrects its checksum; or inserts a hostile header, or changes bytes."""
    data = bytearray(content)
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    kind = rng.randrange(6)
    if not starts or kind == 0:
        return of_bytes(content, rng)
    at = rng.choice(starts)
    header = data[at : at + 512]
    if kind == 1:
        header[156] = rng.choice(b"0123456789LKSxgXVDMAN\0\xff")
    elif kind == 2:
        number = rng.choice((*INTEGERS, -512, 2**60, 10**20)) % 2**88
        header[124:136] = rng.choice((b"\x80", b"\xff")) + number.to_bytes(11, "big")
    elif kind == 3:
        header[124:136] = rng.choice(
            (b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"           \0", b"9999\0" * 3)
        )[:12]
    elif kind == 4:
        name = rng.choice(
            (b"../../x.jpg", b"/etc/passwd", b"\xff\xfe.jpg", b"a" * 100, b".", b"", b"x\n.txt", b"0.json", b"0.txt")
        )
        header[:100] = name[:100].ljust(100, b"\0")
    else:
        return bytes(data[:at]) + _long_header(rng) + bytes(data[at:])
    data[at : at + 512] = _checked(header)
    return bytes(data)


def _checked(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def _long_header(rng: random.Random) -> bytes:
    """PAX records, a long name, or a sparse map."""
    info = tarfile.TarInfo("././@LongLink")
    info.type = rng.choice((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE))
    key, value = rng.choice((("size", str(2**60)), ("size", "-512"), ("path", "../x"), ("path", "\0"), ("size", "abc"),
                             ("GNU.sparse.realsize", str(2**60)), ("GNU.sparse.map", "0,1," * 500),
                             ("GNU.sparse.major", "1"), ("mtime", "nan"), ("hdrcharset", "BINARY")))  # fmt: skip
    record = f" {key}={value}\n"
    body = rng.choice((f"{len(record) + 2}{record}", f"{10**12}{record}", f"0{record}", "1" * 5000, "")).encode()
    info.size = len(body)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if info.type == tarfile.GNUTYPE_SPARSE:
        header[386:398] = b"%011o\0" % rng.choice((0, 512, 2**32))
        header[483:495] = b"\x80" + (2**60).to_bytes(11, "big")
        _checked(header)
    return bytes(header) + body + b"\0" * (-len(body) % 512)


def of_png(content: bytes, rng: random.Random) -> bytes:
    """Changes a chunk of a PNG and corrects its CRC; or adds a large text or colour profile; or changes bytes."""
    if not content.startswith(b"\x89PNG") or rng.randrange(3) == 0:
        return of_bytes(content, rng)
    chunks, at = [], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    place = rng.randrange(len(chunks))
    kind, body = chunks[place]
    match rng.randrange(5):
        case 0:
            chunks[place] = (kind, of_bytes(body, rng))
        case 1 if kind == b"IHDR" or place == 0:
            sides = (0, 1, 2, 65535, 65536, 2**31 - 1, 2**32 - 1, 89_478_485)
            chunks[0] = (b"IHDR", struct.pack(">II", rng.choice(sides), rng.choice(sides)) + chunks[0][1][8:])
        case 2:
            bomb = zlib.compress(b"\0" * (1 << rng.choice((10, 20, 24))))
            extra = rng.choice(((b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")))
            chunks.insert(min(1, place), (extra[0], extra[1] + bomb))
        case 3:
            chunks.insert(place, chunks[place])
        case _:
            chunks[place] = (
                rng.choice((b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"gAMA", b"IEND")),
                body,
            )
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return content[:8] + b"".join(parts)


def of_onnx(content: bytes, rng: random.Random) -> bytes:
    """Changes a field of an ONNX model through its protobuf; every third time its bytes."""
    if rng.randrange(3) == 0:
        return of_bytes(content, rng)
    import onnx

    model = onnx.ModelProto.FromString(content)
    graph = model.graph
    match rng.randrange(9):
        case 0:
            tensor = rng.choice(graph.initializer)
            tensor.dims[:] = [rng.choice(INTEGERS) % 2**63 for _ in range(rng.choice((0, 1, 2, 9)))]
        case 1:
            tensor = rng.choice(graph.initializer)
            tensor.data_location = rng.choice((0, 1))
            del tensor.external_data[:]
            for key in ("location", "offset", "length"):
                entry = tensor.external_data.add()
                entry.key = key
                texts = (
                    "../../../etc/passwd",
                    "/etc/passwd",
                    "",
                    "nothing",
                    "model.onnx",
                    "-1",
                    str(2**63),
                    "abc",
                    "16",
                )
                entry.value = rng.choice(texts)
        case 2:
            rng.choice(graph.initializer).data_type = rng.choice((0, 1, 7, 8, 16, 20, 99))
        case 3:
            node = rng.choice(graph.node)
            node.op_type = rng.choice(("Loop", "If", "Nothing", "", "Cast", "Reshape", rng.choice(graph.node).op_type))
        case 4:
            node = rng.choice(graph.node)
            if node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice(
                    (*[each.name for each in graph.initializer], "", "x")
                )
        case 5:
            del graph.node[rng.randrange(len(graph.node))]
        case 6:
            graph.node.append(rng.choice(graph.node))
        case 7:
            node = rng.choice([node for node in graph.node if node.attribute] or graph.node)
            for attribute in node.attribute:
                attribute.i, attribute.type = rng.choice(INTEGERS) % 2**63, rng.choice((0, 1, 2, 4, 5, 7))
        case _:
            model.opset_import[0].version = rng.choice((0, 1, 6, 999, 2**62))
            model.ir_version = rng.choice((0, 3, 99))
    return bytes(model.SerializeToString())
