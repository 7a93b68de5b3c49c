"""The decoder's state: several tokens in a step, dropping, reordering and joining, compared with single steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.pipeline import DecoderOnly
from blip2edge.runtime.decoding.kv.growing import GrowingDecoder, GrowingState
from blip2edge.runtime.decoding.state import Decoder

TEXTS = ((5, 9, 11, 7), (6, 8), (10, 12, 5))  # prompts of different lengths
TAIL = np.array([[4, 9, 5], [7, 7, 6], [11, 4, 8]])


@pytest.fixture(scope="module")
def decoder(tiny_bundle: Path) -> GrowingDecoder:
    language = Captioner.load(tiny_bundle, threads=1).generator.language
    assert isinstance(language, DecoderOnly)
    decoder = language.decoder
    assert isinstance(decoder, GrowingDecoder)
    return decoder


def start(decoder: GrowingDecoder, rows: tuple[int, ...] = (0, 1, 2)) -> GrowingState:
    return decoder.prefill([decoder.table.rows(TEXTS[row]) for row in rows])[1]


def alone(decoder: Decoder, row: int, tokens: list[int]) -> np.ndarray:
    """Logits behind a prompt and tokens, everything read at once."""
    logits, _ = decoder.prefill([decoder.table.rows([*TEXTS[row], *tokens])])
    return logits[0]


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, atol=2e-4 * float(np.abs(wanted).max()))


def test_extending_is_stepping(decoder: GrowingDecoder) -> None:
    stepped, extended = start(decoder), start(decoder)
    one_by_one = np.stack([stepped.step(TAIL[:, at]) for at in range(3)], axis=1)
    close(extended.extend(TAIL), one_by_one)
    assert extended.lengths.tolist() == stepped.lengths.tolist() == [7, 5, 6]
    close(extended.step(TAIL[:, 0]), stepped.step(TAIL[:, 0]))


@pytest.mark.parametrize("kept", [[3, 3, 3], [0, 3, 1], [2, 0, 3], [1, 1, 1]])
def test_what_is_forgotten_was_never_read(decoder: GrowingDecoder, kept: list[int]) -> None:
    state = start(decoder)
    lengths = state.lengths
    state.extend(TAIL)
    state.truncate(lengths + kept)
    assert state.lengths.tolist() == (lengths + kept).tolist()
    logits = state.step(np.array([6, 5, 4]))
    for row, token in enumerate((6, 5, 4)):
        close(logits[row], alone(decoder, row, [*TAIL[row, : kept[row]].tolist(), token]))


def test_one_cannot_keep_what_was_not_read(decoder: GrowingDecoder) -> None:
    state = start(decoder)
    with pytest.raises(ValueError, match="cannot keep"):
        state.truncate(state.lengths + 1)
    with pytest.raises(ValueError, match="cannot keep"):
        state.truncate(state.lengths * 0)


def test_rows_join_and_leave(decoder: GrowingDecoder) -> None:
    state = start(decoder, (1,))
    state.step(np.array([9]))
    state.join(start(decoder, (0, 2)))
    assert state.batch_size == 3
    logits = state.step(np.array([5, 6, 7]))
    for row, (text, tokens) in enumerate(((1, [9, 5]), (0, [6]), (2, [7]))):
        close(logits[row], alone(decoder, text, tokens))
    state.select(np.array([2, 0]))
    logits = state.step(np.array([8, 4]))
    close(logits[0], alone(decoder, 2, [7, 8]))
    close(logits[1], alone(decoder, 1, [9, 5, 4]))
