"""Prepares captioned photographs of animals as data for training and evaluation.

    python examples/recipes/photos/prepare.py --out runs/photos/data

Downloads Debian packages with `apt-get download` and unpacks them; nothing is installed. Cut-outs of animals are put
on backgrounds, several views of each. The photographs of GCompris are for the test. The output is

    train/NAME-0-000.jpg, .txt   views of the training pictures, 224 x 224, with "a photo of a NAME"
    val/NAME-0-000.jpg, .txt     further views of the same pictures, to watch the training
    test/NAME.png, NAME.txt      the photographs of the held-out package, each with its title
    data.json                    packages, names, counts

Licences: tuxpaint-stamps-default GPL-2, openclipart-png and openclipart-svg public domain, mate-backgrounds GPL-2+ (the
backgrounds), gcompris-qt-data GPL-3+, its photographs CC0 or public domain and others. This repository contains no
picture of them.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from blip2edge.cli import run_script
from blip2edge.examples.recipes.outputs import check_new
from blip2edge.examples.recipes.packages import fetch_debian
from blip2edge.examples.recipes.photos.cutouts import CutOut, article, drawings, stamps
from blip2edge.examples.recipes.photos.qt_resources import read_resources
from blip2edge.examples.recipes.photos.views import opened, view

PACKAGES = {
    "stamps": "tuxpaint-stamps-default",
    "drawings": "openclipart-png",
    "keywords": "openclipart-svg",
    "backgrounds": "mate-backgrounds",
    "test": "gcompris-qt-data",
}
BACKGROUNDS = ("Aqua", "Dune", "Garden", "GreenMeadow", "Storm", "Wood")  # of MATE, without animals
RESOURCES = "usr/share/gcompris-qt/rcc"
ACTIVITIES = ("explore_farm_animals", "explore_world_animals", "erase")  # those with photographs of animals
RENAMED = {
    "flying_fox": "bat",
    "chamaeleon": "chameleon",
    "dragon": "komodo dragon",
    "rhinoceros": "rhino",
    "kitten": "cat",
    "calf": "cow",
    "camels": "camel",
    "swans": "swan",
    "meerkats": "meerkat",
    "spoonbills": "spoonbill",
    "northern_harrier": "harrier",
}
"""File names of photographs that are no plain name of the animal."""

LEAST_VIEWS = 4  # of a picture


def held_out(root: Path) -> dict[str, tuple[str, bytes]]:
    """Returns the photographs of GCompris: (title, bytes of the WebP file), by activity and file name."""
    found = {}
    for activity in ACTIVITIES:
        for path, content in sorted(read_resources(root / RESOURCES / f"{activity}.rcc").items()):
            if path.endswith(".webp"):
                stem = Path(path).stem
                found[f"{activity}-{stem}"] = (RENAMED.get(stem, stem.replace("_", " ")), content)
    return found


def write_views(
    cut_outs: Sequence[CutOut], photos: Sequence[Image.Image], folder: Path, views: int, draw: np.random.Generator
) -> int:
    """Writes views of all cut-outs, about equally many for each name. Returns the number of views."""
    folder.mkdir(parents=True)
    counts, written = Counter(cut_out.name for cut_out in cut_outs), 0
    for number, cut_out in enumerate(cut_outs):
        picture = opened(Image.open(cut_out.path))
        for each in range(max(min(LEAST_VIEWS, views), views // counts[cut_out.name])):
            stem = f"{cut_out.name.replace(' ', '_')}-{number}-{each:03d}"
            view(picture, photos, draw).save(folder / f"{stem}.jpg", quality=92)
            (folder / f"{stem}.txt").write_text(f"a photo of {article(cut_out.name)}\n", encoding="utf-8")
            written += 1
    return written


def write_test(photographs: Mapping[str, tuple[str, bytes]], folder: Path) -> None:
    """Writes the photographs of the test as PNG files, with their titles."""
    folder.mkdir(parents=True)
    for name, (title, content) in photographs.items():
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        picture.thumbnail((512, 512))
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{title}\n", encoding="utf-8")


def prepare(roots: Mapping[str, Path], out: Path, *, views: int, seed: int) -> dict[str, object]:
    """Writes the data for training, validation and test, and `data.json`.

    Args:
        roots: The unpacked packages, by the keys of `PACKAGES`.
        out: Output directory; must not exist.
        views: Number of views for each name. The pictures of a name get equal shares, but at least four views each.
        seed: Seed of the views.

    Returns:
        Content of `data.json`.

    Raises:
        OutputError: `out` exists.
        DataError: A package has other files than expected.
    """
    check_new(out)
    draw = np.random.default_rng(seed)
    photographs = stamps(roots["stamps"])
    names = sorted({stamp.name for stamp in photographs})
    drawn = drawings(roots["drawings"], roots["keywords"], names)
    nature = roots["backgrounds"] / "usr/share/backgrounds/mate/nature"
    photos = [Image.open(nature / f"{name}.jpg").convert("RGB") for name in BACKGROUNDS]
    for photo in photos:
        photo.thumbnail((1024, 1024))
    test = held_out(roots["test"])
    record: dict[str, object] = {
        "packages": PACKAGES,
        "names": names,
        "photographs": len(photographs),
        "drawings": len(drawn),
        "test": len(test),
        "seed": seed,
        "train": write_views([*photographs, *drawn], photos, out / "train", views, draw),
        "val": write_views(photographs, photos, out / "val", 1, draw),
    }
    write_test(test, out / "test")
    (out / "data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main() -> None:
    """Parses the command line, fetches the packages and writes the data."""
    parser = argparse.ArgumentParser(description="Prepares captioned photographs of animals.")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must not exist")
    parser.add_argument("--views", type=int, default=24, help="views of each name")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    check_new(options.out)  # before packages of 500 MB are downloaded
    with tempfile.TemporaryDirectory() as folder:
        roots = {key: fetch_debian(package, Path(folder)) for key, package in PACKAGES.items()}
        record = prepare(roots, options.out, views=options.views, seed=options.seed)
    print(json.dumps({**record, "names": len(record["names"])}, indent=2))  # type: ignore[arg-type]


if __name__ == "__main__":
    run_script(main)
