"""Compares the captions of the page of ``serve`` with those of ``Captioner.caption`` for the same files.

    python benchmarks/page_captions.py BUNDLE --json benchmarks/results/page-captions.json

The files are generated scenes in several sizes and formats (JPEG, turned JPEG, PNG with a palette, GIF, WebP). For
comparison, the script also captions the same pictures as JPEG of at most 640 pixels. A page that draws the pictures on
a canvas first would send them in this form.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from reporting import ROOT, bundle_path, parser_of, write_result

sys.path.insert(0, str(ROOT))

from blip2edge.cli import run_script
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.training.data.scenes import scenes
from tests.browser import Page, browser
from tests.live_server import live

SEED, SIDES, TURNED = 41, (40, 64, 96, 700, 1400), 6  # TURNED: EXIF orientation, a quarter turn
NOISE = 40.0  # standard deviation, in 255ths
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    (".jpg", {"quality": 85}),
    (".jpg", {"quality": 60, "turned": True}),
    (".png", {"palette": True}),
    (".gif", {}),
    (".webp", {"quality": 80}),
)
CANVAS = """Promise.all(pictures.map(async picture => {
    await picture.image.decode();
    const {naturalWidth: width, naturalHeight: height} = picture.image;
    const scale = Math.min(1, 640 / Math.max(width, height));
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.getContext("2d").drawImage(picture.image, 0, 0, canvas.width, canvas.height);
    return (await caption(canvas.toDataURL("image/jpeg", 0.9), () => {})).text;
}))"""


def draw(folder: Path, count: int) -> list[Path]:
    """Saves scenes in all sizes and formats."""
    files, rng = [], np.random.default_rng(SEED)
    for number, scene in enumerate(scenes(count, split="heldout", seed=SEED)):
        side = SIDES[number // len(KINDS) % len(SIDES)]
        suffix, options = KINDS[number % len(KINDS)]
        options = dict(options)
        noise = rng.normal(0, NOISE, (side, side, 3))
        clean = np.asarray(scene.picture.resize((side, side), Image.Resampling.BICUBIC), np.float32)
        picture = Image.fromarray(np.clip(clean + noise, 0, 255).astype(np.uint8))
        if options.pop("turned", False):
            picture = picture.transpose(Image.Transpose.ROTATE_90)
            exif = Image.Exif()
            exif[0x0112] = TURNED
            options["exif"] = exif
        if options.pop("palette", False):
            picture = picture.quantize(64)
        files.append(folder / f"{number:03}{suffix}")
        picture.save(files[-1], **options)
    return files


def on_the_page(page: Page, files: list[Path]) -> list[str]:
    """Captions the files on the page of ``serve``; returns the captions that the page shows."""
    page.choose("#file", files)
    page.until(f"pictures.length === {len(files)} && pictures.every(one => one.state === 'done') && !busy")
    texts: list[str] = page.value("pictures.map(one => one.text.textContent)")
    return texts


def main() -> None:
    """Compares the captions, and writes how many differ."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        files = draw(Path(folder), options.pictures)
        captioner = Captioner.load(options.bundle, threads=1)
        direct = [captioner.caption(file).text for file in files]
        with live(captioner) as (_, port), browser(Path(folder, "profile")) as page:
            page.open(f"http://127.0.0.1:{port}/", "document.getElementById('model').textContent")
            shown = on_the_page(page, files)
            redrawn = page.value(CANVAS)
    differ = sum(map(str.__ne__, direct, shown))
    canvas = sum(map(str.__ne__, direct, redrawn))
    print(f"of {len(files)} captions, {differ} of the page and {canvas} of a canvas differ from Captioner.caption")
    write_result(options.json, pictures=len(files), page_differs=differ, canvas_differs=canvas)


if __name__ == "__main__":
    run_script(main)
