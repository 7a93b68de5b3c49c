"""Data whose samples are all broken: the run ends after one pass, also if `max_broken` would allow more."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("accelerate", reason="training needs accelerate")

from blip2edge.errors import ConfigError, DataError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.registry import open_sample_source
from blip2edge.training.data.scenes import make_scene
from blip2edge.training.data.shards import ShardWriter
from blip2edge.training.data.sources import Sample
from blip2edge.training.loading.batches import PREPROCESSING
from blip2edge.training.loading.features import PictureReader
from blip2edge.training.loading.loader import Loader, TextMakers
from blip2edge.training.loading.run_data import open_pictures

COUNT = 3
MOST = 40  # samples that a test may read before it fails instead of running for ever


def content(directory: Path, number: int, broken: set[int]) -> bytes:
    if number in broken:
        return b"no picture"
    path = directory / "scene.png"
    make_scene(number, seed=0).picture.save(path)
    found = path.read_bytes()
    path.unlink()
    return found


def pictures(directory: Path, broken: set[int]) -> None:
    directory.mkdir()
    for number in range(COUNT):
        (directory / f"{number}.png").write_bytes(content(directory, number, broken))


def folder(root: Path, broken: set[int]) -> DataConfig:
    pictures(root / "folder", broken)
    for number in range(COUNT):
        (root / "folder" / f"{number}.txt").write_text(f"caption {number}")
    return DataConfig(kind="folder", path="folder")


def captions(root: Path, broken: set[int]) -> DataConfig:
    pictures(root / "coco", broken)
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(COUNT)]
    texts = [{"id": number, "image_id": number, "caption": f"caption {number}"} for number in range(COUNT)]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": texts}))
    return DataConfig(kind="coco-captions", path="captions.json", images="coco")


def questions(root: Path, broken: set[int]) -> DataConfig:
    pictures(root / "vqa", broken)
    ids = [{"question_id": number, "image_id": number} for number in range(COUNT)]
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(COUNT)]
    asked = [{**each, "question": "What?"} for each in ids]
    (root / "questions.json").write_text(json.dumps({"images": images, "questions": asked}))
    (root / "answers.json").write_text(json.dumps({"annotations": [{**each, "answers": ["a"]} for each in ids]}))
    return DataConfig(kind="coco-vqa", path="questions.json", annotations="answers.json", images="vqa")


def dialogues(root: Path, broken: set[int]) -> DataConfig:
    pictures(root / "llava", broken)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a scene"}]
    rows = [{"image": f"llava/{number}.png", "conversations": turns} for number in range(COUNT)]
    (root / "llava.json").write_text(json.dumps(rows))
    return DataConfig(kind="table", path="llava.json")


def shards(root: Path, broken: set[int]) -> DataConfig:
    writer = ShardWriter(root / "shards", 2)
    for number in range(COUNT):
        writer.add(f"{number}", content(root, number, broken), ".png", [f"caption {number}"], {})
    writer.close()
    return DataConfig(kind="shards", path="shards", shuffle_buffer=2)


def parquet(root: Path, broken: set[int]) -> DataConfig:
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"jpg": [content(root, number, broken) for number in range(COUNT)], "TEXT": ["a caption"] * COUNT}
    files.write_table(arrow.table(rows), root / "rows.parquet")
    return DataConfig(kind="parquet", path="rows.parquet")


KINDS = (folder, captions, questions, dialogues, shards, parquet)
Write = Callable[[Path, set[int]], DataConfig]


def finite(source: Any) -> Any:
    """The source, which ends after many samples: without the rule the test would run for ever."""
    samples = iter(source)

    class Finite:
        broken = property(lambda self: source.broken)
        accept, reject, state_dict = source.accept, source.reject, source.state_dict

        def __iter__(self) -> Iterator[Sample]:
            yield from itertools.islice(samples, MOST)

    return Finite()


def loader(source: Any, rows: int, workers: int = 0) -> Loader:
    here: Any = Mock(process_index=0, num_processes=1, device="cpu")
    given = [finite(each) for each in source] if isinstance(source, list) else finite(source)
    return Loader(given, rows, PictureReader(PREPROCESSING, here), TextMakers(), here, workers)


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize(("rows", "workers"), [(2, 0), (8, 0), (2, 2)])
def test_a_pass_without_a_usable_sample_ends_the_run(write: Write, rows: int, workers: int, tmp_path: Path) -> None:
    source = open_sample_source(write(tmp_path, {0, 1, 2}), seed=0, base=tmp_path)
    batches = loader(source, rows, workers)
    with pytest.raises(
        DataError, match=r"expected at least one usable sample, got none; 3 samples are broken: "
    ) as said:
        next(batches)
    batches.close()
    assert "not a picture" in str(said.value)


@pytest.mark.parametrize("write", KINDS)
def test_one_usable_sample_is_enough(write: Write, tmp_path: Path) -> None:
    """It comes again and again; two of three samples are broken in every pass, in an order of its own."""
    source = open_sample_source(write(tmp_path, {0, 2}), seed=0, base=tmp_path)
    batches = loader(source, 2)
    shown = {name for _ in range(5) for name in next(batches).sample_ids}
    assert len(shown) == 1
    assert len(source.broken) == 2


@pytest.mark.parametrize("write", [folder, shards])
def test_a_set_of_a_mixture_that_is_wholly_broken_ends_the_run(write: Write, tmp_path: Path) -> None:
    """Samples of the other set cannot stand in for it: the mixture would have other ratios than the recipe's."""
    bad, good = write(tmp_path, {0, 1, 2}), captions(tmp_path, set())
    mixed = DataConfig.of_tables([replace(each, ratio=1.0) for each in (bad, good)])
    batches = loader(open_sample_source(mixed, seed=0, base=tmp_path), 2)
    with pytest.raises(DataError, match="got none; 3 samples are broken") as said:
        [next(batches) for _ in range(20)]
    assert "caption" not in str(said.value)


@pytest.mark.parametrize("write", KINDS)
def test_a_set_without_a_usable_sample_is_found_without_drawing_from_it(write: Write, tmp_path: Path) -> None:
    """A short run may draw no sample of a set, or too few to know that all are broken."""
    bad, good = write(tmp_path, {0, 1, 2}), DataConfig(count=2)
    mixed = DataConfig.of_tables([replace(good, ratio=1000.0), replace(bad, ratio=0.001)])
    source = open_sample_source(mixed, seed=0, base=tmp_path)
    before = source.state_dict()
    with pytest.raises(DataError, match=r"expected at least one usable sample, got none; 3 samples are broken") as said:
        source.check_usable(open_pictures)
    assert bad.path in str(said.value)
    usable = open_sample_source(replace(mixed, sets=(mixed.sets[0],) * 2), seed=0, base=tmp_path)
    usable.check_usable(open_pictures)
    assert source.state_dict()["position"] == before["position"] == 0


@pytest.mark.parametrize("write", KINDS)
def test_the_check_of_a_set_changes_no_draw(write: Write, tmp_path: Path) -> None:
    config = write(tmp_path, {0, 2})
    plain, checked = (open_sample_source(config, seed=0, base=tmp_path) for _ in range(2))
    checked.check_usable(open_pictures)
    assert checked.state_dict() == plain.state_dict()
    drawn = [[sample.sample_id for sample in itertools.islice(source, 7)] for source in (plain, checked)]
    assert drawn[0] == drawn[1]


def test_a_stream_that_is_wholly_broken_ends_the_run(tmp_path: Path) -> None:
    config = folder(tmp_path, {0, 2})
    streams = [open_sample_source(config, seed=0, base=tmp_path, part=(number, 2)) for number in range(2)]
    with pytest.raises(DataError, match="got none; 2 samples are broken"):  # 0 and 2 of the first stream
        next(loader(streams, 2))
    with pytest.raises(ConfigError, match="expected at least 4 samples for the 4 data streams, got 3"):
        open_sample_source(config, seed=0, base=tmp_path, part=(0, 4))
