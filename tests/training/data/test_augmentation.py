"""Crops within their bounds, no mirroring for texts that say left or right, and the same changes for the same seed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2edge.training.data.config import LEFT_RIGHT, DataConfig
from blip2edge.training.data.registry import open_sample_source
from blip2edge.training.data.streams.augmentation import ASPECTS, crop_box, names_side


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 50), (3, 90), (1, 1)])
def test_crops_lie_inside_and_keep_their_share(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        left, top, right, bottom = crop_box(width, height, 0.3, rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        shares.append((right - left) * (bottom - top) / (width * height))
        if min(width, height) > 40 and shares[-1] < 1:
            assert ASPECTS[0] * 0.95 <= (right - left) / (bottom - top) <= ASPECTS[1] * 1.05
    if width == height == 64:
        assert 0.28 < min(shares) < 0.35
        assert 0.6 < float(np.mean(shares)) < 0.7  # 0.65, less what does not fit


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a dog left of a cat", True),
        ("The RIGHT one", True),
        ("a bright light", False),
        ("leftover", False),
        ("", False),
    ],
)
def test_texts_that_name_a_side(text: str, found: bool) -> None:
    assert names_side(("a dog", text), LEFT_RIGHT) is found
    assert not names_side((text,), ())


def test_only_pictures_without_a_side_are_mirrored(tmp_path: Path) -> None:
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, :4] = 255
    for name, text in (("a", "a dog"), ("b", "a dog on the left")):
        Image.fromarray(half).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    config = DataConfig(kind="folder", path=str(tmp_path), flip=0.5, prompt_share=0.0)
    mirrored: dict[str, list[bool]] = {"a.png": [], "b.png": []}
    for sample in islice(open_sample_source(config, seed=0, base=tmp_path), 400):
        mirrored[sample.sample_id].append(np.asarray(sample.open_picture())[0, 0, 0] == 0)
    assert 70 < sum(mirrored["a.png"]) < 130
    assert sum(mirrored["b.png"]) == 0


def test_changes_are_the_same_for_a_seed_and_change_with_the_pass() -> None:
    config = DataConfig(count=3, crop=0.4, flip=0.5)

    def shown(seed: int) -> list[bytes]:
        source = open_sample_source(config, seed=seed, base=Path())
        return [sample.open_picture().tobytes() for sample in islice(source, 30)]

    assert shown(1) == shown(1) != shown(2)
    assert len(set(shown(1))) > 25
    plain = [one.sample_id for one in islice(open_sample_source(DataConfig(count=3), seed=1, base=Path()), 30)]
    assert plain == [one.sample_id for one in islice(open_sample_source(config, seed=1, base=Path()), 30)]
