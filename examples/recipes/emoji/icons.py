"""Reads sets of icons in Iconify's JSON format and renders them to pixels.

A set is an `icons.json` whose `icons` maps names to `{"body": SVG elements, "width": …, "height": …}`. An icon without
width or height uses those of the set. `metadata.json` in the same directory has the names of each category. Only the
rendering needs `cairosvg`.
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
SKIN_TONE = "skin-tone"  # in the names of variants that differ in skin tone only


@dataclass(frozen=True)
class IconSet:
    """One artist's drawings.

    Attributes:
        style: Name of the set, such as `noto`.
        icons: Bodies and frames of the icons, by name.
        frame: Default frame of an icon.
    """

    style: str
    icons: dict[str, dict[str, Any]]
    frame: dict[str, float]

    @classmethod
    def load(cls, path: Path) -> IconSet:
        """Reads `icons.json`.

        Raises:
            DataError: The file is not in Iconify's format.
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
    """Sorted names of some categories that all sets have.

    Args:
        metadata: A `metadata.json`.
        categories: Names of the categories.
        sets: The sets that must have a name.

    Returns:
        Names, without variants of skin tone.

    Raises:
        DataError: There is no such category.
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
