"""Mixtures: draws follow the ratios, are equal for the same seed, and can be resumed at every place."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip2edge.errors import ConfigError, DataError, ImageError, UsageError
from blip2edge.training.config import TrainingConfig, config_hash, parse_config
from blip2edge.training.data.config import MIXTURE, DataConfig
from blip2edge.training.data.detect import detect_data
from blip2edge.training.data.registry import open_sample_source, read_entries
from blip2edge.training.data.sources import Sample, SampleSource
from blip2edge.training.data.streams.mixture import MixtureSource, set_probabilities


def scenes(*ratios: float, **values: Any) -> DataConfig:
    return DataConfig.of_tables(
        [DataConfig(count=6, series=at, ratio=ratio, **values) for at, ratio in enumerate(ratios)]
    )


def take(source: SampleSource, count: int) -> list[Sample]:
    return list(islice(source, count))


class Numbers:
    """A source without pictures, for many draws."""

    name = "numbers"

    def __init__(self) -> None:
        self.position = 0
        self.broken: dict[str, str] = {}

    def __iter__(self) -> Any:
        while True:
            self.position += 1
            yield Sample(str(self.position), "", lambda: None, "")  # type: ignore[arg-type,return-value]

    def accept(self, sample: Sample) -> None:
        raise AssertionError

    def check_usable(self, use: Any) -> None:
        """Every sample can be used."""

    def reject(self, sample: Sample, error: Any) -> None:
        raise AssertionError

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def test_draws_fit_the_ratios() -> None:
    """Chi-square of 20,000 draws; with three degrees of freedom a fair draw is above 16.27 once in a thousand seeds."""
    wanted = np.array(set_probabilities(scenes(4, 3, 2, 1).sets, [None] * 4))
    np.testing.assert_allclose(wanted, [0.4, 0.3, 0.2, 0.1])
    for seed in range(3):
        drawn = take(MixtureSource([Numbers() for _ in wanted], wanted.tolist(), seed), 20_000)
        counts = Counter(sample.sample_id.partition("/")[0] for sample in drawn)
        observed = np.array([counts[str(number)] for number in range(1, 5)])
        assert float(((observed - 20_000 * wanted) ** 2 / (20_000 * wanted)).sum()) < 16.27, observed


def test_without_ratios_the_square_roots_of_the_sizes(captions: Path, questions: Path, folder: Path) -> None:
    base = captions.parent
    sets = [
        DataConfig(kind="coco-captions", path=captions.name, images="pictures"),
        DataConfig(kind="coco-vqa", path=questions.name, images="pictures"),
        DataConfig(kind="folder", path="pictures", size=40),  # a size that is given takes precedence
    ]
    state = open_sample_source(DataConfig.of_tables(sets), seed=0, base=base).state_dict()
    roots = [math.sqrt(20), math.sqrt(10), math.sqrt(40)]
    np.testing.assert_allclose(state["probabilities"], np.array(roots) / sum(roots))
    shards = DataConfig.of_tables([sets[0], DataConfig()])
    with pytest.raises(ConfigError, match="number of samples is not known for scenes"):
        open_sample_source(shards, seed=0, base=base)


def test_a_mixture_is_found_again_at_every_place(captions: Path, folder: Path) -> None:
    config = DataConfig.of_tables(
        [
            DataConfig(kind="coco-captions", path=captions.name, images="pictures", prompt_share=0.5),
            DataConfig(kind="folder", path="pictures", crop=0.5, flip=0.5),
            DataConfig(count=5),
        ]
    )

    def opened() -> SampleSource:
        return open_sample_source(config, seed=3, base=captions.parent)

    def told(samples: list[Sample]) -> list[Any]:
        return [(one.sample_id, one.prompt, one.text, one.open_picture().tobytes()) for one in samples]

    whole = told(take(opened(), 60))
    assert whole == told(take(opened(), 60))
    for at in range(0, 60, 7):
        first = opened()
        take(first, at)
        second = opened()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert told(take(second, 60 - at)) == whole[at:]


def test_sets_of_the_same_pictures_have_orders_of_their_own() -> None:
    config = DataConfig.of_tables([DataConfig(count=20, ratio=1), DataConfig(count=20, ratio=1)])
    drawn = take(open_sample_source(config, seed=0, base=Path()), 60)
    orders = [[one.image_id for one in drawn if one.sample_id.startswith(f"{number}/")][:20] for number in (1, 2)]
    assert set(orders[0]) == set(orders[1])  # one name for one picture, so that its features are cached once
    assert orders[0] != orders[1]


def test_broken_samples_belong_to_their_set(folder: Path) -> None:
    part = DataConfig(kind="folder", path="pictures", ratio=1, max_broken=1)
    source = open_sample_source(DataConfig.of_tables([part, part]), seed=0, base=folder.parent)
    samples = {one.sample_id: one for one in take(source, 60)}
    for name in ("1/1.png", "2/1.png"):
        source.reject(samples[name], ImageError("no picture"))
    assert dict(source.broken) == {"1/1.png": "no picture", "2/1.png": "no picture"}
    with pytest.raises(DataError, match="2 samples are broken"):
        source.reject(samples["2/2.png"], ImageError("no picture"))


def test_a_state_of_other_ratios_is_refused() -> None:
    state = open_sample_source(scenes(1, 2), seed=0, base=Path()).state_dict()
    with pytest.raises(DataError, match="probabilities have changed"):
        open_sample_source(scenes(2, 1), seed=0, base=Path()).load_state_dict(state)


def test_recipes_with_several_sets(tmp_path: Path) -> None:
    several = parse_config("[[data]]\ncount = 4\nratio = 1\nprompts = ['x']\n[[data]]\ncount = 6\nratio = 3.0\n").data
    assert (several.kind, [each.count for each in several.sets]) == (MIXTURE, [4, 6])
    assert several.prompts == ("x", "a photo of", "a picture of")
    assert parse_config("[[data]]\ncount = 4").data == parse_config("[data]\ncount = 4").data
    assert config_hash(parse_config("[[data]]\ncount = 4")) != config_hash(TrainingConfig(data=several))
    for text, message in (
        ("[[data]]\nratio = 1\n[[data]]\n", "expected a ratio above 0 in every set or in none, got none in set 2"),
        ("[[data]]\nratio = 1\n", "at least two data sets"),
        ("[data]\nkind = 'mixture'\n", "at least two data sets"),
        ("[[data]]\ncuont = 3\n[[data]]\n", "unknown key 'data\\[0\\].cuont'"),
        ("[data]\nsets = []\n", "unknown key 'data.sets'"),
        ("[[validation]]\n[[validation]]\n", r"\[\[validation\]\] expected one table"),
        ("[data]\ncrop = 0.5\n[loop]\ncache_features = true\n", "cache_features does not work with crop"),
        ("[data]\ncrop = 0\n", "crop must be greater than 0"),
        ("[data]\nflip = 2.0\n", "flip must lie between 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(text)
    with pytest.raises(UsageError, match="got a mixture of several"):
        read_entries(several, base=tmp_path)
    (tmp_path / "r.toml").write_text("[[data]]\n[[data]]\n")
    with pytest.raises(UsageError, match="expected one data set, got the 2"):
        detect_data(str(tmp_path / "r.toml"), None, None, 0)
