"""Generates films for the benchmarks of ``watch --reuse-below``.

The scenes are like those on which the example checkpoint was trained. There are three kinds of films, which differ in
what moves. All films have camera noise.

    cuts       a scene stands still for a while, then the next one replaces it, or one object changes its colour
    movement   one of the two objects moves to another place or grows or shrinks, then both rest
    lighting   brightness and colour of the light drift all the time; scenes fade into each other
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.choices import Split
from blip2edge.training.data.scenes import COLOURS, PICTURE_SIZE, RADII, Scene, SceneObject, _draw, make_scene

Picture = NDArray[np.floating[Any]]
Film = list[NDArray[np.uint8]]
Random = np.random.Generator

NOISE = {"cuts": 3.0, "movement": 3.0, "lighting": 4.0}
"""Standard deviation of the camera noise by the kind of film, for pixel values from 0 to 255."""


def recoloured(scene: Scene) -> Picture:
    """Returns a scene's picture with another colour of the first object.

    The colour channels around the object are exchanged, so the grey background stays grey.
    """
    picture = np.asarray(scene.picture, np.float32).copy()
    thing = scene.first
    rows, columns = (slice(max(0, int(at - thing.radius - 1)), int(at + thing.radius + 2)) for at in (thing.y, thing.x))
    picture[rows, columns] = picture[rows, columns][..., [2, 0, 1]]
    return picture


def with_noise(picture: Picture, rng: Random, deviation: float) -> NDArray[np.uint8]:
    """Returns one frame of the film: the picture with camera noise."""
    return np.clip(picture + rng.normal(0, deviation, picture.shape), 0, 255).round().astype(np.uint8)


def cuts(shown: Iterator[Scene], rng: Random) -> Iterator[Picture]:
    """Yields scenes that stand still for 20 to 80 frames; in every third scene, an object then changes its colour."""
    for number, scene in enumerate(shown):
        yield from [np.asarray(scene.picture, np.float32)] * int(rng.integers(20, 80))
        if number % 3 == 0:
            yield from [recoloured(scene)] * int(rng.integers(20, 80))


def movement(shown: Iterator[Scene], rng: Random) -> Iterator[Picture]:
    """Yields scenes with 4 movements of an object, each of 10 to 30 frames, then 15 to 50 frames without movement."""
    for scene in shown:
        things = [scene.first, scene.second]
        tints = np.array([COLOURS[thing.colour] for thing in things])
        for _ in range(4):
            moved = int(rng.integers(2))
            start, goal = things[moved], _moved(things[moved], rng)
            steps = int(rng.integers(10, 30))
            for part in np.linspace(0, 1, steps):
                things[moved] = _between(start, goal, float(part))
                yield _drawn(things, tints)
            yield from [_drawn(things, tints)] * int(rng.integers(15, 50))


def _drawn(things: list[SceneObject], tints: NDArray[np.int64]) -> Picture:
    return np.asarray(_draw(things, tints, 40, np.zeros((PICTURE_SIZE, PICTURE_SIZE, 3), np.int16)), np.float32)


def _moved(thing: SceneObject, rng: Random) -> SceneObject:
    """Returns the object at another place, or at the same place in the other size."""
    if rng.random() < 0.25:
        size = "large" if thing.size == "small" else "small"
        return replace(thing, size=size, radius=RADII[size])
    low, high = thing.radius + 1, PICTURE_SIZE - thing.radius - 1
    x, y = (float(rng.uniform(low, high)) for _ in range(2))
    return replace(thing, x=x, y=y)


def _between(one: SceneObject, other: SceneObject, part: float) -> SceneObject:
    x, y, radius = (getattr(one, key) * (1 - part) + getattr(other, key) * part for key in ("x", "y", "radius"))
    return replace(one, x=x, y=y, radius=radius)


def lighting(shown: Iterator[Scene], rng: Random) -> Iterator[Picture]:
    """Yields scenes in a light that drifts by 30 % in brightness and 10 % in each colour; scenes fade over 8 frames."""
    periods, phases = rng.uniform(150, 400, 4), rng.uniform(0, 2 * np.pi, 4)
    before: Picture | None = None
    number = 0
    for scene in shown:
        now = np.asarray(scene.picture, np.float32)
        fade = [] if before is None else [before + (now - before) * step / 9 for step in range(1, 9)]
        for picture in fade + [now] * int(rng.integers(40, 100)):
            waves = np.sin(2 * np.pi * number / periods + phases)
            yield picture * np.float32((1 + 0.3 * waves[0]) * (1 + 0.1 * waves[1:]))
            number += 1
        before = now


KINDS: dict[str, Callable[[Iterator[Scene], Random], Iterator[Picture]]] = {
    "cuts": cuts,
    "movement": movement,
    "lighting": lighting,
}


def film(kind: str, frames: int, seed: int, split: Split = "heldout") -> Film:
    """Returns the first frames of a film of one of :data:`KINDS`; the same arguments give the same pixels."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    shown = (make_scene(index, split=split, seed=seed) for index in count())
    return [with_noise(picture, rng, NOISE[kind]) for picture in islice(KINDS[kind](shown, rng), frames)]
