"""A source of samples from shards; the stream is endless, shuffled, and can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.errors import DataError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.entries import BrokenSamples, Entry, RejectingSource
from blip2edge.training.data.list_source import sample_of
from blip2edge.training.data.shards import read_shard, shard_names
from blip2edge.training.data.sources import Sample

_SHARDS, _BLOCK, _TEXT = 1, 2, 3  # independent random streams


class ShardSource(RejectingSource):
    """Yields the samples of shards, pass after pass, without end.

    In each pass, the shards are shuffled. Their samples are read in blocks of `shuffle_buffer` samples, and each block
    is shuffled. The orders depend only on seed, pass and block. So a snapshot only has to store the position.

    Args:
        paths: The shards: paths, or addresses.
        config: Section [data] of the recipe: size of a block, prompts, and the largest number of broken samples.
        seed: Seed of all orders, and of the drawn prompts and answers.
        read: Reads the entries of one shard. Arguments: the shard's path or address, the collection of broken samples,
            and the shard's name in sample ids.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        config: DataConfig,
        seed: int,
        read: Callable[[Any, BrokenSamples, str], Iterator[Entry]] = read_shard,
    ) -> None:
        self._paths = list(paths)
        self._read = read
        self._config = config
        self._seed = seed
        self._names = shard_names(self._paths)
        super().__init__(BrokenSamples(self.name, config.max_broken))
        self._pass = self._block = self._within = 0  # next sample: pass, block in it, number in that block
        self._start = (0, 0)  # start of the block: number of the shard in the pass, and of the entry

    @property
    def name(self) -> str:
        """Returns the directory and the number of the shards, for messages."""
        return f"{str(self._paths[0]).rpartition('/')[0]} ({len(self._paths)} shards)"

    def __iter__(self) -> Iterator[Sample]:
        """Yields the samples from the current position on, without end.

        Raises:
            DataError: The shards hold no sample, or more samples are broken than allowed.
        """
        while True:
            stream = self._entries_from(*self._start)
            whole, count = self._start == (0, 0), 0
            while block := list(islice(stream, self._config.shuffle_buffer)):
                count += len(block)
                yield from self._shuffled([entry for _, entry in block])
                shard, number = block[-1][0]
                self._start, self._block, self._within = (shard, number + 1), self._block + 1, 0
            if whole:
                self._pass_size = count
            if whole and not count:
                raise self._broken.none_usable("sample")
            self._pass, self._block, self._within, self._start = self._pass + 1, 0, 0, (0, 0)

    def _entries_from(self, shard: int, first: int) -> Iterator[tuple[tuple[int, int], Entry]]:
        """Yields ((place of the shard in this pass, number of the entry), entry) up to the end of the pass."""
        order = np.random.default_rng([_SHARDS, self._seed, self._pass]).permutation(len(self._paths))
        for place in range(shard, len(order)):
            at = int(order[place])
            for number, entry in enumerate(self._read(self._paths[at], self._broken, self._names[at])):
                if place > shard or number >= first:
                    yield (place, number), entry

    def _shuffled(self, block: list[Entry]) -> Iterator[Sample]:
        """Yields the remaining samples of a block, in the shuffled order of the block."""
        order = np.random.default_rng([_BLOCK, self._seed, self._pass, self._block]).permutation(len(block))
        for within in range(self._within, len(block)):
            self._within = within + 1
            rng = np.random.default_rng([_TEXT, self._seed, self._pass, self._block, within])
            yield sample_of(block[int(order[within])], self._config, rng)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the stream, the rejected samples, and the names of the shards."""
        return {
            "pass": self._pass,
            "block": self._block,
            "within": self._within,
            "start": list(self._start),
            "shards": self._names,
            "shuffle_buffer": self._config.shuffle_buffer,
            "broken": dict(self._broken.problems),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the position that :meth:`state_dict` returned.

        Raises:
            DataError: The position was saved with other shards or another block size.
        """
        for key, value in (
            ("shards", self._names),
            ("shuffle_buffer", self._config.shuffle_buffer),
        ):
            if state[key] != value:
                raise DataError(
                    f"{self.name}: {key} has changed since the run was started",
                    "resume with the same shards and the same shuffle_buffer",
                )
        self._pass, self._block, self._within = int(state["pass"]), int(state["block"]), int(state["within"])
        shard, number = state["start"]
        self._start = (int(shard), int(number))
        self._broken.problems |= state["broken"]
