"""Prepares emoji and their names as data for training and evaluation.

    pip install cairosvg
    python examples/recipes/emoji/prepare.py --out runs/emoji/data

Downloads six artists' sets from the npm registry and renders the animals, plants and dishes of Noto's categories. Five
sets are for training. Twemoji is for the test, so training has every name of the test, but no drawing of its style. The
output is

    drawings.npz                RGBA of each training drawing, its name and its artist, for vision.py
    train/emoji-0000.tar …      WebDataset shards of augmented pictures, NAME.STYLE.NUMBER.png with .txt
    test/NAME.png, NAME.txt     one picture a name in the held-out style, on white
    seen/NAME.png, NAME.txt     the same names by a training artist, to compare with the held-out style
    data.json                   packages, names, counts

Licences: Noto and Noto v1 Apache-2.0, Fluent MIT, OpenMoji CC-BY-SA-4.0, EmojiOne and Twemoji CC-BY-4.0. This
repository contains no picture.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from blip2edge.errors import UsageError
from blip2edge.examples.recipes.emoji.augment import augment, may_mirror, plain, premultiplied
from blip2edge.examples.recipes.emoji.icons import IconSet, caption, names_of
from blip2edge.examples.recipes.packages import fetch_npm

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "emojione": "@iconify-json/emojione@1.2.3",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
HELD_OUT = "twemoji"
NAMING = "noto"  # its categories are used, and its pictures are in `seen`
COMPLETE = ("noto", "fluent-emoji-flat", "twemoji")  # a name is used if all of these have it
CATEGORIES = (
    "Animals & Nature",
    "Food & Drink",
)  # Noto has "Activities", "Objects" and "Travel & Places" too
PICTURE_SIZE = 64  # pixels
DRAWING_SIZE = 80  # pixels: larger than the picture, because it is rotated and scaled
SHARD = 4000  # pictures
CHUNK = 64  # pictures augmented at a time


def draw_all(sets: Mapping[str, IconSet], names: Sequence[str]) -> Iterator[tuple[str, str, NDArray[np.uint8]]]:
    """Renders all drawings of the names. Yields name, style and pixels [80, 80, 4]."""
    for name in names:
        for style, icons in sets.items():
            if name in icons.icons:
                yield name, style, icons.draw(name, DRAWING_SIZE)


def _png(picture: Tensor) -> bytes:
    """A picture float [3, H, W] from 0 to 1 as a PNG file."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_plain(drawings: Mapping[str, NDArray[np.uint8]], folder: Path) -> None:
    """Writes pictures on white, each with a text file of its name."""
    folder.mkdir(parents=True)
    for name, pixels in drawings.items():
        picture = plain(premultiplied(torch.tensor(pixels)[None]), PICTURE_SIZE)[0]
        (folder / f"{name}.png").write_bytes(_png(picture))
        (folder / f"{name}.txt").write_text(caption(name) + "\n", encoding="utf-8")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file with neither time nor owner in its header, so that equal data gives equal shards."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_shards(drawings: Sequence[tuple[str, str, NDArray[np.uint8]]], copies: int, folder: Path, seed: int) -> int:
    """Writes augmented pictures in random order. Returns the number of shards."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(drawings) * copies, generator=draw).tolist()
    shards = 0
    for start in range(0, len(order), SHARD):
        with tarfile.open(folder / f"emoji-{shards:04d}.tar", "w") as tar:
            for first in range(start, min(start + SHARD, len(order)), CHUNK):
                numbers = order[first : min(first + CHUNK, start + SHARD)]
                chosen = [drawings[number // copies] for number in numbers]
                pixels = premultiplied(torch.from_numpy(np.stack([pixels for _, _, pixels in chosen])))
                mirror = torch.tensor([may_mirror(name) for name, _, _ in chosen])
                pictures = augment(pixels, mirror, PICTURE_SIZE, draw)
                for number, (name, style, _), picture in zip(numbers, chosen, pictures, strict=True):
                    key = f"{name}-by-{style}-{number % copies}"
                    _add(tar, f"{key}.png", _png(picture))
                    _add(tar, f"{key}.txt", caption(name).encode())
        shards += 1
    return shards


def prepare(sets: Mapping[str, IconSet], metadata: Path, out: Path, *, copies: int, seed: int) -> dict[str, object]:
    """Writes all data.

    Args:
        sets: The sets by style, with all styles of `COMPLETE`.
        metadata: Noto's `metadata.json` with the categories.
        out: Output directory; must not exist.
        copies: Augmented pictures of each drawing.
        seed: Seed of the augmentation.

    Returns:
        Content of `data.json`.

    Raises:
        UsageError: `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists", "remove it, or give another directory with --out")
    names = names_of(metadata, CATEGORIES, [sets[style] for style in COMPLETE])
    drawn = list(draw_all(sets, names))
    train = [drawing for drawing in drawn if drawing[1] != HELD_OUT]
    for folder, style in (("test", HELD_OUT), ("seen", NAMING)):
        write_plain({name: pixels for name, of, pixels in drawn if of == style}, out / folder)
    np.savez_compressed(
        out / "drawings.npz",
        pixels=np.stack([pixels for _, _, pixels in train]),
        names=np.array([name for name, _, _ in train]),
        styles=np.array([style for _, style, _ in train]),
    )
    record: dict[str, object] = {
        "packages": PACKAGES,
        "held_out_style": HELD_OUT,
        "categories": list(CATEGORIES),
        "names": len(names),
        "drawings": {style: sum(of == style for _, of, _ in drawn) for style in sets},
        "copies": copies,
        "seed": seed,
        "shards": write_shards(train, copies, out / "train", seed),
    }
    (out / "data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prepares emoji and their names as data for training and evaluation.")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must not exist")
    parser.add_argument("--copies", type=int, default=12, help="augmented pictures of each drawing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        roots = {style: fetch_npm(package, Path(folder)) for style, package in PACKAGES.items()}
        sets = {style: IconSet.load(root / "icons.json") for style, root in roots.items()}
        metadata = roots[NAMING] / "metadata.json"
        record = prepare(sets, metadata, options.out, copies=options.copies, seed=options.seed)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
