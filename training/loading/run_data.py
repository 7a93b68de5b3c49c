"""The training data of a run: its division among streams and processes, and a check before the model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from blip2edge.errors import ConfigError, DataError
from blip2edge.training.config import TrainingConfig
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.list_source import ListSource
from blip2edge.training.data.registry import SOURCE_MAKERS, open_sample_source
from blip2edge.training.data.sources import Sample, SampleSource
from blip2edge.training.data.streams.mixture import set_probabilities
from blip2edge.training.fields import table_title
from blip2edge.training.key_rules import choice
from blip2edge.training.loading.features import of_shape


def open_sources(
    config: TrainingConfig, base: Path, accelerator: Accelerator, seed: int
) -> SampleSource | list[SampleSource]:
    """Opens the source of a phase's samples; with several data streams, the sources of this process' streams.

    Args:
        config: The recipe; its number of streams was checked by :func:`check_data`.
        base: Directory of the recipe.
        accelerator: Rank and number of processes.
        seed: Seed of the order; each phase has its own.
    """
    streams = config.loop.data_streams
    if streams == 1:
        return open_sample_source(config.data, seed=seed, base=base)
    own = _own_streams(streams, accelerator)
    return [open_sample_source(config.data, seed=seed, base=base, part=(number, streams)) for number in own]


def check_usable(sources: SampleSource | Sequence[SampleSource], use: Callable[[Sample], object]) -> None:
    """Raises DataError if a data set has no sample that can be used (see `SampleSource.check_usable`)."""
    for source in sources if isinstance(sources, Sequence) else [sources]:
        source.check_usable(use)


def check_data(
    config: TrainingConfig, base: Path, accelerator: Accelerator, phases: Sequence[str], shape: tuple[int, int]
) -> None:
    """Opens each data set and one of its pictures, so that data errors come before the model is built.

    Args:
        config: The recipe.
        base: Directory of the recipe.
        accelerator: Rank and number of processes.
        phases: Names of the phases of the run.
        shape: Shape (P, D) of the picture encoder's output for one picture.

    Raises:
        ConfigError: The streams cannot be divided equally among the processes, or the rows of a batch cannot be divided
            equally among the streams; there are fewer files or samples than streams; the sizes of a mixture without
            ratios are not known.
        DataError: A data set cannot be read, or no sample of it can be used; or a sample has features in place of a
            picture, and a phase trains the picture encoder.
    """
    loop, data = config.loop, config.data
    for phase in phases:
        if phase in ("stage1", "stage2", "instruct"):
            _check_streams(loop.data_streams, getattr(config, phase).batch_size, phase, accelerator.num_processes)
    part = (_own_streams(loop.data_streams, accelerator)[0], loop.data_streams)
    sizes = []
    for number, each in enumerate(data.parts):
        title = table_title(f"data[{number}]" if data.sets else "data")
        with of_data(title, each):
            source, size = SOURCE_MAKERS[each.kind](each, config.seed, base, part)
            _check_frozen(source, config, phases)
            check_usable(source, partial(open_pictures, shape=shape))
        sizes.append(size)
    if data.sets:
        set_probabilities(data.sets, sizes)


def open_pictures(sample: Sample, shape: tuple[int, int] | None = None) -> Any:
    """Opens all pictures (or features) of a sample.

    Args:
        sample: The sample.
        shape: Shape (P, D) that features must have; None for any shape.

    Raises:
        ImageError, DataError: A picture is broken; features are broken or of another shape.
    """
    opened: list[Any] = []
    for picture in sample.pictures:
        if picture.features is None:
            opened.append(picture.open_picture())
        else:
            rows = picture.features()
            opened.append(rows if shape is None else of_shape(picture.sample_id, rows, shape))
    return opened


def _check_frozen(source: SampleSource, config: TrainingConfig, phases: Sequence[str]) -> None:
    """Raises DataError if the data has features in place of pictures, and a phase trains the picture encoder."""
    stored = source.stored_features if isinstance(source, ListSource) else None
    trained = [phase for phase in phases if getattr(getattr(config, phase), "unfreeze_vision", False)]
    if stored and trained:
        raise DataError(
            f"{stored} has features of a frozen picture encoder, and [{trained[0]}] unfreeze_vision trains the encoder",
            "set unfreeze_vision to false, or give the picture in place of the features",
        )


def _own_streams(streams: int, accelerator: Accelerator) -> range:
    """Returns the numbers of the streams that this process reads."""
    each = streams // accelerator.num_processes
    rank = accelerator.process_index
    return range(each * rank, each * (rank + 1)) if streams > 1 else range(1)


def _check_streams(streams: int, rows: int, phase: str, processes: int) -> None:
    batch = rows * processes
    if streams != 1 and (streams % processes or batch % streams):
        valid = sorted({1, *(number for number in range(processes, batch + 1, processes) if batch % number == 0)})
        raise ConfigError(
            f"[loop] data_streams must be a multiple of the number of processes ({processes}), and divide the {batch}"
            f" rows of a batch of {phase}, not {streams}",
            f"set data_streams to {choice([str(number) for number in valid])}",
        )


@contextmanager
def of_data(title: str, data: DataConfig) -> Iterator[None]:
    """Adds the place of a data set in the recipe to the DataErrors of a ``with`` block."""
    try:
        yield
    except DataError as error:
        raise error.with_problem(lambda problem: f"{title} path = {data.path!r}: {problem}") from error
