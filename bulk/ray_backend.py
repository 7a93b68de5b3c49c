"""Captions the parts of the output on many machines with Ray Data; each machine runs the code of a run without Ray.

Parts are computed in any order and on any machine. This process writes the parts, in their order. Whether a picture is
a duplicate depends on all earlier pictures. So if duplicates are searched, there are two passes. In the first pass, the
machines compute the embeddings, and this process compares the embeddings. In the second pass, the machines caption the
pictures that are no duplicates.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from blip2edge.bulk.captioning import ChunkCaptioner, ChunkResult, Find
from blip2edge.bulk.duplicates import Embeddings
from blip2edge.bulk.listed import ListedPicture
from blip2edge.bulk.options import BulkOptions
from blip2edge.bulk.rows import Original, Row
from blip2edge.bulk.run_files import Chunk
from blip2edge.cluster.ray_data import map_on_ray
from blip2edge.errors import BundleError


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster: its address (see :func:`map_on_ray`), and the number of worker processes that load the bundle."""

    address: str
    workers: int = 1


class _Worker:
    """Base of the workers: loads a bundle in a process on a machine of the cluster.

    Args:
        options: The options as JSON, with the backend that the plan of the run names.
        pictures: Whether the results have the bytes of the pictures.
        loaded: JSON with bundle hash, backend and optimized graphs of the machine that started the run.

    Raises:
        BundleError: This machine loads another bundle, backend or set of optimized graphs, which may change captions.
    """

    def __init__(self, options: str, pictures: bool, loaded: str) -> None:
        self._captioner = ChunkCaptioner(BulkOptions.from_json(options), pictures)
        here = self._captioner.loaded()
        for name, value in json.loads(loaded).items():
            if here[name] != value:
                self._captioner.close()
                raise BundleError(
                    f"expected {name} {json.dumps(value)} on {platform.node()}, as in the plan of the run, "
                    f"got {json.dumps(here[name])}",
                    "give all machines the same bundle and the same packages",
                )


class CaptionWorker(_Worker):
    """A worker that captions parts of the output on a machine of the cluster."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Captions one part of the output.

        Args:
            row: The part, and ``originals`` as JSON: for each duplicate, number and similarity of its original; null
                if duplicates are not searched.

        Returns:
            The rows of the output as JSON, and the suffix and bytes of each picture.
        """
        known = json.loads(row["originals"])

        def find(numbers: Sequence[int], _: Embeddings) -> list[Original | None]:
            return [Original(*known[str(number)]) if str(number) in known else None for number in numbers]

        (result,) = self._captioner.captions([_chunk(row)], None if known is None else find)
        return {
            "rows": json.dumps([one.to_json() for one in result.rows]),
            "suffixes": json.dumps([suffix for suffix, _ in result.pictures]),
            "contents": [content for _, content in result.pictures],
        }


class EmbeddingWorker(_Worker):
    """A worker that computes the embeddings of pictures on a machine of the cluster."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the embeddings of the pictures of one part, batch by batch, and the pictures' numbers."""
        found = self._captioner.embeddings(_chunk(row))
        return {
            "numbers": json.dumps([numbers for numbers, _ in found]),
            "embeddings": [values.tobytes() for _, values in found],
        }


def captions_on_ray(
    chunks: Iterable[Chunk],
    options: BulkOptions,
    pictures: bool,
    loaded: Mapping[str, Any],
    find: Find | None,
    cluster: Cluster,
) -> Iterator[ChunkResult]:
    """Captions parts of the output on a cluster; yields the result of each part, in order.

    Args:
        chunks: The parts of the output.
        options: How to caption.
        pictures: Whether the results have the bytes of the pictures.
        loaded: Bundle hash, backend and optimized graphs of this machine; those of each worker must be equal.
        find: Finds duplicates. If None, duplicates are not searched.
        cluster: The Ray cluster that computes.

    Raises:
        BundleError: A machine of the cluster loads another bundle, backend or other optimized graphs.
    """
    rows = [
        {"number": chunk.number, "first": chunk.first, "items": json.dumps([item.to_json() for item in chunk.items])}
        for chunk in chunks
    ]
    if not rows:
        return
    arguments = replace(options, backend=loaded["backend"]).to_json(), pictures, json.dumps(dict(loaded))
    found: list[dict[int, Original] | None] = [None] * len(rows)
    kept: list[tuple[list[int], list[Embeddings]]] = [([], []) for _ in rows]
    if find is not None:
        for at, row in enumerate(map_on_ray(cluster.address, cluster.workers, EmbeddingWorker, arguments, rows)):
            originals_of: dict[int, Original] = {}
            for numbers, content in zip(json.loads(row["numbers"]), row["embeddings"], strict=True):
                values = np.frombuffer(content, np.float16).reshape(len(numbers), -1)
                originals = find(numbers, values)
                new = [place for place, one in enumerate(originals) if one is None]
                kept[at][0].extend(numbers[place] for place in new)
                kept[at][1].append(values[new])
                originals_of |= {number: one for number, one in zip(numbers, originals, strict=True) if one is not None}
            found[at] = originals_of
    for row, known in zip(rows, found, strict=True):
        row["originals"] = json.dumps(
            None if known is None else {number: (one.number, one.similarity) for number, one in known.items()}
        )
    for at, row in enumerate(map_on_ray(cluster.address, cluster.workers, CaptionWorker, arguments, rows)):
        numbers, parts = kept[at]
        yield ChunkResult(
            [Row.from_json(values) for values in json.loads(row["rows"])],
            found[at] or {},
            list(zip(json.loads(row["suffixes"]), row["contents"], strict=True)),
            numbers,
            np.concatenate(parts) if parts else np.zeros((0, 0), np.float16),
        )


def _chunk(row: dict[str, Any]) -> Chunk:
    items = tuple(map(ListedPicture.from_json, json.loads(row["items"])))
    return Chunk(int(row["number"]), int(row["first"]), items)
