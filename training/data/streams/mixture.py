"""A mixture of several data sets: each sample is drawn from one of them, by fixed probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blip2edge.errors import Blip2EdgeError, ConfigError, DataError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.sources import Sample, SampleSource

_MIX = 4  # random stream of the draws of sets


def set_probabilities(sets: Sequence[DataConfig], sizes: Sequence[int | None]) -> list[float]:
    """Computes the probability of each set of a mixture.

    With ratios it is `ratio / Σ ratio`. Without them it is `√size / Σ √size`, as InstructBLIP balances its data sets
    (Dai et al., arXiv 2305.06500).

    Args:
        sets: The sections of the sets.
        sizes: Number of samples of each set; None if it is not known.

    Returns:
        A probability for each set; their sum is 1.

    Raises:
        ConfigError: There are no ratios, and a size is not known.
    """
    if all(each.ratio > 0 for each in sets):
        weights = np.array([each.ratio for each in sets])
    else:
        unknown = [each.path or each.kind for each, size in zip(sets, sizes, strict=True) if not (each.size or size)]
        if unknown:
            raise ConfigError(
                f"[[data]] the number of samples is not known for {', '.join(unknown)}, and without ratios a mixture is"
                " balanced by the sizes",
                "set size for this set, or ratio for every set",
            )
        weights = np.sqrt([float(each.size or size or 0) for each, size in zip(sets, sizes, strict=True)])
    return [float(weight) for weight in weights / weights.sum()]


class MixtureSource:
    """Yields samples of several sources. Which source gives the next sample depends only on seed and position.

    Sample ids begin with the number of the set: ``2/000017.tar:0005``.

    Args:
        sources: The sources.
        probabilities: Probability that a sample is drawn from each source.
        seed: Seed for drawing the source of each sample.
    """

    def __init__(self, sources: Sequence[SampleSource], probabilities: Sequence[float], seed: int) -> None:
        self._sources, self._seed, self._position = list(sources), seed, 0
        self._probabilities = list(probabilities)
        self._limits = np.cumsum(probabilities)[:-1]

    @property
    def name(self) -> str:
        """Returns the names of all sources, for messages."""
        return " + ".join(source.name for source in self._sources)

    def __iter__(self) -> Iterator[Sample]:
        """Yields the samples from the current position on, without end."""
        streams = [iter(source) for source in self._sources]
        while True:
            drawn = np.random.default_rng([_MIX, self._seed, self._position]).random()
            number = int(np.searchsorted(self._limits, drawn, side="right"))
            self._position += 1
            sample = next(streams[number])
            yield dataclasses.replace(sample, sample_id=f"{number + 1}/{sample.sample_id}")

    @property
    def broken(self) -> Mapping[str, str]:
        """Returns, by sample id, why a sample was skipped or rejected."""
        numbered = enumerate(self._sources, 1)
        return {f"{number}/{name}": problem for number, source in numbered for name, problem in source.broken.items()}

    def accept(self, sample: Sample) -> None:
        """Passes the sample to the source of its set, which notes that the sample was used."""
        source, own = self._own(sample)
        source.accept(own)

    def reject(self, sample: Sample, error: Blip2EdgeError) -> None:
        """Adds a sample to the broken samples of its set.

        Raises:
            DataError: That set's `max_broken` is exceeded, or a whole pass over the set had no usable sample. Samples
                of the other sets are not used instead, because the mixture would no longer have the recipe's ratios.
        """
        source, own = self._own(sample)
        source.reject(own, error)

    def check_usable(self, use: Callable[[Sample], object]) -> None:
        """Checks that at least one sample of each set can be used; the position stays."""
        for source in self._sources:
            source.check_usable(use)

    def _own(self, sample: Sample) -> tuple[SampleSource, Sample]:
        """Returns the source that a sample comes from, and the sample with its id in that source."""
        number, _, sample_id = sample.sample_id.partition("/")
        return self._sources[int(number) - 1], dataclasses.replace(sample, sample_id=sample_id)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the stream, the probabilities, and the state of each source."""
        return {
            "position": self._position,
            "probabilities": self._probabilities,
            "sets": [source.state_dict() for source in self._sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the position that :meth:`state_dict` returned.

        Raises:
            DataError: The position was saved with other data, or with other probabilities.
        """
        if state.get("probabilities") != self._probabilities:
            raise DataError(
                f"{self.name}: the sets or their probabilities have changed since the run was started",
                "resume with the same data sets and ratios",
            )
        for source, own in zip(self._sources, state["sets"], strict=True):
            source.load_state_dict(own)
        self._position = int(state["position"])
