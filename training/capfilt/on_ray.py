"""CapFilt over many machines with Ray Data (the extra `ray`): the same function on the same batches.

All machines read the pictures and the models by the same paths, as from a shared disk. Texts and paths travel, and
verdicts come back; pictures do not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from blip2edge.errors import UsageError, option
from blip2edge.training.capfilt.filtering import Batch, CapFiltOptions, Judged, judge
from blip2edge.training.data.entries import Entry, FilePicture, Picture, Shown
from blip2edge.training.data.shards import TarPicture
from blip2edge.training.evaluation.judges import JudgeOptions, open_answerer, open_comparer

LOCAL = "local"


def _picture_to_json(picture: Picture) -> dict[str, Any]:
    if isinstance(picture, TarPicture):
        return {
            "shard": str(picture.shard.absolute()),
            "name": picture.name,
            "offset": picture.offset,
            "size": picture.size,
        }
    if isinstance(picture, FilePicture):
        return {"path": str(picture.path.absolute())}
    raise UsageError(f"expected pictures in files or shards, got {type(picture).__name__}")


def _picture_from_json(values: dict[str, Any]) -> Picture:
    if "path" in values:
        return FilePicture(Path(values["path"]))
    return TarPicture(Path(values["shard"]), values["name"], values["offset"], values["size"])


def batch_to_json(batch: Batch) -> str:
    """A batch as text, to be sent to another machine."""
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


def batch_from_json(text: str) -> list[Shown]:
    """The batch that was sent: what `judge` reads of it is the same."""
    batch = []
    for row in json.loads(text):
        picture = _picture_from_json(row["picture"])
        entries = [Entry(row["image_id"], row["image_id"], picture, caption) for caption in row["captions"]]
        batch.append(Shown(row["image_id"], picture, tuple(entries)))
    return batch


class Worker:
    """What runs on each machine: both models, loaded once.

    Args:
        options: Of `CapFiltOptions`, with absolute paths, as JSON.
    """

    def __init__(self, options: str) -> None:
        values = json.loads(options)
        captioning, matching = (JudgeOptions(**values[key]) for key in ("captioning", "matching"))
        self._captioner = open_answerer(Path(values["captioner"]), captioning)
        self._matcher = open_comparer(Path(values["matcher"]), matching)
        self._prompt = values["prompt"]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Judges one batch.

        Args:
            row: `number` and `batch`, as text.

        Returns:
            `number` and `judged`, as text.
        """
        results = judge(batch_from_json(row["batch"]), self._captioner, self._matcher, self._prompt)
        return {
            "number": row["number"],
            "judged": json.dumps([[result.captions, result.problem] for result in results]),
        }


def options_to_json(options: CapFiltOptions) -> str:
    """Options as text; paths are made absolute."""
    values = dataclasses.asdict(options)
    values["captioner"], values["matcher"] = (
        str(options.captioner.absolute()),
        str(options.matcher.absolute()),
    )
    return json.dumps(values)


def judge_on_ray(
    address: str, workers: int
) -> Callable[[Iterable[Batch], CapFiltOptions], Iterator[list[Judged]]]:
    """What judges batches over a cluster.

    Args:
        address: Of a Ray cluster, "auto" for the one that this machine belongs to, or "local" for this machine.
        workers: How many pairs of models are loaded, each on one CPU.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{option('ray')} needs Ray Data", "install it: pip install 'blip2edge[ray]'"
        ) from error

    def judge_batches(batches: Iterable[Batch], options: CapFiltOptions) -> Iterator[list[Judged]]:
        rows = [{"number": number, "batch": batch_to_json(batch)} for number, batch in enumerate(batches)]
        started = not ray.is_initialized()
        if started:
            # On this machine a Ray of its own; the dashboard is a server that nobody asked for.
            ray.init(
                address=address, include_dashboard=False if address == LOCAL else None, log_to_driver=False
            )
        try:
            ray.data.DataContext.get_current().execution_options.preserve_order = True
            data = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows), 4 * workers)))
            judged = data.map(
                Worker, fn_constructor_args=(options_to_json(options),), concurrency=workers, num_cpus=1
            )
            for row in judged.iter_rows():
                yield [
                    Judged(tuple((text, origin, value) for text, origin, value in captions), problem)
                    for captions, problem in json.loads(row["judged"])
                ]
        finally:
            if started:
                ray.shutdown()

    return judge_batches
