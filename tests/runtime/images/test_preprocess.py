"""Pictures to pixel values, bit by bit equal to transformers' Pillow processors."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from blip2edge.errors import BundleError, CheckpointError, ImageError, UsageError
from blip2edge.limits import Limits
from blip2edge.runtime.images.preprocess import Preprocessing, load_image

pytest.importorskip("transformers", reason="the oracle is transformers")
from transformers import image_utils
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from blip2edge.model.checkpoint.image_processor import read_image_processor

HEIGHT, WIDTH = 37, 53


def picture(channels: int = 3, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    rng = np.random.default_rng(channels)
    rough = rng.integers(0, 256, (height, width, channels))
    smooth = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] % 256
    return ((rough + 2 * smooth) // 3).astype(np.uint8)


def palette(transparency: bytes | int | None) -> Image.Image:
    image = Image.fromarray(picture()).quantize(16)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


MODES: dict[str, tuple[str, Callable[[], Image.Image]]] = {
    "rgb": ("png", lambda: Image.fromarray(picture())),
    "jpeg": ("jpg", lambda: Image.fromarray(picture())),
    "webp": ("webp", lambda: Image.fromarray(picture())),
    "grey": ("png", lambda: Image.fromarray(picture(1)[..., 0])),
    "bit": ("png", lambda: Image.fromarray(picture(1)[..., 0]).convert("1")),
    "rgba": ("png", lambda: Image.fromarray(picture(4))),
    "la": ("png", lambda: Image.fromarray(picture(4)).convert("LA")),
    "cmyk": ("jpg", lambda: Image.fromarray(picture()).convert("CMYK")),
    "palette": ("png", lambda: palette(None)),
    "palette-one": ("png", lambda: palette(3)),
    "palette-many": ("png", lambda: palette(bytes(range(0, 256, 16)))),
    "gif": ("gif", lambda: palette(2)),
}


@pytest.fixture(params=MODES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    suffix, make = MODES[request.param]
    path = tmp_path / f"picture.{suffix}"
    image = make()
    extra = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    image.save(path, **extra)
    return path


def opened(path: Path) -> Image.Image:
    """The picture, not decoded yet, without a file that stays open."""
    return Image.open(io.BytesIO(path.read_bytes()))


def loaded_by_transformers(source: Path | Image.Image) -> Image.Image:
    with warnings.catch_warnings():  # Pillow dislikes palettes with an alpha a colour
        warnings.simplefilter("ignore")
        return image_utils.load_image(opened(source) if isinstance(source, Path) else source)


def pixels_by(processor: Any, image: Any) -> NDArray[np.float32]:
    return processor(images=image, return_tensors="np")["pixel_values"][0]


def same_picture(ours: Image.Image, theirs: Image.Image) -> None:
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_every_mode_loads_as_in_transformers(file: Path) -> None:
    theirs = loaded_by_transformers(file)
    for source in (str(file), file, file.read_bytes(), opened(file)):
        same_picture(load_image(source), theirs)


def test_every_mode_gives_the_pixels_of_transformers(file: Path) -> None:
    blip: dict[str, Any] = {"size": {"height": 32, "width": 40}}
    clip: dict[str, Any] = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 36}}
    for config, processor in (
        (blip, BlipImageProcessorPil(**blip)),
        ({"image_processor_type": "CLIPImageProcessor", **clip}, CLIPImageProcessorPil(**clip)),
    ):
        ours = read_image_processor(config).preprocessing
        for source, same in (  # a file is loaded; an open picture is blended onto white
            (file, loaded_by_transformers(file)),
            (load_image(file), loaded_by_transformers(file)),
            (opened(file), opened(file)),
        ):
            pixels = ours(source)
            assert pixels.dtype == np.float32
            np.testing.assert_array_equal(pixels, pixels_by(processor, same))


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(picture()).save(path, exif=exif)
    theirs = loaded_by_transformers(path)
    assert theirs.size == ((HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT))
    same_picture(load_image(path), theirs)
    same_picture(load_image(opened(path)), theirs)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": 24},
        {"size": {"height": 20, "width": 31}, "resample": 2, "image_mean": [0.5, 0.5, 0.5]},
        {"size": [20, 31], "resample": 0, "image_std": [0.5, 0.25, 0.2]},
        {"do_resize": False},
        {"do_normalize": False, "size": 16},
        {"do_rescale": False, "size": 16},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0, "size": 16},
        {"resample": 1, "size": {"height": 90, "width": 11}},
    ],
)
def test_blip_settings(config: dict[str, Any]) -> None:
    image = Image.fromarray(picture())
    ours = read_image_processor({"image_processor_type": "BlipImageProcessor", **config}).preprocessing
    pixels = ours(image)
    np.testing.assert_array_equal(pixels, pixels_by(BlipImageProcessorPil(**config), image))
    assert ours.output_size in (None, pixels.shape[1:])
    np.testing.assert_array_equal(pixels, Preprocessing.from_json(json.loads(json.dumps(ours.to_json())))(image))


@pytest.mark.parametrize(("height", "width"), [(37, 53), (53, 37), (40, 40), (7, 90), (224, 300), (500, 3)])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": 48, "crop_size": 33},
        {"size": {"shortest_edge": 31}, "crop_size": {"height": 40, "width": 36}},  # padded with zeros
        {"size": {"shortest_edge": 30}, "do_center_crop": False},
        {"size": {"height": 30, "width": 50}, "crop_size": {"height": 45, "width": 21}},
        {"do_resize": False, "crop_size": {"height": 41, "width": 20}},
    ],
)
def test_clip_settings(config: dict[str, Any], height: int, width: int) -> None:
    image = Image.fromarray(picture(3, height, width))
    ours = read_image_processor({"feature_extractor_type": "CLIPFeatureExtractor", **config}).preprocessing
    np.testing.assert_array_equal(ours(image), pixels_by(CLIPImageProcessorPil(**config), image))


def test_configs_that_transformers_writes() -> None:
    for processor in (
        BlipImageProcessorPil(size={"height": 30, "width": 30}),
        CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 28, "width": 28}),
    ):
        ours = read_image_processor(json.loads(processor.to_json_string())).preprocessing
        image = Image.fromarray(picture())
        np.testing.assert_array_equal(ours(image), pixels_by(processor, image))
        assert ours.output_size == ours(image).shape[1:]


def test_batch() -> None:
    ours = Preprocessing(size={"height": 8, "width": 9})
    pair: list[Any] = [Image.fromarray(picture()), picture(1)]
    together = ours.batch(pair)
    assert together.shape == (2, 3, 8, 9)
    np.testing.assert_array_equal(together, np.stack([ours(image) for image in pair]))
    with pytest.raises(ImageError, match="none"):
        ours.batch([])
    with pytest.raises(ImageError, match="one size after preprocessing"):
        Preprocessing(size={"shortest_edge": 8}).batch([picture(), picture(3, 20, 20)])


def test_arrays() -> None:
    for channels in (1, 3, 4):
        array = picture(channels)
        image = Image.fromarray(array[..., 0] if channels == 1 else array)
        same_picture(load_image(array), loaded_by_transformers(image))
    same_picture(load_image(picture()[::-1, ::2]), Image.fromarray(picture()[::-1, ::2].copy()))


def bad_files(folder: Path) -> dict[str, Path]:
    whole = io.BytesIO()
    Image.fromarray(picture(3, 300, 300)).save(whole, "jpeg")
    png = io.BytesIO()
    Image.fromarray(picture(3, 300, 300)).save(png, "png")
    bomb = b"P6\n100000 100000\n255\n"
    contents = {
        "empty.jpg": b"",
        "text.jpg": b"this is no picture",
        "cut.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "cut.png": png.getvalue()[: len(png.getvalue()) // 2],
        "header.png": png.getvalue()[:20],
        "flipped.png": png.getvalue()[:60] + bytes(200) + png.getvalue()[260:],
        "bomb.ppm": bomb,
        "large.ppm": b"P6\n10000 10000\n255\n",  # above Pillow's warning, below its refusal
        "flat.ppm": b"P6\n0 5\n255\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "directory.png").mkdir()
    return {path.name: path for path in [*folder.iterdir(), folder / "missing.png", folder / ("x" * 300)]}


def test_bad_pictures_are_told_in_one_line(tmp_path: Path) -> None:
    files = bad_files(tmp_path)
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert len(files) == 12
    for name, path in files.items():
        for source in (path, str(path)):
            with pytest.raises(ImageError) as caught:
                load_image(source)
            message = str(caught.value)
            assert name[:80] in message or str(path)[:80] in message
            assert "\n" not in message
        if name in written:
            with pytest.raises(ImageError, match="the picture passed in"):
                load_image(path.read_bytes())
    with pytest.raises(ImageError, match="empty"):
        load_image(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match="directory"):
        load_image(tmp_path / "directory.png")
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "missing.png")
    for name in ("bomb.ppm", "large.ppm"):
        with pytest.raises(ImageError, match="pixels"):
            load_image(tmp_path / name)
    for source in ("https://example.org/dog.jpg", "dog\0.jpg", "", "/dev/null"):
        with pytest.raises(ImageError):
            load_image(source)


def test_bad_objects() -> None:
    for source in (
        picture().astype(np.float32),
        picture(2),
        picture()[0, 0],
        np.zeros((0, 5, 3), np.uint8),
        Image.new("RGB", (0, 4)),
        7,
    ):
        with pytest.raises(ImageError):
            load_image(source)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="pixel"):
        Preprocessing()(Image.new("RGB", (0, 4)))


def test_size_limits() -> None:
    with pytest.raises(ImageError, match="65535 a side"):
        load_image(Image.new("RGB", (1, 70_000)))
    thin = Image.new("RGB", (1, 60_000))
    with pytest.raises(ImageError, match="too thin"):
        Preprocessing(size={"shortest_edge": 1224})(thin)
    limits = Limits(pixels=HEIGHT * WIDTH)
    load_image(picture(), limits)
    with pytest.raises(ImageError, match="at most 1961 pixels"):
        load_image(picture(3, HEIGHT + 1), limits)
    with pytest.raises(UsageError, match="expected max_pixels of at most 89478485, got 89478486"):
        Limits(pixels=89_478_486)
    with pytest.raises(ImageError, match="at most 30 a side"):
        load_image(picture(), Limits(side=30))
    with pytest.raises(ImageError, match="at most 7843 bytes when it is decoded, got 7844"):
        load_image(picture(), Limits(decoded_bytes=4 * HEIGHT * WIDTH - 1))


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"longest_edge": 20}},
        {"size": {"height": 0, "width": 3}},
        {"size": "large"},
        {"resample": 9},
        {"image_mean": [0.1, 0.2]},
        {"image_std": [0.0, 1.0, 1.0]},
        {"image_std": None},
        {"do_pad": True},
        {"do_center_crop": True, "crop_size": {"height": 10**6, "width": 10**6}},
    ],
)
def test_bad_configs(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        read_image_processor(config)


def test_bad_manifest() -> None:
    for config in ({"size": 3}, {"sharpen": True}, {"mean": "bright"}):
        with pytest.raises(BundleError, match="preprocessing"):
            Preprocessing.from_json(config)
