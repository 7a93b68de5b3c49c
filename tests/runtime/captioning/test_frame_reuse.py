"""Frames that hardly change: the encoder is not run, and the caption is that of the last encoded frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the bundles are exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.errors import UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import StageClock
from blip2edge.runtime.captioning.reuse.frames import CELLS, cells_of
from blip2edge.runtime.serving.streams.sources import Frame
from blip2edge.runtime.serving.watch import WatchResult, watch
from tests.drawing import draw_pictures
from tests.families.drawing_blip import save_blip
from tests.families.drawing_idefics import draw_idefics
from tests.families.drawing_instruct import draw_instructblip


class Counting:
    """A session that counts its runs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.input_names, self.output_names = session.input_names, session.output_names
        self.runs = 0

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        self.runs += 1
        found: dict[str, Any] = self._session.run(inputs, outputs)
        return found

    def close(self) -> None:
        self._session.close()


class Counted:
    """A captioner whose graphs before the decoder are counted."""

    def __init__(self, bundle: Path) -> None:
        self.captioner = Captioner.load(bundle, threads=1)
        encoder, language = self.captioner.encoder, self.captioner.generator.language
        self.sessions: dict[str, Any] = {"vision": Counting(encoder.images.vision)}
        if encoder.images.bridge is not None:
            self.sessions["bridge"] = Counting(encoder.images.bridge)
        encoder.images = replace(encoder.images, **self.sessions)
        cross: Any = getattr(language, "cross_kv", None)
        if cross is not None:
            self.sessions["cross"] = Counting(cross)
            setattr(language, "cross_kv", self.sessions["cross"])  # noqa: B010 - not of every language model

    def since(self) -> dict[str, int]:
        """Runs since the last call."""
        runs = {name: session.runs for name, session in self.sessions.items()}
        for session in self.sessions.values():
            session.runs = 0
        return runs


@pytest.fixture(scope="module")
def counted(tiny_bundle: Path) -> Counted:
    return Counted(tiny_bundle)


@pytest.fixture(autouse=True)
def _from_zero(request: pytest.FixtureRequest) -> None:
    if "counted" in request.fixturenames:
        request.getfixturevalue("counted").since()


def watched(counted: Counted, pictures: Sequence[Any], below: float, **options: Any) -> list[WatchResult]:
    def frames() -> Iterator[Frame]:
        for index, picture in enumerate(pictures):
            yield Frame(str(index), picture)

    options = {"max_new_tokens": 6, **options}
    return list(watch(counted.captioner, frames(), every=True, reuse_below=below, **options))


def tokens(seen: Sequence[WatchResult]) -> list[tuple[int, ...]]:
    return [one.result.tokens for one in seen if one.result is not None]


def grey(value: int) -> NDArray[np.uint8]:
    return np.full((40, 40, 3), value, np.uint8)


def test_an_identical_frame_is_not_encoded_and_says_the_same(counted: Counted) -> None:
    picture = draw_pictures(1, 4)[0]
    seen = watched(counted, [picture, picture.copy(), picture.copy()], 1e-6)
    assert counted.since() == {"vision": 1, "bridge": 1}
    assert [one.reused for one in seen] == [False, True, True]
    alone = counted.captioner.caption(picture, max_new_tokens=6).tokens
    assert tokens(seen) == [alone] * 3
    for one in seen[1:]:
        assert one.result is not None
        assert one.result.timings_ms["vision"] == one.result.timings_ms["bridge"] == 0
        assert one.result.timings_ms["prefill"] > 0


def test_a_frame_that_changed_is_encoded_again(counted: Counted) -> None:
    pictures = draw_pictures(3, 5)
    order = [pictures[0], pictures[1], pictures[1], pictures[2], pictures[0]]
    seen = watched(counted, order, 0.01)
    assert [one.reused for one in seen] == [False, False, True, False, False]
    assert counted.since() == {"vision": 4, "bridge": 4}
    assert tokens(seen) == [counted.captioner.caption(one, max_new_tokens=6).tokens for one in order]


def test_drift_adds_up(counted: Counted) -> None:
    """Steps of 2 in 255: two stay below 0.02 of the range, the third passes it and is what later ones differ from."""
    seen = watched(counted, [grey(100 + 2 * step) for step in range(9)], 0.02)
    assert [one.reused for one in seen] == [False, True, True] * 3
    assert counted.since()["vision"] == 3
    encoded = [counted.captioner.caption(grey(100 + 6 * step), max_new_tokens=6).tokens for step in range(3)]
    assert tokens(seen) == [one for one in encoded for _ in range(3)]


def test_off_every_frame_is_encoded(counted: Counted) -> None:
    seen = watched(counted, [grey(9)] * 3, 0.0)
    assert [one.reused for one in seen] == [False] * 3
    assert counted.since() == {"vision": 3, "bridge": 3}


def test_a_broken_frame_changes_nothing(counted: Counted) -> None:
    seen = watched(counted, [grey(50), b"half a pict", grey(50)], 0.01)
    assert [(one.reused, bool(one.error)) for one in seen] == [(False, False), (False, True), (True, False)]
    assert counted.since()["vision"] == 1


@pytest.mark.parametrize("below", [-0.1, 1.1, math.nan])
def test_limits(counted: Counted, below: float) -> None:
    with pytest.raises(UsageError, match="reuse_below to be a number from 0 to 1"):
        watched(counted, [grey(0)], below)


def test_black_and_white_are_one_apart(counted: Counted) -> None:
    encoder = counted.captioner.reusing(0.5)
    for value, difference in ((0, math.inf), (255, 1.0), (255, 0.0), (204, 0.2)):
        encoder([grey(value)], [None], StageClock())
        assert encoder.difference == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize("size", [(5, 7), (32, 32), (64, 96), (50, 45)])
def test_cells_are_means(size: tuple[int, int]) -> None:
    height, width = size
    pixels = np.random.default_rng(1).normal(size=(2, 3, height, width)).astype(np.float16)
    spans = np.array([2.0, 3.0, 4.0], np.float32)
    found = cells_of(pixels, spans)
    rows, columns = min(CELLS, height), min(CELLS, width)
    assert found.shape == (2, 3, rows, columns)
    for row in range(rows):
        for column in range(columns):
            cell = pixels[
                :,
                :,
                row * height // rows : (row + 1) * height // rows,
                column * width // columns : (column + 1) * width // columns,
            ].astype(np.float64)
            wanted = cell.mean((2, 3)) / spans
            np.testing.assert_allclose(found[:, :, row, column], wanted, rtol=1e-4, atol=1e-5)


def test_another_instruction_reads_the_same_picture_again(tmp_path: Path) -> None:
    draw_instructblip(tmp_path / "checkpoint", 1, "llama", cross_attention_frequency=1)
    counted = Counted(export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle)
    encoder = counted.captioner.reusing(0.01)
    texts = ["A short image caption.", "what is it doing?", "what is it doing?", "A short image caption."]
    picture = grey(80)
    picture[:20, :, 0] = 200
    ran = []
    for text in texts:
        found = encoder([picture], [text], StageClock())
        ran.append(counted.since())
        wanted = counted.captioner.encoder([picture], [text], StageClock())
        counted.since()
        assert found.prompts == wanted.prompts
        for name, array in wanted.pictures.items():
            np.testing.assert_array_equal(found.pictures[name], array)
    assert [one["vision"] for one in ran] == [1, 0, 0, 0]
    assert [one["bridge"] for one in ran] == [1, 1, 0, 1]


def test_cross_keys_are_used_again(tmp_path: Path) -> None:
    save_blip(tmp_path / "checkpoint", "caption", 0)
    counted = Counted(export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle)
    pictures = draw_pictures(2, 1)
    seen = watched(counted, [pictures[0], pictures[0], pictures[1], pictures[1]], 0.001)
    assert counted.since() == {"vision": 2, "cross": 2}
    alone = [counted.captioner.caption(one, max_new_tokens=6).tokens for one in pictures]
    assert tokens(seen) == [alone[0], alone[0], alone[1], alone[1]]


def test_several_pictures_between_texts(tmp_path: Path) -> None:
    draw_idefics(tmp_path / "checkpoint", 0)
    counted = Counted(export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle)
    one, other = draw_pictures(2, 8)
    frames: list[Any] = [[one, other], [one, other], one, [one, other], [other, one]]
    seen = watched(counted, frames, 0.001)
    assert [again.reused for again in seen] == [False, True, False, False, False]
    assert tokens(seen) == [counted.captioner.caption(frame, max_new_tokens=6).tokens for frame in frames]


def test_one_of_several_pictures_that_changed_counts_alone(tmp_path: Path) -> None:
    """A change of 0.04 in one of four frames would be 0.01 over all of them."""
    draw_idefics(tmp_path / "checkpoint", 0)
    counted = Counted(export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle)
    encoder = counted.captioner.reusing(0.02)
    still: list[Any] = [grey(100), grey(100), grey(100)]
    for last, difference in ((grey(100), math.inf), (grey(110), 10 / 255), (grey(110), 0.0)):
        encoder([[*still, last]], [None], StageClock())
        assert encoder.difference == pytest.approx(difference, abs=1e-6)
        assert encoder.reused is (difference == 0)


@pytest.mark.parametrize("rows", [0, 2])
def test_only_a_row_a_call(counted: Counted, rows: int) -> None:
    encoder = counted.captioner.reusing(0.5)
    with pytest.raises(ValueError, match=f"one item in a call of a reusing encoder, got {rows}"):
        encoder([grey(0)] * rows, [None] * rows, StageClock())
    assert counted.since()["vision"] == 0
