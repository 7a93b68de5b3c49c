"""Reads the frames of a video from a list, a folder of frames, a video file, or one picture that is repeated.

The file also has functions that convert arrays from BGR to RGB, and that draw a caption into a picture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from blip2edge.errors import ImageError, UsageError, one_line
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.packages import require
from blip2edge.picture_files import is_file_or_broken_link
from blip2edge.reading import reading
from blip2edge.runtime.images.preprocess import DeferredImage, ImageSource, check_pixels

if TYPE_CHECKING:
    from PIL import Image

ItemSource = ImageSource | Sequence[ImageSource]
"""What a user can pass as one item: a picture; for a model of videos, also pictures or an array ``[F, H, W, 3]``."""

Channels = Literal["rgb", "bgr"]
"""Order of an array's channels; ``bgr`` is OpenCV's."""

LINE_SHARE = 22  # lines of text in the height of a picture
LEAST_FONT = 12  # pixels

VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))


def chosen(total: int, count: int) -> list[int]:
    """Returns the indices of ``count`` of ``total`` frames, evenly spaced from the first frame on.

    If ``count`` is larger than ``total``, indices repeat. transformers' example for InstructBlipVideo selects the same
    frames.
    """
    return [index * total // count for index in range(count)]


def in_rgb(item: ItemSource, channels: Channels) -> ItemSource:
    """Puts the channels of an array, or of the arrays in a list, into the order R, G, B.

    Args:
        item: A picture or a video. Files and Pillow pictures are returned unchanged: their channels are known.
        channels: The order of the arrays' last axis, which has 3 channels, or 4 with alpha as the last.

    Raises:
        UsageError: ``channels`` is neither ``rgb`` nor ``bgr``.
    """
    if channels not in get_args(Channels):
        raise UsageError(f"expected channels to be 'rgb' or 'bgr', got {channels!r}", field="channels")
    if channels == "rgb":
        return item
    if isinstance(item, (list, tuple)):
        return [in_rgb(picture, channels) for picture in item]  # type: ignore[misc]  # a list has no lists in it
    if isinstance(item, DeferredImage):
        return DeferredImage(item.name, partial(_content_in_rgb, item, channels))
    if isinstance(item, np.ndarray) and item.ndim > 2:
        if item.shape[-1] == len("BGR"):
            return item[..., ::-1]  # a view: the array is not copied
        if item.shape[-1] == len("BGRA"):
            return item[..., [2, 1, 0, 3]]
    return item


def _content_in_rgb(item: DeferredImage, channels: Channels) -> Any:
    return in_rgb(item.content(), channels)


def pictures_of(items: Sequence[ItemSource], frames: int, limits: Limits = DEFAULT_LIMITS) -> list[ImageSource]:
    """Lists the pictures of several items, item by item.

    Args:
        items: Videos, as in :func:`load_frames`; if ``frames`` is 1, single pictures.
        frames: Number of pictures to select from each item.
        limits: Limits the frames of a video.

    Raises:
        ImageError: As in :func:`load_frames`.
        UsageError: An item is a list, and ``frames`` is 1.
    """
    if frames == 1:
        for item in items:
            if isinstance(item, (list, tuple)):
                raise UsageError(
                    f"expected one picture, got a list of {len(item)}", "this model takes one picture for each prompt"
                )
        return list(items)  # type: ignore[arg-type]  # preprocessing refuses what is no picture
    return [picture for item in items for picture in load_frames(item, frames, limits)]


def images_of_each(items: Sequence[ItemSource]) -> list[list[ImageSource]]:
    """Returns a list of images for each item, for models that read several images in one prompt (Flamingo).

    Raises:
        UsageError: An item has no image.
    """
    groups = [list(item) if isinstance(item, (list, tuple)) else [item] for item in items]
    if not all(groups):
        raise UsageError("expected at least one picture for every prompt, got none")
    return groups  # type: ignore[return-value]  # preprocessing refuses what is no picture


def load_frames(item: ItemSource, count: int, limits: Limits = DEFAULT_LIMITS) -> list[ImageSource]:
    """Loads evenly spaced frames of a video.

    Args:
        item: Pictures; an array ``[F, H, W, 3]`` uint8; a folder of frames, which are sorted by name with numbers
            compared as numbers; a video file; or one picture, which is repeated.
        count: How many frames to select.
        limits: Limits the frames of the video.

    Returns:
        ``count`` pictures.

    Raises:
        ImageError: There is no frame, there are too many, the video cannot be read, or the package that reads
            videos is missing.
    """
    if isinstance(item, DeferredImage):
        content = item.content()
        if not isinstance(content, (bytes, bytearray)):
            return load_frames(content, count, limits)
        item = DeferredImage(item.name, lambda: content)  # read once for all frames
    if isinstance(item, (str, os.PathLike)):
        path = Path(item)
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            return _from_video(path, count, limits)
        frames: Sequence[ImageSource] = _from_folder(path) if path.is_dir() else [item]
    elif isinstance(item, (list, tuple)) or (isinstance(item, np.ndarray) and item.ndim == 4):
        frames = list(item)
    else:
        frames = [item]  # type: ignore[list-item]
    if not frames:
        raise ImageError("expected a video of at least one frame, got none")
    _check_frames(len(frames), "the video", limits)
    return [frames[index] for index in chosen(len(frames), count)]


def _check_frames(total: int, name: str, limits: Limits) -> None:
    if total > limits.frames:
        raise ImageError(f"{name}: expected at most {limits.frames} frames, got {total}", "use a shorter video")


def _from_folder(folder: Path) -> list[ImageSource]:
    with reading(folder, "a folder", ImageError):
        listed = list(folder.iterdir())
    files = [path for path in listed if is_file_or_broken_link(path) and not path.name.startswith(".")]
    if not files:
        raise ImageError(f"{folder}: expected a folder of frames, got an empty one")
    return [*sorted(files, key=lambda path: _by_number(path.name))]


def _by_number(name: str) -> list[Any]:
    """Makes a sort key from a file name, in which digits count as numbers: ``frame2`` comes before ``frame10``."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]


def _from_video(path: Path, count: int, limits: Limits) -> list[ImageSource]:
    av = require("av", f"{path}: reading a video", ImageError)

    def explain(error: Exception) -> ImageError:  # also for an OSError: av's errors are some
        reason = "it has no picture stream" if isinstance(error, IndexError) else one_line(error)
        return ImageError(f"{path}: cannot be read as a video ({reason})", "convert the video to MP4")

    with reading(path, "a video", ImageError, explain=explain):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            check_pixels(stream.width, stream.height, str(path), limits)
            total = stream.frames or sum(1 for _ in islice(container.decode(video=0), limits.frames + 1))
            _check_frames(total, str(path), limits)
        with av.open(str(path)) as container:
            found = _pick(container, set(chosen(total, count)), limits)
    if not found:
        raise ImageError(f"{path}: expected a video of at least one frame, got none")
    last = found[max(found)]  # in place of frames that the header counts but the file does not have
    return [found.get(index, last) for index in chosen(total, count)]


def _pick(container: Any, wanted: set[int], limits: Limits) -> dict[int, ImageSource]:
    """Decodes the frames whose indices are in ``wanted`` to Pillow pictures; returns the pictures by index."""
    found: dict[int, ImageSource] = {}
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            check_pixels(frame.width, frame.height, f"frame {index} of the video", limits)
            found[index] = frame.to_image()
        if index >= max(wanted):
            break
    return found


def draw_caption(picture: Image.Image, text: str) -> Image.Image:
    """Returns a copy of an RGB picture with a text at the lower edge; the text is broken into lines that fit."""
    from PIL import ImageDraw, ImageFont

    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn, "RGBA")
    size = max(LEAST_FONT, picture.height // LINE_SHARE)
    font = ImageFont.load_default(size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > picture.width - size:
            lines.append(word)
        else:
            lines[-1] = longer
    height = round(1.3 * size)
    top = picture.height - height * len(lines) - size // 2
    draw.rectangle((0, top, picture.width, picture.height), (0, 0, 0, 160))
    for number, line in enumerate(lines):
        draw.text((size // 2, top + size // 4 + number * height), line, "white", font)
    return drawn
