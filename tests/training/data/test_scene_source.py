"""The scenes as a source: order, prompts, and resuming from a state."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from blip2edge.errors import DataError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.registry import open_sample_source
from blip2edge.training.data.sources import Sample, SampleSource


def _take(source: SampleSource, count: int) -> list[tuple[str, str, str]]:
    def key(sample: Sample) -> tuple[str, str, str]:
        return sample.sample_id, sample.prompt, sample.text

    return [key(sample) for sample in itertools.islice(source, count)]


@pytest.mark.parametrize("count", [0, 5])
def test_it_goes_on_where_its_state_was_taken(count: int) -> None:
    config = DataConfig(count=count, prompt_share=0.5)
    source = open_sample_source(config, seed=3, base=Path())
    _take(source, 7)
    state = json.loads(json.dumps(source.state_dict()))
    fresh = open_sample_source(config, seed=3, base=Path())
    fresh.load_state_dict(state)
    assert _take(fresh, 8) == _take(source, 8)


def test_a_pass_shows_each_scene_once_in_an_order_of_its_own() -> None:
    source = open_sample_source(DataConfig(count=6), seed=1, base=Path())
    passes = [[name for name, _, _ in _take(source, 6)] for _ in range(3)]
    assert {frozenset(names) for names in passes} == {frozenset(f"scene-0-{number}" for number in range(6))}
    assert len({tuple(names) for names in passes}) > 1
    assert _take(open_sample_source(DataConfig(count=6), seed=1, base=Path()), 6)[0][0] == passes[0][0]


def test_a_state_of_another_stream_is_refused() -> None:
    state = open_sample_source(DataConfig(count=6), seed=1, base=Path()).state_dict()
    with pytest.raises(
        DataError, match="belongs to scenes of series 0 and count 6, but the recipe has series 0 and count 7"
    ):
        open_sample_source(DataConfig(count=7), seed=1, base=Path()).load_state_dict(state)
