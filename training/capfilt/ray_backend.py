"""Runs CapFilt on many machines with Ray Data (the extra `ray`), with the same function and batches as on one machine.

Pictures and models must have the same paths on all machines, as on a shared disk. This process sends paths and captions
to the machines, and gets captions with their probabilities back; pictures are not sent.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from blip2edge.cluster.connection import check_ray
from blip2edge.cluster.ray_data import map_on_ray
from blip2edge.errors import UsageError
from blip2edge.training.capfilt.pipeline import Batch, CapFiltOptions, ScoredPicture, score_batch
from blip2edge.training.data.entries import AnnotatedPicture, Entry, FilePicture, StoredPicture
from blip2edge.training.data.shards import ShardPicture
from blip2edge.training.evaluation.models import ModelOptions
from blip2edge.training.evaluation.open_model import open_captioner, open_matcher


def _picture_to_json(picture: StoredPicture) -> dict[str, Any]:
    if isinstance(picture, ShardPicture):
        return {
            "shard": str(picture.shard.absolute()),
            "name": picture.name,
            "offset": picture.offset,
            "size": picture.size,
        }
    if isinstance(picture, FilePicture):
        return {"path": str(picture.path.absolute())}
    raise UsageError(f"expected pictures in files or shards, got {type(picture).__name__}")


def _picture_from_json(values: dict[str, Any]) -> StoredPicture:
    if "path" in values:
        return FilePicture(Path(values["path"]))
    return ShardPicture(Path(values["shard"]), values["name"], values["offset"], values["size"])


def batch_to_json(batch: Batch) -> str:
    """Converts a batch to JSON, to send it to another machine."""
    return json.dumps(
        [
            {
                "image_id": shown.image_id,
                "picture": _picture_to_json(shown.picture),
                "captions": shown.captions,
            }
            for shown in batch
        ]
    )


def batch_from_json(text: str) -> list[AnnotatedPicture]:
    """Makes a batch from JSON that `batch_to_json` returned; the batch has all values that `score_batch` uses."""
    batch = []
    for row in json.loads(text):
        picture = _picture_from_json(row["picture"])
        entries = [Entry(row["image_id"], row["image_id"], picture, caption) for caption in row["captions"]]
        batch.append(AnnotatedPicture(row["image_id"], picture, tuple(entries)))
    return batch


class Worker:
    """Loads the captioner and the matcher on a machine of the cluster, and scores batches.

    Args:
        options: The `CapFiltOptions` as JSON from `options_to_json`.
    """

    def __init__(self, options: str) -> None:
        values = json.loads(options)
        captioning, matching = (ModelOptions(**values[key]) for key in ("captioning", "matching"))
        self._captioner = open_captioner(Path(values["captioner"]), captioning)
        self._matcher = open_matcher(Path(values["matcher"]), matching)
        self._prompt = values["prompt"]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Scores one batch.

        Args:
            row: `number` of the batch, and the `batch` as JSON.

        Returns:
            `number` of the batch, and `judged`, the scored pictures of the batch as JSON.
        """
        results = score_batch(batch_from_json(row["batch"]), self._captioner, self._matcher, self._prompt)
        return {
            "number": row["number"],
            "judged": json.dumps([[result.captions, result.problem] for result in results]),
        }


def options_to_json(options: CapFiltOptions) -> str:
    """Converts the options to JSON, with absolute paths, to send them to the workers."""
    values = dataclasses.asdict(options)
    values["captioner"], values["matcher"] = (
        str(options.captioner.absolute()),
        str(options.matcher.absolute()),
    )
    return json.dumps(values)


def score_on_ray(
    address: str, workers: int
) -> Callable[[Iterable[Batch], CapFiltOptions], Iterator[list[ScoredPicture]]]:
    """Returns a function that scores batches on a Ray cluster.

    Args:
        address: Address of a Ray cluster, "auto" for the cluster of this machine, or "local" for this machine only.
        workers: Number of workers. Each loads both models and uses one CPU.

    Raises:
        UsageError: Ray is not installed, or ``address`` is none of these.
        ClusterError: Nothing listens at the address.
    """
    check_ray(address)

    def score_batches(batches: Iterable[Batch], options: CapFiltOptions) -> Iterator[list[ScoredPicture]]:
        rows = [{"number": number, "batch": batch_to_json(batch)} for number, batch in enumerate(batches)]
        for row in map_on_ray(address, workers, Worker, (options_to_json(options),), rows):
            yield [
                ScoredPicture(tuple((text, origin, value) for text, origin, value in captions), problem)
                for captions, problem in json.loads(row["judged"])
            ]

    return score_batches
