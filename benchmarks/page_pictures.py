"""Takes the pictures of the page of ``serve`` for docs/serving.md: docs/page.png and docs/page-phone.png.

    blip2edge export examples/checkpoint -o /tmp/scenes
    python benchmarks/page_pictures.py /tmp/scenes --output docs

Needs Chromium. The page shows the pictures of examples/pictures, enlarged eight times, one of them from the camera.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from reporting import ROOT, bundle_path, parser_of

sys.path.insert(0, str(ROOT))

from blip2edge.cli import run_script
from blip2edge.runtime.captioning.captioner import Captioner
from tests.browser import Page, browser, fake_camera
from tests.live_server import live

SCALE = 8
LOADED = "document.getElementById('model').textContent"


def set_screen(page: Page, width: int, height: int, scheme: str) -> None:
    """Sets the size of the screen in CSS pixels, and its colors (``light`` or ``dark``)."""
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


def save(page: Page, path: Path) -> None:
    """Saves a screenshot of the page as a PNG file, compressed as far as possible."""
    path.write_bytes(page.screenshot())
    with Image.open(path) as picture:
        picture.convert("RGB").save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Opens the page of ``serve`` in Chromium, and saves its screenshots."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        files, pictures = [], []
        for path in sorted((ROOT / "examples" / "pictures").glob("*.png")):
            with Image.open(path) as picture:
                size = (SCALE * picture.width, SCALE * picture.height)
                pictures.append(picture.convert("RGB").resize(size, Image.Resampling.NEAREST))
            files.append(Path(folder, path.name))
            pictures[-1].save(files[-1])
        camera = fake_camera(Path(folder, "camera.y4m"), pictures[-1])
        captioner = Captioner.load(options.bundle, threads=1)
        with live(captioner) as (_, port), browser(Path(folder, "profile"), *camera) as page:
            set_screen(page, 760, 980, "light")
            page.open(f"http://127.0.0.1:{port}/", LOADED)
            page.choose("#file", files[:3])
            page.until("pictures.length === 3 && pictures.every(one => one.state === 'done') && !busy")
            save(page, options.output / "page.png")
            with page.another() as phone:
                set_screen(phone, 390, 720, "dark")
                phone.open(f"http://127.0.0.1:{port}/", LOADED)
                phone.value("$('camera').click()")
                phone.until("!$('video').hidden && $('times').textContent")
                save(phone, options.output / "page-phone.png")


if __name__ == "__main__":
    run_script(main)
