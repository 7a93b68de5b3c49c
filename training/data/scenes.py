"""Generated scenes of two objects: a 64 × 64 picture with its one correct caption.

A scene holds two objects of different colours. Each has a shape, a colour and a size; the relation is the position of
the first object relative to the second. "A left of B" and "B right of A" describe the same picture, so the order is
fixed: the object whose colour comes first in the alphabet is named first. Each picture then has exactly one correct
caption, and exact match is a fair measure.

Needs NumPy and Pillow only, so a bundle can be scored where it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from blip2edge.choices import SPLITS, Split
from blip2edge.errors import UsageError, option

PICTURE_SIZE = 64  # pixels, both sides
SUPERSAMPLING = 4  # the scene is drawn this much larger, then averaged down: smooth edges

SHAPES = ("circle", "cross", "diamond", "ring", "square", "triangle")
SIZES = ("small", "large")
RADII = {"small": 7.5, "large": 12.0}  # pixels, half the extent of the object
RADIUS_JITTER = 0.8  # pixels, uniform around the radius of the size
COLOURS: dict[str, tuple[int, int, int]] = {  # in alphabetical order: the order of naming
    "blue": (50, 80, 230),
    "cyan": (50, 210, 215),
    "green": (40, 160, 60),
    "orange": (245, 140, 30),
    "pink": (250, 150, 190),
    "purple": (140, 50, 170),
    "red": (215, 35, 40),
    "yellow": (240, 225, 50),
}
COLOUR_JITTER = 14  # of 255, uniform, per channel and object
NOISE = 10  # of 255, uniform, per channel and pixel
BACKGROUND = (15, 75)  # of 255, the range of the background's grey
RELATIONS = {
    "above": "above",
    "below": "below",
    "left": "to the left of",
    "right": "to the right of",
}
CLEARANCE = 2.0  # pixels between the two objects along the axis of the relation
DOMINANCE = 5.0  # pixels by which the distance along that axis exceeds the other one

Kind = tuple[str, str]  # (colour, shape)

HELDOUT_PAIRS = 200  # of the 1008 unordered pairs of (colour, shape) with two colours
SPLIT_SEED = 20
_STREAMS = {"train": 1, "heldout": 2}


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Args:
        colour: A key of `COLOURS`.
        shape: One of `SHAPES`.
        size: One of `SIZES`.
        x: Horizontal centre in pixels, from the left edge.
        y: Vertical centre in pixels, from the upper edge.
        radius: Half the extent in pixels.
    """

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> Kind:
        """Returns (colour, shape) of the object.

        A scene belongs to the split "train" or "heldout" by the kinds of its two objects.
        """
        return (self.colour, self.shape)

    @property
    def phrase(self) -> str:
        """Returns the words for the object in the caption, such as "a large red circle"."""
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture and the objects that it shows.

    Args:
        first: The object that the caption names first: its colour comes first in the alphabet.
        second: The other object.
        relation: A key of `RELATIONS`: position of `first` relative to `second`.
        picture: RGB picture of `PICTURE_SIZE` × `PICTURE_SIZE` pixels.
    """

    first: SceneObject
    second: SceneObject
    relation: str
    picture: Image.Image

    @property
    def caption(self) -> str:
        """Returns the only correct caption, such as "a small blue ring above a large red circle"."""
        return f"{self.first.phrase} {RELATIONS[self.relation]} {self.second.phrase}"

    @property
    def keywords(self) -> tuple[str, ...]:
        """Returns the seven words that determine the caption, in the order of the caption."""
        one, two = self.first, self.second
        return (one.size, one.colour, one.shape, self.relation, two.size, two.colour, two.shape)


def all_pairs() -> list[tuple[Kind, Kind]]:
    """Lists every unordered pair of objects with two different colours, each as (colour, shape): 1008 pairs."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [(one, two) for one in kinds for two in kinds if one[0] < two[0]]


@functools.cache
def split_pairs(split: Split) -> tuple[tuple[Kind, Kind], ...]:
    """Returns the pairs of objects that a split may show. The two splits are disjoint and never change.

    Args:
        split: "train" or "heldout".

    Returns:
        808 pairs for training, 200 held out. Every single (colour, shape) occurs in training.

    Raises:
        UsageError: The split has another name.
    """
    if split not in SPLITS:
        raise UsageError(f"expected {option('split')} to be one of {', '.join(SPLITS)}, got {split!r}")
    pairs = all_pairs()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pairs))
    held = set(order[:HELDOUT_PAIRS].tolist())
    return tuple(pair for index, pair in enumerate(pairs) if (index in held) == (split == "heldout"))


def _place(rng: np.random.Generator, radii: Sequence[float]) -> tuple[str, NDArray[np.float64]]:
    """Draws two centres with an unambiguous relation.

    Args:
        rng: Random generator of the scene.
        radii: The two radii in pixels.

    Returns:
        The relation of the first to the second, and the centres [2, 2] as (x, y) in pixels.
    """
    relation = ("above", "below", "left", "right")[int(rng.integers(4))]
    axis = 0 if relation in ("left", "right") else 1
    low = np.array([[radius + 1.0] * 2 for radius in radii])
    high = PICTURE_SIZE - low
    while True:  # about three tries on average: the largest pair takes 50 of 64 pixels at most
        centres = rng.uniform(low, high)
        along, across = np.abs(centres[0] - centres[1])[[axis, 1 - axis]]
        if along >= sum(radii) + CLEARANCE and along >= across + DOMINANCE:
            break
    first_is_before = bool(centres[0, axis] < centres[1, axis])
    if first_is_before != (relation in ("above", "left")):  # mirror: the radii stay with their objects
        centres[:, axis] = PICTURE_SIZE - centres[:, axis]
    return relation, centres


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Returns the corners (x, y) of a polygon shape with its centre at (x, y), in pixels."""
    if shape == "square":
        half = 0.88 * radius
        corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    elif shape == "diamond":
        corners = [(0.0, -radius), (0.8 * radius, 0.0), (0.0, radius), (-0.8 * radius, 0.0)]
    elif shape == "triangle":
        side, foot = radius, 0.8 * radius
        corners = [(0.0, -radius), (side, foot), (-side, foot)]
    else:  # cross
        arm = 0.28 * radius
        quarter = [(arm, -radius), (arm, -arm), (radius, -arm)]
        corners = []
        for _ in range(4):
            corners += quarter
            quarter = [(-dy, dx) for dx, dy in quarter]
    return [(x + dx, y + dy) for dx, dy in corners]


def _draw(objects: Sequence[SceneObject], tints: NDArray[np.int64], grey: int, noise: NDArray[np.int16]) -> Image.Image:
    """Draws the objects on a grey picture that is larger than the result, scales it down, and adds the noise."""
    scale = SUPERSAMPLING
    canvas = Image.new("RGB", (PICTURE_SIZE * scale,) * 2, (grey, grey, grey))
    pen = ImageDraw.Draw(canvas)
    for thing, tint in zip(objects, tints, strict=True):
        fill = (int(tint[0]), int(tint[1]), int(tint[2]))
        x, y, radius = thing.x * scale, thing.y * scale, thing.radius * scale
        if thing.shape in ("circle", "ring"):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            if thing.shape == "ring":
                hole = 0.52 * radius
                pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=(grey, grey, grey))
        else:
            pen.polygon(_outline(thing.shape, x, y, radius), fill=fill)
    small = np.asarray(canvas.reduce(scale), dtype=np.int16)
    return Image.fromarray(np.clip(small + noise, 0, 255).astype(np.uint8))


def make_scene(index: int, *, split: Split = "train", seed: int = 0) -> Scene:
    """Makes one scene. The same arguments give the same pixels on every machine.

    Args:
        index: Number of the scene in the endless series, at least 0.
        split: Which pairs of (colour, shape) the scene may show: "train" or "heldout".
        seed: Seed of the series.

    Returns:
        The scene with its picture.

    Raises:
        UsageError: `index` or `seed` is negative, or `split` is unknown.
    """
    if index < 0 or seed < 0:
        raise UsageError(f"the number and the seed of a scene are at least 0, not {index} and {seed}")
    pairs = split_pairs(split)
    rng = np.random.default_rng([_STREAMS[split], seed, index])
    kinds = pairs[int(rng.integers(len(pairs)))]
    sizes = [SIZES[int(number)] for number in rng.integers(len(SIZES), size=2)]
    radii = [RADII[size] + float(rng.uniform(-RADIUS_JITTER, RADIUS_JITTER)) for size in sizes]
    relation, centres = _place(rng, radii)
    objects = [
        SceneObject(*kind, size, float(centre[0]), float(centre[1]), radius)
        for kind, size, centre, radius in zip(kinds, sizes, centres, radii, strict=True)
    ]
    tints = np.array([COLOURS[thing.colour] for thing in objects])
    tints = np.clip(tints + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=(2, 3)), 0, 255)
    grey = int(rng.integers(*BACKGROUND))
    noise = rng.integers(-NOISE, NOISE + 1, size=(PICTURE_SIZE, PICTURE_SIZE, 3), dtype=np.int16)
    return Scene(objects[0], objects[1], relation, _draw(objects, tints, grey, noise))


def scenes(count: int, *, split: Split = "train", seed: int = 0, start: int = 0) -> Iterator[Scene]:
    """Makes the scenes `start`, `start + 1`, … of a series, one at a time.

    Args:
        count: Number of scenes.
        split: Which pairs of (colour, shape) the scenes may show: "train" or "heldout".
        seed: Seed of the series.
        start: Number of the first scene.

    Yields:
        The scenes, each independent of the others.
    """
    for index in range(start, start + count):
        yield make_scene(index, split=split, seed=seed)


def all_captions(split: Split) -> list[str]:
    """Lists all captions of a split in a fixed order; the tokenizer is trained on these captions."""
    captions = []
    for (colour, shape), (other_colour, other_shape) in split_pairs(split):
        for size in SIZES:
            for relation in RELATIONS.values():
                for other in SIZES:
                    one, two = f"a {size} {colour} {shape}", f"a {other} {other_colour} {other_shape}"
                    captions.append(f"{one} {relation} {two}")
    return captions


def coverage(thing: SceneObject, patch: int) -> NDArray[np.bool_]:
    """Finds the patches of a scene's picture whose centre lies in the square around an object.

    Args:
        thing: The object.
        patch: Side of a patch in pixels; divides `PICTURE_SIZE`.

    Returns:
        bool [rows · columns] in reading order, as a vision transformer numbers its patches.
    """
    centres = (np.arange(PICTURE_SIZE // patch) + 0.5) * patch
    reach = thing.radius
    columns = np.abs(centres - thing.x) <= reach
    rows = np.abs(centres - thing.y) <= reach
    covered: NDArray[np.bool_] = (rows[:, None] & columns[None, :]).reshape(-1)
    return covered
