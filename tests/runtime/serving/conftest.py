"""One Chromium for all tests of pages, with a camera that shows a picture; and a bundle for retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Page, browser, fake_camera

BOARD = "board.test"
"""A name that the browser resolves to this machine. It is no secure context without HTTPS, as a board's name."""


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The browser; tests open pages of their own with :meth:`Page.another`."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    from PIL import Image

    folder = tmp_path_factory.mktemp("chromium")
    camera = fake_camera(folder / "camera.y4m", Image.new("RGB", (320, 240), (200, 60, 40)))
    names = f"--host-resolver-rules=MAP {BOARD} 127.0.0.1"
    with browser(folder / "profile", "--ignore-certificate-errors", names, *camera) as page:
        yield page


@pytest.fixture
def page(chromium: Page) -> Iterator[Page]:
    """A page with storage of its own."""
    with chromium.another() as other:
        yield other


@pytest.fixture(scope="session")
def blip_itm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a random tiny BLIP for retrieval; not to be changed."""
    from blip2edge.export.pipeline import export_checkpoint
    from tests.families import drawing_blip

    folder = tmp_path_factory.mktemp("blip-itm")
    drawing_blip.save_blip(folder / "checkpoint", "retrieval", 3)
    return export_checkpoint(folder / "checkpoint", folder / "blip-itm", verify="sample").bundle
