"""Converts a picture file (EXIF orientation, colour modes) to the vision encoder's pixel values, in NumPy and Pillow.

Two steps, each bit-equal to its counterpart in transformers 5.23, except for 16-bit greyscale:

- `load_image` (`transformers.image_utils.load_image`): decode, turn upright by the EXIF orientation, RGB;
- `Preprocessing` (`BlipImageProcessorPil`, `CLIPImageProcessorPil`): resize, centre crop, rescale, normalise.

Rescaling and normalising are done with one lookup table: an 8-bit value has only 256 results per channel.
"""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from blip2edge.errors import Blip2EdgeError, BundleError, ImageError, one_line
from blip2edge.limits import DEFAULT_LIMITS, MAX_PIXELS, Limits
from blip2edge.picture_files import is_broken_link
from blip2edge.runtime.images.floats import resized_floats
from blip2edge.runtime.images.modes import WITHOUT_PREMULTIPLIED_ALPHA, Grey16, blend_on_white

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""Picture formats that are accepted, by Pillow's names. For some others (EPS), Pillow would run external programs."""

BILINEAR = 2
BICUBIC = 3
OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = 1  # EXIF orientation of a picture that needs no turning
_RESAMPLING_CODES = range(6)  # Pillow: nearest, lanczos, bilinear, bicubic, box, hamming
_warning_filters = threading.Lock()

Content = Union[str, "os.PathLike[str]", bytes, Image.Image, NDArray[Any]]


@dataclass(frozen=True)
class DeferredImage:
    """A picture that is read when it is decoded, such as a file behind a web address.

    Attributes:
        name: The picture's name in error messages.
        read: Returns the picture. It may be called twice: if a batch fails, each of its pictures is read again.
    """

    name: str
    read: Callable[[], Content]

    def content(self) -> Content:
        """Reads the picture with :attr:`read`; an error of another library becomes an ImageError."""
        try:
            return self.read()
        except Blip2EdgeError:
            raise
        except Exception as error:
            raise ImageError(f"{self.name}: cannot be read ({one_line(error)})") from error


ImageSource = Union[Content, "DeferredImage"]

_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "LA": 4, "PA": 4, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
"""Number of bytes of a pixel in Pillow's memory, by Pillow's mode; all other modes have 4."""


def load_image(source: ImageSource, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Decodes a picture, turns it upright and converts it to RGB; transparency is dropped, not blended.

    16-bit greyscale is scaled to 8 bits. transformers clips it at 255 instead, which makes most such pictures white.

    Args:
        source: A path, the bytes of a picture file, a Pillow image, a uint8 array [H,W], [H,W,1], [H,W,3] (RGB) or
            [H,W,4] (RGBA), or a `DeferredImage` of one of these.
        limits: The largest picture.

    Returns:
        The picture in mode RGB; an upright RGB Pillow image is returned without a copy.

    Raises:
        ImageError: The file is missing, broken or not a picture; the picture has no pixel, is larger than `limits`, or
            has 32-bit pixels; the array has another shape or dtype.
    """
    given = "the picture passed in"
    if isinstance(source, DeferredImage):
        given, source = source.name, source.content()
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source), "the array passed in", limits)
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the picture passed in", limits)
    if isinstance(source, (bytes, bytearray)):
        return _decode(io.BytesIO(source), len(source), given, limits)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"expected a path, bytes, a Pillow image or an array, got {type(source).__name__}")
    name = os.fspath(source)
    check_picture_file(name)
    try:
        with open(name, "rb") as file:
            return _decode(file, os.fstat(file.fileno()).st_size, name, limits)
    except OSError as error:
        raise ImageError(f"{name}: cannot be opened ({error.strerror or error})") from error


def check_picture_file(name: str) -> None:
    """Raises ImageError unless ``name`` is the path of an existing regular file; does not read the file."""
    if "://" in name:
        raise ImageError(f"{name}: expected a file, got an address", "download the picture first")
    try:
        path = Path(name)
        if path.is_file():
            return
        exists, is_directory = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # a name too long for the system, or one with a NUL in it
        raise ImageError(f"{name[:80]!r}: not a usable file name ({error})") from error
    if is_directory:
        raise ImageError(f"{name}: expected a picture, got a directory", "name the pictures inside it")
    if exists:
        raise ImageError(f"{name}: expected a picture, got something that is not a regular file", "name a picture file")
    if is_broken_link(path):
        raise ImageError(f"{name}: a link to {os.readlink(path)}, which does not exist", "restore that file")
    raise ImageError(f"{name}: no such file", "check the path")


def _decode(file: Any, size: int, name: str, limits: Limits) -> Image.Image:
    if size == 0:
        raise ImageError(f"{name}: the file is empty", "save or copy the picture again")
    with _opened(file, name) as image:
        return _upright_rgb(image, name, limits)


def _opened(file: Any, name: str) -> Image.Image:
    """Opens a picture and reads its header; Pillow's warning about too many pixels becomes an error."""
    try:
        with _warning_filters, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS} pixels, got more", "scale the picture down") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not a picture in one of the formats {', '.join(FORMATS)}", "convert the picture to PNG"
        ) from error
    except Exception as error:  # the format plug-ins raise whatever a broken header leads them to
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> ImageError:
    reason = str(error) or type(error).__name__
    return ImageError(f"{name}: the picture is broken ({reason})", "save or copy the picture again")


def _upright_rgb(image: Image.Image, name: str, limits: Limits) -> Image.Image:
    """Checks a picture's size before decoding; then applies the EXIF orientation and converts to RGB."""
    check_pixels(image.width, image.height, name, limits, _MODE_BYTES.get(image.mode, 4))
    try:
        image.load()
        grey16 = None if image.mode == "RGB" else Grey16.of(image, name)
        if image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT:
            image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        if grey16 is not None:
            return grey16.in_8_bits(image).convert("RGB")
        if image.mode in WITHOUT_PREMULTIPLIED_ALPHA:
            image = image.convert(WITHOUT_PREMULTIPLIED_ALPHA[image.mode])
        if isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # per-colour alpha: the same colours without Pillow's warning
        return image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, …
        raise _broken(name, error) from error


def check_pixels(width: int, height: int, name: str, limits: Limits = DEFAULT_LIMITS, pixel_bytes: int = 4) -> None:
    """Checks the size of a picture before it is decoded.

    Args:
        width: In pixels.
        height: In pixels.
        name: The picture's name, for the error.
        limits: The largest picture.
        pixel_bytes: Bytes of a decoded pixel.

    Raises:
        ImageError: The picture is empty or too large.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{name}: expected a picture with at least one pixel, got {width}×{height}")
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise ImageError(
            f"{name}: expected at most {limits.pixels} pixels and at most {limits.side} a side, got {width}×{height}",
            "scale the picture down",
        )
    if width * height * pixel_bytes > limits.decoded_bytes:
        raise ImageError(
            f"{name}: expected a picture of at most {limits.decoded_bytes} bytes when it is decoded, "
            f"got {width * height * pixel_bytes}",
            "scale the picture down",
        )


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"expected a uint8 array [H,W], [H,W,3] or [H,W,4], got {array.dtype} {list(array.shape)}",
            "scale the values to 0…255, put the channels last and convert the array with .astype('uint8')",
        )
    check_pixels(array.shape[1], array.shape[0], "the array passed in")
    return Image.fromarray(np.ascontiguousarray(array))


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of a decoded picture for the vision encoder; the defaults are BLIP's.

    Attributes:
        resize: Whether to resize to `size`.
        size: {"height", "width"}, or {"shortest_edge"}, which keeps the aspect ratio; in pixels.
        crop: {"height", "width"} of the centre crop (zero-padded if the picture is smaller), or None.
        resample: Pillow's code of the resampling filter (3: bicubic).
        do_rescale: Whether to multiply by `rescale_factor`.
        rescale_factor: Factor on the pixel values, usually 1/255.
        do_normalize: Whether to subtract `mean` and divide by `std`, per channel.
        mean: Mean of each channel, R, G, B, after rescaling.
        std: Standard deviation of each channel, R, G, B, after rescaling.
        rescale_first: Whether pixel values are rescaled before resizing; resizing is then in floating point (DINOv3).

    Raises:
        ValueError: A field is outside its range.
    """

    resize: bool = True
    size: Mapping[str, int] = field(default_factory=lambda: {"height": 384, "width": 384})
    crop: Mapping[str, int] | None = None
    resample: int = BICUBIC
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    mean: tuple[float, float, float] = OPENAI_CLIP_MEAN
    std: tuple[float, float, float] = OPENAI_CLIP_STD
    rescale_first: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "crop"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _checked_size(name, value))
        resample: object = self.resample  # from JSON: any value, also one without a hash
        if not isinstance(resample, (int, float)) or resample not in _RESAMPLING_CODES:
            raise ValueError(f"resample: expected a Pillow code 0…5, got {self.resample!r}")
        if not np.isfinite(self.rescale_factor):
            raise ValueError(f"rescale_factor: expected a finite number, got {self.rescale_factor!r}")
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or not np.isfinite(values).all() or (name == "std" and 0.0 in values):
                raise ValueError(f"{name}: expected three finite numbers (std: not 0), got {list(values)}")
            object.__setattr__(self, name, values)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Returns height and width of a preprocessed picture in pixels; None if they depend on the original picture."""
        fixed = self.crop if self.crop is not None else (self.size if self.resize else {})
        return (fixed["height"], fixed["width"]) if "height" in fixed else None

    @property
    def spans(self) -> NDArray[np.float32]:
        """Returns the pixel value of white minus the pixel value of black, for each channel, float32 [3]."""
        spans: NDArray[np.float32] = np.abs(self._table[:, -1] - self._table[:, 0])
        return np.where(spans > 0, spans, np.float32(1))

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Makes the preprocessing from the JSON object that `to_json` returned.

        Raises:
            BundleError: A key is unknown, or a value is outside its range.
        """
        try:
            return cls(**config)
        except (TypeError, ValueError) as error:
            raise BundleError(f"bundle.json, preprocessing: {error}", "export the checkpoint again") from error

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as a JSON object; leaves out a false `rescale_first`, which older versions refuse."""
        fields = {name: value for name, value in asdict(self).items() if name != "rescale_first" or value}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

    def __call__(self, image: ImageSource, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.float32]:
        """Computes the pixel values of one picture.

        Args:
            image: A path, bytes or an array, which `load_image` converts first; or a Pillow image, which is processed
                as in transformers' processor: not turned by EXIF, with a white background behind transparent parts.
            limits: The largest picture.

        Returns:
            float32 [3,H,W].

        Raises:
            ImageError: The picture cannot be read, exceeds a limit, or is too thin to be resized.
        """
        if not isinstance(image, Image.Image):
            image = load_image(image, limits)
        check_pixels(image.width, image.height, "the picture passed in", limits)
        is_plain = image.mode == "RGB" and image.info.get("transparency") is None
        try:
            return self._pixels(image if is_plain else blend_on_white(image))
        except MemoryError as error:
            raise ImageError(
                f"the picture passed in: memory ran out for {image.width}×{image.height} pixels",
                "scale the picture down",
            ) from error

    def _pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """Computes the pixel values float32 [3,H,W] of an RGB picture."""
        if self.rescale_first and self.resize and self.do_rescale:
            size = self.resized(image.width, image.height)
            return self._normalized(resized_floats(image, size, self.resample, self.rescale_factor, self.crop))
        if self.resize:
            image = image.resize(self.resized(image.width, image.height), resample=self.resample)
        if self.crop is not None:
            width, height = self.crop["width"], self.crop["height"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        values = np.asarray(image)  # [H,W,3] uint8
        pixels = np.empty((3, *values.shape[:2]), np.float32)
        for channel in range(3):
            np.take(self._table[channel], values[:, :, channel], out=pixels[channel], mode="clip")
        return pixels

    def batch(self, images: Sequence[ImageSource], limits: Limits = DEFAULT_LIMITS) -> NDArray[np.float32]:
        """Preprocesses several pictures; returns their pixel values, float32 [B,3,H,W].

        Raises:
            ImageError: A picture cannot be decoded, there are no pictures, or their sizes after preprocessing differ.
        """
        pixels = [self(image, limits) for image in images]
        if not pixels:
            raise ImageError("expected at least one picture, got none")
        shapes = {array.shape for array in pixels}
        if len(shapes) > 1:
            sizes = ", ".join(sorted(f"{width}×{height}" for _, height, width in shapes))
            raise ImageError(
                f"expected pictures of one size after preprocessing, got {sizes}", "process the pictures one by one"
            )
        return np.stack(pixels)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Returns width and height after resizing (`get_resize_output_image_size` in transformers)."""
        if "height" in self.size:
            return self.size["width"], self.size["height"]
        short = self.size["shortest_edge"]
        long = int(short * max(width, height) / min(width, height))
        if short * long > MAX_PIXELS:
            raise ImageError(f"the picture passed in: {width}×{height} is too thin to be resized", "crop the picture")
        return (short, long) if width <= height else (long, short)

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        """Computes the pixel value for each channel and 8-bit value, float32 [3,256]; rounded as in transformers."""
        values = np.arange(256, dtype=np.float64)
        if self.do_rescale:
            values = values * self.rescale_factor
        return self._normalized(np.tile(values.astype(np.float32), (3, 1)))

    def _normalized(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalizes rescaled values [3,...] by the channels' mean and std, if `do_normalize` is set."""
        mean, std = (np.array(one, np.float32).reshape(3, *(1,) * (values.ndim - 1)) for one in (self.mean, self.std))
        return np.divide(values - mean, std, dtype=np.float32) if self.do_normalize else values


def _checked_size(name: str, size: Any) -> dict[str, int]:
    allowed = [{"height", "width"}] + ([{"shortest_edge"}] if name == "size" else [])
    if not isinstance(size, Mapping) or set(size) not in allowed:
        raise ValueError(f"{name}: expected the keys height and width, or shortest_edge, got {size!r}")
    checked = {key: int(value) for key, value in size.items()}
    if min(checked.values()) < 1 or math.prod(checked.values()) > MAX_PIXELS:
        raise ValueError(f"{name}: expected 1…{MAX_PIXELS} pixels, got {checked}")
    return checked
