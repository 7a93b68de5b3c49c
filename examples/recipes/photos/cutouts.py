"""Finds the training pictures: Tux Paint's stamps of animals, and Open Clip Art's drawings of the same animals."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

STAMPS = "usr/share/tuxpaint/stamps/animals"
CLIPART = "usr/share/openclipart"
NO_PHOTOS = ("cartoon", "toys", "dinosaur")  # folders of drawings and models

_SENTENCE = re.compile(r"an? ([a-z' -]+?)(?:[,.!(]| resembles | from |$)")
_TWO_WORDS = ("sea lion", "guinea fowl")  # whose last word is another animal, or none
_KEYWORD = re.compile(r"<(?:rdf:li|dc:title)[^>]*>([^<]+)<")


@dataclass(frozen=True)
class CutOut:
    """A picture with a transparent background.

    Attributes:
        path: The PNG file.
        name: A noun for the thing in the picture, such as "rabbit".
        photo: True for a photograph, False for a drawing.
    """

    path: Path
    name: str
    photo: bool


def noun_of(sentence: str) -> str:
    """Returns the noun in a stamp's sentence: "rabbit" for "A big eared rabbit."; empty if there is no single thing."""
    found = _SENTENCE.match(sentence.strip().lower())
    if not found:
        return ""
    phrase = found[1].strip()
    for pair in _TWO_WORDS:
        if phrase.endswith(pair):
            return pair
    return phrase.split()[-1]


def article(noun: str) -> str:
    """Returns the noun with its indefinite article, "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def stamps(root: Path) -> list[CutOut]:
    """Returns Tux Paint's photographs of animals, each with the noun from its English sentence."""
    found = []
    for text in sorted((root / STAMPS).rglob("*.txt")):
        picture = text.with_suffix(".png")
        if not picture.is_file() or set(NO_PHOTOS) & set(text.parts):
            continue
        noun = noun_of(text.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0])
        if noun:
            found.append(CutOut(picture, noun, photo=True))
    return found


def drawings(pictures: Path, documents: Path, names: Iterable[str]) -> list[CutOut]:
    """Returns the drawings of Open Clip Art whose title and keywords contain exactly one of the names.

    Args:
        pictures: Root of the unpacked package `openclipart-png`.
        documents: Root of the unpacked package `openclipart-svg`, whose SVG files contain the keywords.
        names: Nouns of the stamps.
    """
    wanted, found = set(names), []
    for path in sorted((pictures / CLIPART / "png/animals").rglob("*.png")):
        document = documents / CLIPART / "svg" / path.relative_to(pictures / CLIPART / "png").with_suffix(".svg")
        if not document.is_file():
            continue
        head = document.read_text(encoding="utf-8", errors="replace")[:6000]
        words = set(re.findall(r"[a-z]+", " ".join(_KEYWORD.findall(head)).lower()))
        named = words & wanted
        if len(named) == 1:
            found.append(CutOut(path, named.pop(), photo=False))
    return found
