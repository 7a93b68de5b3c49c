"""Stores the observed activations of a graph (histograms, samples) on disk.

So the next calibration of this graph on the same pictures can load them.

The file's name contains a hash of the graph, its weights, the pictures and the bundle that is calibrated. A file ends
with the hash of its content, so that a damaged file is detected.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.outputs.locks import BusyError, write_file
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.calibration.activations.histogram import BINS, Histogram
from blip2edge.calibration.activations.observer import Observation, Observations
from blip2edge.errors import DataError
from blip2edge.reading import parse_json, read_bytes, reading

FORMAT = 2
DIGEST = 32  # bytes at the end: SHA-256 of everything before
FOLDER = "calibration"
MAX_BYTES = 1 << 30  # of a cache, also when inflated: 4,000 activations of 8,192 bins have 260 MB


def cache_path(bundle: Bundle, record: GraphRecord, feeds_sha256: str) -> Path:
    """Returns the path of the file that caches the observed activations of a graph.

    Args:
        bundle: The bundle.
        record: The manifest's record of the graph.
        feeds_sha256: Hash of the pictures and of the bundle that runs on them.
    """
    files = bundle.manifest.files
    parts = [files[name].sha256 for name in record.files]
    key = hashlib.sha256("\n".join([str(FORMAT), *parts, feeds_sha256]).encode()).hexdigest()
    return cache_directory() / FOLDER / f"{record.spec.name}-{key[:24]}.npz"


def load_observations(path: Path, names: Sequence[str]) -> Observations | None:
    """Reads the observed activations of a graph from a cache file.

    Args:
        path: The cache file.
        names: Names of the activations that the file must contain.

    Returns:
        The observations by the activation's name; None if there is no file.

    Raises:
        DataError: The file is damaged, or contains other activations.
    """
    if not path.exists():
        return None
    with reading(path, "a calibration cache", DataError, f"remove {path}"):
        content = read_bytes(path, MAX_BYTES)
        body, digest = content[:-DIGEST], content[-DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("the file is damaged: its hash differs")
        _check_sizes(body)
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            if parse_json(arrays["names"].tobytes()) != list(names):
                raise ValueError("the file belongs to another graph")
            return {name: _restored(arrays, index) for index, name in enumerate(names)}


def _check_sizes(body: bytes) -> None:
    """Checks, before the arrays of an npz are inflated, that they need at most :data:`MAX_BYTES` of memory.

    Raises:
        ValueError: The arrays are larger, an array is not in version 1.0 of npy, or an array's header gives more bytes
            than the archive holds for it.
    """
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        total = sum(file.file_size for file in archive.infolist())
        if total > MAX_BYTES:
            raise ValueError(f"expected arrays of at most {MAX_BYTES} bytes, got {total}")
        for info in archive.infolist():
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"expected arrays in version 1.0 of npy, got {version}")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if math.prod(shape) * dtype.itemsize > info.file_size:
                raise ValueError(f"{info.filename!r:.60} of shape {shape} needs more than its {info.file_size} bytes")


def save_observations(path: Path, observations: Observations) -> None:
    """Writes the observations of a graph to a cache file.

    The file appears only when it is complete. If another process writes the same file at this moment, nothing is
    written.
    """
    arrays: dict[str, Any] = {"names": np.frombuffer(json.dumps(list(observations)).encode(), np.uint8)}
    for index, observation in enumerate(observations.values()):
        histogram = observation.histogram
        arrays[f"{index}.counts"] = histogram.counts
        arrays[f"{index}.scale"] = np.array([histogram.width, histogram.maximum])
        arrays[f"{index}.channel_max"] = observation.channel_max
        arrays[f"{index}.rows"] = observation.rows
        arrays[f"{index}.largest"] = observation.largest
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    body = buffer.getvalue()
    with suppress(BusyError):
        write_file(path, body + hashlib.sha256(body).digest())


def _restored(arrays: Any, index: int) -> Observation:
    histogram = Histogram()
    counts = arrays[f"{index}.counts"]
    if counts.shape != (BINS,) or counts.dtype.kind not in "iuf":
        raise ValueError(f"expected a histogram of {BINS} bins, got {counts.dtype} {list(counts.shape)}")
    scale = arrays[f"{index}.scale"]
    if scale.shape != (2,) or scale.dtype.kind not in "if":
        raise ValueError(f"expected a bin width and a maximum, got {scale.dtype} {list(scale.shape)}")
    histogram.counts = counts
    histogram.width, histogram.maximum = map(float, scale)
    channel_max, rows, largest = (arrays[f"{index}.{name}"] for name in ("channel_max", "rows", "largest"))
    dtypes, widths = (channel_max.dtype, rows.dtype, largest.dtype), {rows.shape[1:], largest.shape[1:]}
    if dtypes != (np.float32, np.float16, np.float16) or widths != {channel_max.shape} or channel_max.ndim != 1:
        raise ValueError(f"expected tokens as wide as the channels, got {widths} and {channel_max.shape}")
    return Observation(histogram, channel_max, rows, largest)
