"""How near a calibrated bundle is to its parent: cosine of each graph's outputs, and whether captions agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.schema import GraphSpec
from blip2edge.calibration.batches import Feeds, default_prompt
from blip2edge.calibration.pictures import Picture
from blip2edge.errors import BundleError, option
from blip2edge.progress import counted
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.images.preprocess import load_image

RUNS = 32
"""Runs whose outputs are compared, and pictures whose captions are."""


@dataclass(frozen=True)
class Cosine:
    """How alike two tensors are over several runs.

    Attributes:
        mean: Of the cosines of whole tensors, a run each.
        lowest: The lowest of them.
        lowest_token: The lowest cosine of a single vector along the last axis.
    """

    mean: float
    lowest: float
    lowest_token: float

    def to_json(self) -> dict[str, float]:
        """As it stands in ``bundle.json``."""
        return {name: round(value, 6) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Captions:
    """Two bundles' captions of the same pictures.

    Attributes:
        pictures: How many.
        same: Share of the pictures whose token ids are equal.
        parent, ours: The texts.
    """

    pictures: int
    same: float
    parent: tuple[str, ...]
    ours: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``bundle.json``: the figures, and the pairs that differ."""
        pairs = zip(self.parent, self.ours, strict=True)
        differing = [list(pair) for pair in pairs if pair[0] != pair[1]]
        return {"pictures": self.pictures, "same": round(self.same, 4), "differing": differing}


def cosine(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Of two arrays as vectors; 1 where both are zero."""
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale else float(not a.any() and not b.any())


def compare_graphs(
    spec: GraphSpec,
    parent: Path,
    ours: Path,
    feeds: Feeds,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Cosine]:
    """Both graphs on the same inputs.

    Returns:
        The cosine of each floating output, by name; presents of a cache are left out, as later layers and the
        logits show them.

    Raises:
        BundleError: The new graph gives values that are not finite.
    """
    outputs = [
        tensor.name
        for tensor in spec.outputs
        if "float" in tensor.dtype and not tensor.name.startswith("present.")
    ]
    session = OnnxRuntimeSession(parent, threads)
    wanted = [session.run(inputs, outputs) for inputs in feeds.runs(spec.name, RUNS)]
    session.close()  # one graph at a time is in memory
    session = OnnxRuntimeSession(ours, threads)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in outputs}
    pairs = zip(feeds.runs(spec.name, RUNS), wanted, strict=True)
    for inputs, parents in counted(pairs, len(wanted), progress):
        got = session.run(inputs, outputs)
        for name in outputs:
            if not np.isfinite(got[name]).all():
                raise BundleError(
                    f"the rounded {spec.name} gives values in {name} that are not finite",
                    f"calibrate with another {option('method')} or {option('weights')}, or a bundle in fp32",
                )
            runs[name].append((cosine(parents[name], got[name]), _lowest_token(parents[name], got[name])))
    session.close()
    return {name: _summary(seen) for name, seen in runs.items() if seen}


def _lowest_token(first: NDArray[Any], second: NDArray[Any]) -> float:
    a = first.astype(np.float64).reshape(-1, first.shape[-1])
    b = second.astype(np.float64).reshape(-1, first.shape[-1])
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.where(scale > 0, (a * b).sum(axis=1) / np.maximum(scale, 1e-30), 1.0).min())


def _summary(pairs: Sequence[tuple[float, float]]) -> Cosine:
    whole, tokens = zip(*pairs, strict=True)
    return Cosine(float(np.mean(whole)), min(whole), min(tokens))


def caption_pictures(
    bundle: str | Path,
    pictures: Sequence[Picture],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, tuple[int, ...]]]:
    """The captions of a bundle, greedily, as texts and token ids."""
    captioner = Captioner.load(bundle, backend="cpu", threads=threads)
    prompt = default_prompt(captioner.prompter)
    found = []
    for picture in counted(pictures, len(pictures), progress):
        result = captioner.caption(load_image(picture.read()), prompt=prompt)
        found.append((result.text, result.tokens))
    return found


def compare_captions(
    parent: Sequence[tuple[str, tuple[int, ...]]], ours: Sequence[tuple[str, tuple[int, ...]]]
) -> Captions:
    """How many captions are the same, token by token."""
    same = [one[1] == two[1] for one, two in zip(parent, ours, strict=True)]
    return Captions(
        len(same), float(np.mean(same)), tuple(text for text, _ in parent), tuple(text for text, _ in ours)
    )
