"""A source of training samples whose pictures are generated scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from blip2edge.errors import Blip2EdgeError, DataError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.scenes import make_scene
from blip2edge.training.data.sources import PassOrder, Sample, draw_prompt
from blip2edge.training.data.streams.augmentation import changed, draw_change

_PROMPT = 2  # random stream of prompts


class SceneSource:
    """Yields samples of generated training scenes: always new scenes, or the same `count` scenes in every pass.

    Args:
        config: Section [data] of the recipe, with count, series and prompts.
        seed: Seed of order and prompts; with `count = 0` also of the scenes.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._series = config.series if config.count else seed
        self._position = 0
        self._order = PassOrder(config.count, seed)

    @property
    def name(self) -> str:
        """Returns the name of the scenes, for messages."""
        return f"scenes of series {self._series}"

    def __iter__(self) -> Iterator[Sample]:
        """Yields the samples from the current position on, without end."""
        while True:
            position = self._position
            self._position += 1
            yield self._sample(position)

    def _sample(self, position: int) -> Sample:
        number = self._order[position] if self._config.count else position
        scene = make_scene(number, seed=self._series)
        rng = np.random.default_rng([_PROMPT, self._seed, position])
        identity = f"scene-{self._series}-{number}"
        prompt = draw_prompt(self._config, rng)
        change = draw_change(self._config, (scene.caption, prompt), rng)
        return Sample(identity, identity, changed(lambda: scene.picture, change), scene.caption, prompt)

    @property
    def broken(self) -> Mapping[str, str]:
        """Returns an empty mapping: a generated picture is never broken."""
        return {}

    def accept(self, sample: Sample) -> None:
        """Does nothing: every generated scene can be used."""

    def reject(self, sample: Sample, error: Blip2EdgeError) -> None:
        """Raises DataError with the problem; no sample is skipped, because a generated scene is never broken."""
        raise DataError(f"{self.name}: {sample.sample_id} cannot be used: {error.problem}") from error

    def check_usable(self, use: Callable[[Sample], object]) -> None:
        """Does nothing: every generated scene can be used."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the stream, and the recipe's values that determine the scenes (series and count)."""
        return {"position": self._position, "series": self._series, "count": self._config.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the position that :meth:`state_dict` returned.

        Raises:
            DataError: The position was saved with other scenes.
        """
        for key in ("series", "count"):
            if state[key] != self.state_dict()[key]:
                raise DataError(
                    f"the snapshot belongs to scenes of series {state['series']} and count {state['count']}, but the"
                    f" recipe has series {self._series} and count {self._config.count}",
                    "resume with the recipe that the run was started with",
                )
        self._position = int(state["position"])
