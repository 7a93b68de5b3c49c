"""Runs CapFilt on many machines with Ray Data (the extra `ray`), by the same function on the same batches.

All machines must see pictures and models under the same paths, as on a shared disk. Paths and captions are sent to the
machines, and probabilities come back; pictures are not sent.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from blip2edge.errors import UsageError, option
from blip2edge.packages import install_command
from blip2edge.training.capfilt.pipeline import Batch, CapFiltOptions, ScoredPicture, score_batch
from blip2edge.training.data.entries import AnnotatedPicture, Entry, FilePicture, StoredPicture
from blip2edge.training.data.shards import ShardPicture
from blip2edge.training.evaluation.models import ModelOptions
from blip2edge.training.evaluation.open_model import open_captioner, open_matcher

_LOCAL = "local"


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
    """Reads the JSON of `batch_to_json`; the batch has everything that `score_batch` uses."""
    batch = []
    for row in json.loads(text):
        picture = _picture_from_json(row["picture"])
        entries = [Entry(row["image_id"], row["image_id"], picture, caption) for caption in row["captions"]]
        batch.append(AnnotatedPicture(row["image_id"], picture, tuple(entries)))
    return batch


class Worker:
    """Holds both models on a machine of the cluster and scores batches.

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
            `number` of the batch, and its results `judged` as JSON.
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
    """Makes the function that scores batches on a Ray cluster.

    Args:
        address: Address of a Ray cluster, "auto" for the cluster of this machine, or "local" for this machine only.
        workers: Number of workers. Each loads both models and uses one CPU.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise UsageError(f"{option('ray')} needs Ray Data, which is not installed", install_command("ray")) from error

    def score_batches(batches: Iterable[Batch], options: CapFiltOptions) -> Iterator[list[ScoredPicture]]:
        rows = [{"number": number, "batch": batch_to_json(batch)} for number, batch in enumerate(batches)]
        started = not ray.is_initialized()
        if started:
            # A local Ray is started without its dashboard, which would open a port.
            ray.init(address=address, include_dashboard=False if address == _LOCAL else None, log_to_driver=False)
        try:
            ray.data.DataContext.get_current().execution_options.preserve_order = True
            data = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows), 4 * workers)))
            judged = data.map(Worker, fn_constructor_args=(options_to_json(options),), concurrency=workers, num_cpus=1)
            for row in judged.iter_rows():
                yield [
                    ScoredPicture(tuple((text, origin, value) for text, origin, value in captions), problem)
                    for captions, problem in json.loads(row["judged"])
                ]
        finally:
            if started:
                ray.shutdown()

    return score_batches
