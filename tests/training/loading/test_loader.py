"""Batches: cached features, replaced pictures, and threads that do not change the result."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from accelerate import Accelerator  # noqa: E402

from blip2edge.errors import Blip2EdgeError, DataError, ImageError, OutputError  # noqa: E402
from blip2edge.training.config import parse_config  # noqa: E402
from blip2edge.training.data.config import DataConfig  # noqa: E402
from blip2edge.training.data.registry import open_sample_source  # noqa: E402
from blip2edge.training.data.scene_source import SceneSource  # noqa: E402
from blip2edge.training.data.scenes import make_scene  # noqa: E402
from blip2edge.training.data.shards import ShardWriter  # noqa: E402
from blip2edge.training.data.sources import Sample  # noqa: E402
from blip2edge.training.loading.batches import PREPROCESSING  # noqa: E402
from blip2edge.training.loading.caption_texts import CaptionTexts  # noqa: E402
from blip2edge.training.loading.features import FeatureCache, FrozenEncoder, encoder_hash  # noqa: E402
from blip2edge.training.loading.loader import Loader, TextMakers, picture_number  # noqa: E402
from blip2edge.training.setup.miniature import build_miniature  # noqa: E402
from tests.training import recipes  # noqa: E402

SHAPE = (65, 32)


class Faulty:
    """Scenes of which every third cannot be opened."""

    name = "faulty scenes"

    def __init__(self, most: int = 100) -> None:
        self._scenes = SceneSource(DataConfig(), seed=3)
        self.rejected: list[str] = []
        self._most = most

    def __iter__(self) -> Iterator[Sample]:
        def broken() -> Any:
            raise ImageError("the picture is broken")

        for number, sample in enumerate(self._scenes):
            yield replace(sample, open_picture=broken) if number % 3 == 1 else sample

    @property
    def broken(self) -> dict[str, str]:
        return dict.fromkeys(self.rejected, "broken")

    def accept(self, sample: Sample) -> None:
        """Nothing to note."""

    def check_usable(self, use: Any) -> None:
        """Every sample can be used."""

    def reject(self, sample: Sample, error: Blip2EdgeError) -> None:
        self.rejected.append(sample.sample_id)
        if len(self.rejected) > self._most:
            raise DataError(f"{len(self.rejected)} samples are broken")

    def state_dict(self) -> dict[str, Any]:
        return {"scenes": self._scenes.state_dict(), "rejected": list(self.rejected)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scenes.load_state_dict(state["scenes"])
        self.rejected = list(state["rejected"])


@pytest.fixture(scope="module", name="vision")
def _vision() -> Any:
    return build_miniature(parse_config(recipes.recipe())).model.vision.eval().requires_grad_(False)


def loader(source: Any, vision: Any, cache: FeatureCache | None = None, workers: int = 0) -> Loader:
    accelerator = Accelerator(cpu=True)
    return Loader(
        source,
        4,
        FrozenEncoder(vision, PREPROCESSING, accelerator, cache),
        TextMakers(),
        accelerator,
        workers,
    )


def test_the_encoder_stays_in_float32_where_autocast_is_off(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bfloat16 the features differ in the third digit; without autocast they are those of float32."""
    accelerator = Accelerator(cpu=True)  # accelerate allows one precision in a process, so autocast is replaced
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    source = iter(Faulty())
    samples = [next(source)]
    pixels = [PREPROCESSING(samples[0].open_picture())]
    wanted = vision(torch.from_numpy(np.stack(pixels)))
    kept, cast = (
        FrozenEncoder(vision, PREPROCESSING, accelerator, autocast=autocast).encode(samples, pixels)
        for autocast in (False, True)
    )
    assert torch.equal(kept, wanted)
    assert not torch.allclose(cast, wanted, atol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_replaced_by_the_next_samples(vision: Any, workers: int) -> None:
    source = Faulty()
    batches = loader(source, vision, workers=workers)
    shown = [name for _ in range(3) for name in next(batches).sample_ids]
    batches.close()
    good = [f"scene-3-{number}" for number in range(40) if number % 3 != 1]
    assert sorted(shown, key=lambda name: int(name.split("-")[-1])) == good[: len(shown)]
    assert source.rejected
    assert set(source.rejected).isdisjoint(shown)


def test_a_prompt_that_does_not_fit_is_rejected_too(vision: Any) -> None:
    parts = build_miniature(parse_config(recipes.recipe()))
    source = Faulty()
    accelerator = Accelerator(cpu=True)
    given = [next(iter(source)) for _ in range(6)]
    given[2] = replace(given[2], prompt="why " * 200)

    class Given(Faulty):
        def __iter__(self) -> Iterator[Sample]:
            yield from given

    endless = Given()
    texts = TextMakers(CaptionTexts(parts.model.config, parts.runtime_tokenizer, 16))
    batches = Loader(endless, 3, FrozenEncoder(vision, PREPROCESSING, accelerator), texts, accelerator)
    batch = next(batches)
    assert endless.rejected == [given[2].sample_id]
    assert batch.sample_ids == tuple(given[number].sample_id for number in (0, 1, 3))


def test_the_limit_is_the_sources(vision: Any) -> None:
    batches = loader(Faulty(most=1), vision)
    with pytest.raises(DataError, match="2 samples are broken"):
        [next(batches) for _ in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_where_its_state_was_taken(vision: Any, workers: int) -> None:
    batches = loader(Faulty(), vision, workers=workers)
    next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    following = [next(batches) for _ in range(2)]
    batches.close()
    source = Faulty()
    fresh = loader(source, vision)
    fresh.load_state_dict(state)
    for batch in following:
        again = next(fresh)
        assert again.sample_ids == batch.sample_ids
        assert torch.equal(again.image_embeds, batch.image_embeds)


def test_features_are_kept_and_pictures_not_opened_again(vision: Any, tmp_path: Path) -> None:
    plain = loader(SceneSource(DataConfig(count=8), 1), vision)
    wanted = [next(plain) for _ in range(4)]
    opened: list[str] = []

    class Counting(SceneSource):
        def __iter__(self) -> Iterator[Sample]:
            for sample in super().__iter__():

                def counted(sample: Sample = sample) -> Any:
                    opened.append(sample.image_id)
                    return sample.open_picture()

                yield replace(sample, open_picture=counted)

    for life in range(2):
        cache = FeatureCache(tmp_path, SHAPE, "float32")
        assert len(cache) == 8 * life
        kept = loader(Counting(DataConfig(count=8), 1), vision, cache)
        for batch in wanted:
            given = next(kept)
            assert given.sample_ids == batch.sample_ids
            assert torch.allclose(given.image_embeds, batch.image_embeds, atol=1e-5)
        cache.close()
    assert sorted(opened) == sorted({f"scene-0-{number}" for number in range(8)})


def test_what_was_torn_is_not_read(tmp_path: Path) -> None:
    rows = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    cache = FeatureCache(tmp_path, (3, 4), "float16")
    cache.add(["a", "b"], rows)
    cache.add(["b", "c"], rows + 100)
    cache.close()
    (index,) = tmp_path.glob("*.index.jsonl")
    index.write_text(index.read_text() + '["d"')  # killed in the middle of a line
    again = FeatureCache(tmp_path, (3, 4), "float16")
    assert "d" not in again
    assert np.array_equal(again.read(["c", "a"]), [rows[1] + 100, rows[0]])
    again.close()


def test_features_that_overflow_are_refused(tmp_path: Path) -> None:
    rows = np.ones((2, 3, 4), np.float32)
    rows[1, 2, 3] = 70000.0
    cache = FeatureCache(tmp_path, (3, 4), "float16")
    with pytest.raises(DataError, match=r"features of b do not fit into float16: the largest is 7e\+04; set feat"):
        cache.add(["a", "b"], rows)
    assert "a" not in cache
    cache.close()
    wide = FeatureCache(tmp_path / "wide", (3, 4), "float32")
    wide.add(["a", "b"], rows)
    assert wide.read(["b"])[0, 2, 3] == 70000.0
    rows[0, 0, 0] = np.nan
    with pytest.raises(DataError, match="features of c"):
        wide.add(["c"], rows[:1])
    wide.close()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path, (3, 4), "float32")

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_files", full)
    with pytest.raises(OutputError, match=r"the disk is full: .* could not be written; free some space"):
        cache.add(["a"], np.zeros((1, 3, 4), np.float32))
    assert "a" not in cache


def test_the_hash_knows_weights_and_preprocessing(vision: Any) -> None:
    first = encoder_hash(vision, PREPROCESSING, "float32")
    assert first == encoder_hash(vision, PREPROCESSING, "float32")
    others = [
        encoder_hash(vision, replace(PREPROCESSING, mean=(0.5, 0.5, 0.5)), "float32"),
        encoder_hash(vision, PREPROCESSING, "float16"),
        encoder_hash(build_miniature(parse_config(recipes.recipe("seed = 9"))).model.vision, PREPROCESSING, "float32"),
    ]
    assert len({first, *others}) == 4


def test_a_pictures_number_is_its_names() -> None:
    assert picture_number("a") == picture_number("a") != picture_number("b")
    assert 0 <= picture_number("a") < 2**63


def test_streams_give_the_same_batches_to_one_process_and_to_two(
    vision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process reads its own shards; broken pictures are replaced within their stream; a saved position is kept."""
    writer = ShardWriter(tmp_path / "set", 3)
    for number in range(12):
        file = io.BytesIO()
        make_scene(number, seed=0).picture.save(file, "PNG")
        writer.add(f"{number:02d}", b"broken" if number == 7 else file.getvalue(), ".png", [f"caption {number}"], {})
    writer.close()
    config = DataConfig(kind="shards", path="set", shuffle_buffer=4)

    def ready(rank: int, size: int) -> Loader:
        accelerator: Any = Mock(process_index=rank, num_processes=size, device="cpu", autocast=nullcontext)
        each = 4 // size
        sources = [
            open_sample_source(config, seed=1, base=tmp_path, part=(number, 4))
            for number in range(rank * each, (rank + 1) * each)
        ]
        return Loader(sources, 8 // size, FrozenEncoder(vision, PREPROCESSING, accelerator), TextMakers(), accelerator)

    one, two = ready(0, 1), [ready(rank, 2) for rank in range(2)]
    shared: list[Any] = []

    def gather(own: list[Any]) -> list[Any]:
        shared.extend(own)
        return shared

    monkeypatch.setattr("blip2edge.training.loading.loader.gather_object", gather)

    def step() -> Any:
        whole, parts = next(one), [next(loader) for loader in two]
        assert whole.sample_ids == parts[0].sample_ids + parts[1].sample_ids
        torch.testing.assert_close(whole.image_embeds, torch.cat([part.image_embeds for part in parts]))
        assert {name.partition(":")[0] for name in parts[0].sample_ids} <= {"000000.tar", "000001.tar"}
        return parts[1]

    for _ in range(3):
        step()
    two[0].state_dict()
    state = json.loads(json.dumps(two[1].state_dict()))
    assert state == one.state_dict()
    assert [own["shards"] for own in state["streams"]] == [[f"{number:06d}.tar"] for number in range(4)]
    later = ready(1, 2)
    later.load_state_dict(state)
    for _ in range(2):
        assert step().sample_ids == next(later).sample_ids
    assert "000002.tar:07" in one.broken
    other = Loader([Faulty(), Faulty()], 4, one._encoder, TextMakers(), one._accelerator)
    with pytest.raises(DataError, match="started with 4 data streams, but now there are 2"):
        other.load_state_dict(state)
    with pytest.raises(DataError, match="but now there is one"):
        loader(Faulty(), vision).load_state_dict(state)
