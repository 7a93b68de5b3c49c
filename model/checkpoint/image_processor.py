"""Reads the preprocessing of a checkpoint from its file; missing keys get the defaults of the named image processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blip2edge.bundle.fields import finite_number
from blip2edge.errors import CheckpointError, one_line
from blip2edge.model.checkpoint.side_keys import IMAGE_PROCESSOR, check_keys, unread_warning
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.vision.registry import VISION_ENCODERS
from blip2edge.reading import checking
from blip2edge.runtime.images.preprocess import (
    BICUBIC,
    BILINEAR,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    Preprocessing,
)

SOURCES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", ""))
"""Where the preprocessing settings of a picture model can be: a file, and a key in it (empty for the whole file).

The first entry that exists is used, as in transformers.
"""

VIDEO_SOURCES = (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", ""),
    ("preprocessor_config.json", ""),
)
"""Where the preprocessing settings of a video model can be: a file, and a key in it (empty for the whole file).

The first entry that exists is used.
"""

SAVE_PROCESSOR = "save the processor too: AutoProcessor.from_pretrained(NAME).save_pretrained(DIRECTORY)"

SQUARE_384 = {"height": 384, "width": 384}
SQUARE_224 = {"height": 224, "width": 224}
SHORT_224 = {"shortest_edge": 224}
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageProcessorClass:
    """Defaults of one of transformers' image processor classes.

    All classes here resize, crop, rescale and normalise, in this order.

    Attributes:
        size: Size of the resized picture, in pixels.
        crop: Size of the centre crop, in pixels; None if the class has no crop.
        do_crop: Whether the class crops by default.
        resample: Pillow's number of the resampling filter.
        mean, std: One value for each channel, R, G, B.
        square: Whether a single number as ``size`` is the length of both edges; if not, the number is the length of
            the shortest edge.
        rescale_first: Whether the class rescales before it resizes, unlike the other classes.
    """

    size: Mapping[str, int] = field(default_factory=lambda: SHORT_224)
    crop: Mapping[str, int] | None = field(default_factory=lambda: SQUARE_224)
    do_crop: bool = True
    resample: int = BICUBIC
    mean: tuple[float, float, float] = OPENAI_CLIP_MEAN
    std: tuple[float, float, float] = OPENAI_CLIP_STD
    square: bool = False
    rescale_first: bool = False

    def settings(self) -> dict[str, Any]:
        """Returns the defaults of the class, by the keys of transformers' ``preprocessor_config.json``."""
        return {
            "do_resize": True,
            "size": self.size,
            "resample": self.resample,
            "do_center_crop": self.do_crop,
            "crop_size": self.crop,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean,
            "image_std": self.std,
        }


_CLIP = ImageProcessorClass()
_BLIP = ImageProcessorClass(SQUARE_384, None, do_crop=False, square=True)

CLASSES: dict[str, ImageProcessorClass] = {
    "Blip": _BLIP,
    "InstructBlipVideo": _BLIP,
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "Llava": _CLIP,
    "Bit": _CLIP,
    "Idefics": ImageProcessorClass(SQUARE_224, None, do_crop=False, square=True),
    "Siglip": ImageProcessorClass(SQUARE_224, None, do_crop=False, mean=HALF, std=HALF),
    "ViT": ImageProcessorClass(SQUARE_224, None, do_crop=False, resample=BILINEAR, mean=HALF, std=HALF, square=True),
    "DINOv3ViT": ImageProcessorClass(
        SQUARE_224,
        None,
        do_crop=False,
        resample=BILINEAR,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        square=True,
        rescale_first=True,
    ),
    "DeiT": ImageProcessorClass({"height": 256, "width": 256}, mean=HALF, std=HALF, square=True),
}
"""The supported image processor classes.

The key is the class name without its ending (``ImageProcessor``, ``ImageProcessorFast``, ``FeatureExtractor`` …).
"""

NAMES = ("image_processor_type", "feature_extractor_type")
"""Keys of a preprocessing file that name the image processor class; the first key that has a value is used."""

VIDEO_NAMES = ("video_processor_type", "image_processor_type")
"""Keys that name the class for a video model; the first key that has a value is used."""

_ENDINGS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor", "VideoProcessor")

VIDEO = "InstructBlipVideo"
"""The key in :data:`CLASSES` of the image processor class for videos."""

FAMILY_CLASSES = {"clip": "CLIP", "llava": "Llava", "idefics": "Idefics", "instructblipvideo": VIDEO}
"""The image processor class if the preprocessing file names none, by the ``model_type`` of ``config.json``.

For a ``model_type`` that is not listed, the class is ``Blip``.
"""


@dataclass(frozen=True)
class LoadedPreprocessing:
    """The preprocessing of a checkpoint.

    Attributes:
        preprocessing: The settings.
        values: The JSON object with these settings; the class is added if the object names none.
        where: File of the JSON object, for errors.
        warnings: Keys that are not used, and files with other settings that are not used.
    """

    preprocessing: Preprocessing
    values: Mapping[str, Any]
    where: str
    warnings: list[str]


def load_preprocessing(directory: Path) -> LoadedPreprocessing:
    """Reads the preprocessing of a checkpoint.

    Raises:
        CheckpointError: The checkpoint has no preprocessing, or a value is not supported.
    """
    config = directory / "config.json"
    model_type = read_checkpoint_json(config).get("model_type") if config.is_file() else None
    encoder = VISION_ENCODERS.get(str(model_type))
    otherwise = encoder.image_processor if encoder else FAMILY_CLASSES.get(str(model_type), "Blip")
    found = _sources(directory, VIDEO_SOURCES if otherwise == VIDEO else SOURCES)
    if not found:
        raise CheckpointError(
            f"{directory} has no processor_config.json and no preprocessor_config.json", SAVE_PROCESSOR
        )
    (where, values), *others = found.items()
    loaded = read_image_processor(values, where, otherwise)
    ignored = [name for name, other in others if not _same_steps(loaded.preprocessing, other, name, otherwise)]
    told = [f"{name}: not used, as {where} goes before it, as in transformers" for name in ignored]
    return replace(loaded, warnings=loaded.warnings + told)


def _sources(directory: Path, places: Sequence[tuple[str, str]]) -> dict[str, Mapping[str, Any]]:
    """Finds all preprocessing settings of a checkpoint; the caller uses the first.

    Args:
        directory: The checkpoint.
        places: Where settings can be: :data:`SOURCES` or :data:`VIDEO_SOURCES`.

    Returns:
        The settings, by the path of the file (with the key in it).

    Raises:
        CheckpointError: The first settings are not a JSON object.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name, part in places:
        path = directory / name
        values: Any = read_checkpoint_json(path) if path.is_file() else None
        where = f"{path}, {part}" if part else str(path)
        if values is not None and part:
            values = values.get(part)
        if isinstance(values, Mapping):
            found[where] = values
        elif values is not None and not found:
            raise CheckpointError(f"{where} must be an object, not {type(values).__name__}")
    return found


def _same_steps(used: Preprocessing, values: Mapping[str, Any], where: str, otherwise: str) -> bool:
    """Returns whether the settings ``values`` give the preprocessing ``used``."""
    try:
        return read_image_processor(values, where, otherwise).preprocessing == used
    except CheckpointError:
        return False


def read_image_processor(
    values: Mapping[str, Any], where: str = "preprocessor_config.json", otherwise: str = "Blip"
) -> LoadedPreprocessing:
    """Reads the preprocessing from the content of a ``preprocessor_config.json``.

    Args:
        values: The parsed JSON. A missing key has the default of the named class.
        where: Name of the file, for errors.
        otherwise: Key in :data:`CLASSES` of the class to use if the file names no class. If it is :data:`VIDEO`, this
            class is also used if the file names only a class for pictures.

    Raises:
        CheckpointError: The class is not supported, a value is outside its range, or a key selects a step that is
            not supported.
    """
    named, kind = _class_of(values, otherwise)
    row = CLASSES.get(kind)
    if row is None:
        raise CheckpointError(
            f"{where}: the image processor {named} is not supported",
            f"supported: {', '.join(f'{name}ImageProcessor' for name in CLASSES if not name.endswith('Video'))}",
        )
    warnings = check_keys(IMAGE_PROCESSOR, values, where)
    if kind != "Idefics":
        warnings += unread_warning(where, [key for key in ("image_size",) if values.get(key) is not None])
    settings = {**row.settings(), **{key: values[key] for key in row.settings() if key in values}}
    if kind == "Idefics" and values.get("image_size") is not None:
        settings["size"] = values["image_size"]

    def explain(error: Exception) -> CheckpointError:
        return CheckpointError(f"{where}: {one_line(error)}")

    with checking(where, "the settings of an image processor", CheckpointError, explain=explain):
        steps = {key: _flag(settings, key) for key in settings if key.startswith("do_")}
        needed = {"size": "do_resize", "crop_size": "do_center_crop", "rescale_factor": "do_rescale"}
        for key, step in {**needed, "image_mean": "do_normalize", "image_std": "do_normalize"}.items():
            if settings[key] is None and steps[step]:
                raise ValueError(f"{key}: expected a value, got null")
            if settings[key] is None or not steps[step]:
                settings[key] = row.settings()[key]
        preprocessing = Preprocessing(
            resize=steps["do_resize"],
            size=_size("size", settings["size"], _flag(values, "default_to_square", row.square)),
            crop=_size("crop_size", settings["crop_size"], square=True) if steps["do_center_crop"] else None,
            resample=BILINEAR if settings["resample"] is None else settings["resample"],
            do_rescale=steps["do_rescale"],
            rescale_factor=_number("rescale_factor", settings["rescale_factor"]),
            do_normalize=steps["do_normalize"],
            mean=_channels("image_mean", settings["image_mean"]),
            std=_channels("image_std", settings["image_std"]),
            rescale_first=row.rescale_first,
        )
    if not named:
        values = {"image_processor_type": f"{kind}ImageProcessor", **values}
    return LoadedPreprocessing(preprocessing, values, where, warnings)


def _class_of(values: Mapping[str, Any], otherwise: str) -> tuple[str, str]:
    """Returns the class name in a file (empty for none), and the key in :data:`CLASSES` of the class to use."""
    names = VIDEO_NAMES if otherwise == VIDEO else NAMES
    named = next((str(values[key]) for key in names if values.get(key)), "")
    kind = next((named.removesuffix(ending) for ending in _ENDINGS if named.endswith(ending)), named) or otherwise
    if otherwise == VIDEO and kind in CLASSES and not values.get(VIDEO_NAMES[0]):
        kind = VIDEO  # these classes have no variant for videos in transformers, which uses the model's class instead
    return named, kind


def _flag(values: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Reads a key that is true or false; null counts as false, as in transformers."""
    value = values.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key}: expected true or false, got {value!r}")
    return bool(value)


def _size(key: str, value: Any, square: bool) -> dict[str, int]:
    """Converts a size to a dict of edges in pixels; transformers allows an object, a number, or height and width."""
    if isinstance(value, Mapping):
        size = {name: edge for name, edge in value.items() if edge is not None}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        size = {"height": value[0], "width": value[1]}
    else:
        size = {"height": value, "width": value} if square else {"shortest_edge": value}
    if not all(isinstance(edge, int) and not isinstance(edge, bool) for edge in size.values()):
        raise ValueError(f"{key}: expected whole numbers of pixels, got {value!r}")
    return size


def _number(key: str, value: Any) -> float:
    finite_number()(value, key)
    return float(value)


def _channels(key: str, value: Any) -> tuple[float, float, float]:
    """Reads three numbers, one for each channel, from a list of three or from one number for all channels."""
    if not isinstance(value, (list, tuple)):
        return (_number(key, value),) * 3
    if len(value) != 3:
        raise ValueError(f"{key}: expected three numbers, got {len(value)}")
    red, green, blue = (_number(key, channel) for channel in value)
    return red, green, blue
