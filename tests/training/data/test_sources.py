"""All kinds of data as a stream: whole passes, shuffled by seed, resumable, broken samples counted."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from blip2edge.errors import ConfigError, DataError, ImageError, UsageError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.registry import open_sample_source, read_entries
from blip2edge.training.data.sources import Sample, SampleSource

KINDS = ("captions", "questions", "folder", "shards")
PER_PASS = {"captions": 20, "questions": 10, "folder": 11, "shards": 10}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def config(kind: str, request: pytest.FixtureRequest) -> DataConfig:
    path: Path = request.getfixturevalue(kind)
    names = {"captions": "coco-captions", "questions": "coco-vqa"}
    images = "pictures" if kind in names else ""
    return DataConfig(kind=names.get(kind, kind), path=path.name, images=images, max_broken=3, shuffle_buffer=3)


def take(source: SampleSource, count: int) -> list[Sample]:
    return list(itertools.islice(iter(source), count))


def told(samples: list[Sample]) -> list[tuple[str, str, str]]:
    return [(sample.sample_id, sample.prompt, sample.text) for sample in samples]


def test_a_pass_shows_everything_once(config: DataConfig, kind: str, tmp_path: Path) -> None:
    size = PER_PASS[kind]
    stream = take(open_sample_source(config, seed=1, base=tmp_path), 2 * size)
    one, other = stream[:size], stream[size:]
    everything = {entry.sample_id for entry in read_entries(config, base=tmp_path)[0]}
    assert len(everything) == size
    assert {sample.sample_id for sample in one} == {sample.sample_id for sample in other} == everything
    assert [s.sample_id for s in one] != [s.sample_id for s in other]
    assert told(stream) == told(take(open_sample_source(config, seed=1, base=tmp_path), 2 * size))
    assert told(stream) != told(take(open_sample_source(config, seed=2, base=tmp_path), 2 * size))


def test_pictures_belong_to_their_texts(config: DataConfig, kind: str, tmp_path: Path) -> None:
    for sample in take(open_sample_source(config, seed=0, base=tmp_path), PER_PASS[kind]):
        text = sample.prompt if kind == "questions" else sample.text
        if text == "another":
            continue
        number = next(int(letter) for letter in text if letter.isdigit())
        shown = sample.open_picture()
        assert shown.mode == "RGB"
        assert (np.asarray(shown) == number * 20).all()


def test_a_stream_is_found_again_at_every_place(config: DataConfig, kind: str, tmp_path: Path) -> None:
    count = 2 * PER_PASS[kind] + 2
    whole = told(take(open_sample_source(config, seed=3, base=tmp_path), count))
    for at in range(count):
        first = open_sample_source(config, seed=3, base=tmp_path)
        take(first, at)
        state = json.loads(json.dumps(first.state_dict()))
        second = open_sample_source(config, seed=3, base=tmp_path)
        second.load_state_dict(state)
        assert told(take(second, count - at)) == whole[at:]


def test_a_state_of_other_data_is_refused(config: DataConfig, kind: str, tmp_path: Path) -> None:
    source = open_sample_source(config, seed=0, base=tmp_path)
    state = source.state_dict()
    key = "shards" if kind == "shards" else "samples"
    with pytest.raises(DataError, match="was started"):
        source.load_state_dict({**state, key: ["other.tar"] if kind == "shards" else 5})


def test_broken_samples_are_counted_and_named_up_to_the_limit(config: DataConfig, tmp_path: Path) -> None:
    source = open_sample_source(config, seed=0, base=tmp_path)
    samples = {sample.sample_id: sample for sample in take(source, 11)}
    first = list(samples.values())[:4]
    for sample in first[:3]:
        source.reject(sample, ImageError("no picture"))
    source.reject(first[0], ImageError("no picture"))  # the same one in the next pass
    assert list(source.state_dict()["broken"]) == [sample.sample_id for sample in first[:3]]
    with pytest.raises(DataError, match="4 samples are broken, and max_broken allows 3") as raised:
        source.reject(first[3], ImageError("no picture"))
    assert all(f"{sample.sample_id} (no picture)" in str(raised.value) for sample in first[:3])
    assert first[3].sample_id not in str(raised.value)


def test_prompts_and_answers_are_drawn(captions: Path, questions: Path) -> None:
    base = captions.parent
    config = DataConfig(kind="coco-captions", path=captions.name, images="pictures", prompt_share=0.5)
    samples = take(open_sample_source(config, seed=0, base=base), 400)
    share = Counter(sample.prompt for sample in samples)
    assert 160 < share[""] < 240
    assert set(share) == {"", *config.prompts}
    config = DataConfig(kind="coco-vqa", path=questions.name, images="pictures", question="Q: {} A:")
    samples = take(open_sample_source(config, seed=0, base=base), 400)
    assert all(sample.prompt.startswith("Q: How many of ") for sample in samples)
    assert 240 < Counter(sample.text for sample in samples)["two"] < 320


def test_what_a_configuration_may_say() -> None:
    with pytest.raises(ConfigError, match="expects a path"):
        DataConfig(kind="folder")
    with pytest.raises(ConfigError, match="did you mean 'coco-captions'"):
        DataConfig(kind="coco-caption", path="x")
    with pytest.raises(ConfigError, match=r"must contain \{\} once"):
        DataConfig(question="no place")
    with pytest.raises(ConfigError, match="max_broken"):
        DataConfig(max_broken=-1)
    with pytest.raises(UsageError, match="from files"):
        read_entries(DataConfig(), base=Path())
