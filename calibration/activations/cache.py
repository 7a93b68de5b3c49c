"""Observations of a graph on disk: the next calibration of the same graph on the same pictures does not run it again.

A file is keyed by the hash of the graph, that of its weights and that of the pictures, and ends with the hash of
what it holds, so that a broken one is recognised.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.calibration.activations.observations import Observation, Observations
from blip2edge.calibration.activations.ranges import BINS, Histogram

FORMAT = 1
DIGEST = 32  # bytes at the end: SHA-256 of everything before
FOLDER = "calibration"


def cache_path(bundle: Bundle, record: GraphRecord, feeds_sha256: str) -> Path:
    """Where the observations of a graph go.

    Args:
        bundle: The bundle.
        record: One of its graphs.
        feeds_sha256: Of what it is given: the pictures, and the graphs before it.
    """
    files = bundle.manifest.files
    parts = [files[name].sha256 for name in record.files]
    key = hashlib.sha256("\n".join([str(FORMAT), *parts, feeds_sha256]).encode()).hexdigest()
    return cache_directory() / FOLDER / f"{record.spec.name}-{key[:24]}.npz"


def load_observations(path: Path, names: Sequence[str]) -> Observations | None:
    """Reads a cache file.

    Args:
        path: The file.
        names: The activations that it must hold.

    Returns:
        None where there is no file.

    Raises:
        ValueError: The file is broken, or holds something else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    body, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{path} is damaged")
    try:
        with np.load(io.BytesIO(body)) as arrays:
            kept = json.loads(arrays["names"].tobytes())
            if kept != list(names):
                raise ValueError(f"{path} is of another graph")
            return {name: _restored(arrays, index) for index, name in enumerate(kept)}
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no calibration cache") from error


def save_observations(path: Path, observations: Observations) -> None:
    """Writes a cache file in one step, so that a reader never meets half of it."""
    arrays: dict[str, Any] = {"names": np.frombuffer(json.dumps(list(observations)).encode(), np.uint8)}
    for index, observation in enumerate(observations.values()):
        histogram = observation.histogram
        arrays[f"{index}.counts"] = histogram.counts
        arrays[f"{index}.scale"] = np.array([histogram.width, histogram.maximum])
        arrays[f"{index}.reach"] = observation.reach
        arrays[f"{index}.rows"] = observation.rows
        arrays[f"{index}.largest"] = observation.largest
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    body = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(body + hashlib.sha256(body).digest())
    part.replace(path)


def _restored(arrays: Any, index: int) -> Observation:
    histogram = Histogram()
    counts = arrays[f"{index}.counts"]
    if counts.shape != (BINS,):
        raise ValueError("a histogram has another number of bins")
    histogram.counts = counts
    histogram.width, histogram.maximum = map(float, arrays[f"{index}.scale"])
    return Observation(
        histogram, arrays[f"{index}.reach"], arrays[f"{index}.rows"], arrays[f"{index}.largest"]
    )
