"""Pictures with more than 8 bits per channel give the pixels of the same picture in 8 bits, or an error."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from blip2edge.errors import ImageError
from blip2edge.runtime.images.preprocess import Preprocessing, load_image

HEIGHT, WIDTH = 40, 256
GREY = np.tile(np.arange(256, dtype=np.uint8), (HEIGHT, 1))
GREY[:10] = 7  # so that every orientation differs


def saved(array: NDArray[np.generic], suffix: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, suffix, **options)
    return file.getvalue()


def tiff(bits: int, photometric: int, data: bytes, order: str = "<", sample_format: int = 1) -> bytes:
    """A TIFF file of one strip, for layouts that Pillow reads and does not write."""
    short, long = 3, 4
    tags = [
        (256, short, WIDTH), (257, short, HEIGHT), (258, short, bits), (259, short, 1), (262, short, photometric),
        (273, long, 8), (277, short, 1), (278, short, HEIGHT), (279, long, len(data)), (339, short, sample_format),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack(order + "HHI", tag, kind, 1)
        + (struct.pack(order + "HH", value, 0) if kind == short else struct.pack(order + "I", value))
        for tag, kind, value in tags
    )
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4)
    return magic + struct.pack(order + "I", 8 + len(data)) + data + directory


def packed_12_bits() -> bytes:
    pairs = (GREY.astype(np.uint32) * 4095 // 255).reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


GREY16 = GREY.astype(np.uint16) * 257
FILES = {
    "png": saved(GREY16, "PNG"),
    "tiff": saved(GREY16, "TIFF"),
    "tiff, deflate": saved(GREY16, "TIFF", compression="tiff_adobe_deflate"),
    "tiff, big-endian": tiff(16, 1, GREY16.astype(">u2").tobytes(), ">"),
    "tiff, 0 is white": tiff(16, 0, (65535 - GREY16).astype("<u2").tobytes()),
    "tiff, 12 bits": tiff(12, 1, packed_12_bits()),
    "pgm": saved(GREY16, "PPM"),
    "pgm, 12 bits": f"P5 {WIDTH} {HEIGHT} 4095 ".encode()
    + (GREY.astype(np.uint32) * 4095 // 255).astype(">u2").tobytes(),
    "jpeg 2000": saved(GREY16, "JPEG2000"),
}


@pytest.mark.parametrize("name", FILES)
def test_16_bit_file_gives_the_pixels_of_its_8_bit_version(name: str) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(FILES[name])), np.stack([GREY] * 3, axis=-1))
    preprocessing = Preprocessing(size={"height": 32, "width": 32})
    np.testing.assert_array_equal(preprocessing(FILES[name]), preprocessing(saved(GREY, "PNG")))


@pytest.mark.parametrize("name", FILES)
def test_16_bit_picture_that_is_passed_open(name: str) -> None:
    preprocessing = Preprocessing(resize=False)
    opened = Image.open(io.BytesIO(FILES[name]))
    np.testing.assert_array_equal(preprocessing(opened), preprocessing(Image.fromarray(GREY)))


@pytest.mark.parametrize("name", FILES)
def test_copy_of_an_open_picture_is_refused(name: str) -> None:
    """A copy has lost the file's format and tags, so the values of black and white are not known, as in an array."""
    copy = Image.open(io.BytesIO(FILES[name])).copy()
    for read in (load_image, Preprocessing()):
        with pytest.raises(ImageError, match=r"values of black and white are not known; pass the file itself"):
            read(copy)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_picture_that_was_made_from_16_bit_values_is_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="Pillow's mode I;16"):
        load_image(Image.frombytes(mode, (2, 1), bytes(4)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_16_bit_picture_is_turned_upright(orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    deep, plain = (load_image(saved(array, suffix, exif=exif)) for array in (GREY16, GREY))
    np.testing.assert_array_equal(np.asarray(deep), np.asarray(plain))


def test_values_are_rounded_to_the_nearest() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(saved(values, "PNG")))[..., 0], expected)


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (saved(GREY.astype(np.float32) / 255, "TIFF"), "F"),
        (saved(GREY.astype(np.float32), "TIFF"), "F"),
        (saved(GREY.astype(np.int32) * 257, "TIFF"), "I"),
        (tiff(16, 1, GREY16.tobytes(), sample_format=2), "I"),
    ],
)
def test_pixels_of_unknown_range_are_refused(content: bytes, mode: str) -> None:
    for source in (content, Image.open(io.BytesIO(content))):
        for read in (load_image, Preprocessing()):
            with pytest.raises(ImageError, match=f"Pillow's mode {mode}, in") as caught:
                read(source)
            assert "scale the values to 0…255" in str(caught.value)
