"""The training data of a run: its division among streams and processes, and a check before the model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from blip2edge.errors import ConfigError, DataError
from blip2edge.training.config import TrainingConfig
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.registry import SOURCE_MAKERS, open_sample_source
from blip2edge.training.data.sources import Sample, SampleSource
from blip2edge.training.data.streams.mixture import set_probabilities
from blip2edge.training.fields import table_title
from blip2edge.training.key_rules import choice


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


def check_data(config: TrainingConfig, base: Path, accelerator: Accelerator, phases: Sequence[str]) -> None:
    """Opens each data set and one of its pictures, so that data errors come before the model is built.

    Args:
        config: The recipe.
        base: Directory of the recipe.
        accelerator: Rank and number of processes.
        phases: Names of the phases of the run.

    Raises:
        ConfigError: The streams cannot be divided equally among the processes, or the rows of a batch cannot be divided
            equally among the streams; there are fewer files or samples than streams; the sizes of a mixture without
            ratios are not known.
        DataError: A data set cannot be read, or no sample of it can be used.
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
            check_usable(source, open_pictures)
        sizes.append(size)
    if data.sets:
        set_probabilities(data.sets, sizes)


def open_pictures(sample: Sample) -> Any:
    """Opens all pictures (or features) of a sample; raises ImageError or DataError if one is broken."""
    return [picture.open_picture() if picture.features is None else picture.features() for picture in sample.pictures]


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
