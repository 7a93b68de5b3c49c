"""Sets of icons in Iconify's JSON format: which names they share, and their drawings as pixels.

A set is an `icons.json` with `icons` from names to `{"body": SVG elements, "width": …, "height": …}`; what an icon
does not say of its frame holds for the whole set. `metadata.json` beside it sorts names into categories.
Needs `cairosvg` for the drawing alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2edge.errors import DataError

FRAME = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults
SKIN_TONE = "skin-tone"  # part of the names of variants that differ in nothing else


@dataclass(frozen=True)
class IconSet:
    """One artist's drawings.

    Attributes:
        style: The set's name, `noto`.
        icons: From names to bodies and frames.
        frame: What holds for icons that say nothing else.
    """

    style: str
    icons: dict[str, dict[str, Any]]
    frame: dict[str, float]

    @classmethod
    def load(cls, path: Path) -> IconSet:
        """Reads `icons.json`.

        Raises:
            DataError: The file is not of Iconify's format.
        """
        content = _read(path)
        icons = content.get("icons")
        if not isinstance(icons, dict) or not all("body" in icon for icon in icons.values()):
            raise DataError(f"{path}: expected Iconify's format, icons with a body each")
        frame = {key: content.get(key, value) for key, value in FRAME.items()}
        return cls(str(content.get("prefix", path.parent.name)), icons, frame)

    def svg(self, name: str) -> str:
        """One icon as a whole SVG document.

        Raises:
            DataError: The set has no icon of that name.
        """
        if name not in self.icons:
            raise DataError(f"{self.style} has no icon called {name!r}")
        icon = self.icons[name]
        left, top, width, height = (icon.get(key, value) for key, value in self.frame.items())
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )

    def draw(self, name: str, size: int) -> NDArray[np.uint8]:
        """One icon as pixels: RGBA [size, size, 4], colours not multiplied by alpha."""
        import cairosvg

        png = cairosvg.svg2png(self.svg(name).encode(), output_width=size, output_height=size)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content


def names_of(metadata: Path, categories: Sequence[str], sets: Sequence[IconSet]) -> list[str]:
    """The names of some categories that every one of the sets has drawn, sorted.

    Args:
        metadata: A `metadata.json`.
        categories: Which.
        sets: Who must have drawn a name.

    Returns:
        Names without variants of skin.

    Raises:
        DataError: A category is not there.
    """
    known = _read(metadata).get("categories", {})
    for category in categories:
        if category not in known:
            raise DataError(f"{metadata} has no category {category!r}", f"it has {', '.join(known)}")
    names = {name for category in categories for name in known[category] if SKIN_TONE not in name}
    return sorted(name for name in names if all(name in one.icons for one in sets))


def caption(name: str) -> str:
    """A name as words: `hot-beverage` is "hot beverage"."""
    return name.replace("-", " ")
