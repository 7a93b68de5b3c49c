"""The scheduler: requests that join, finish or wait, without changing the captions of others."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.errors import BackendError, DeadlineError, ImageError, OverloadError, PromptError, UsageError
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import EncodedBatch, StageClock
from blip2edge.runtime.captioning.request import Span
from blip2edge.runtime.captioning.scheduler import Scheduler
from blip2edge.runtime.decoding import generate as generate_module
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import PromptText
from tests.drawing import draw_pictures

LONG = 60  # seconds that no test should need
CASES: tuple[tuple[str | None, dict[str, Any]], ...] = (
    (None, {"max_new_tokens": 12}),
    ("a photo of", {"max_new_tokens": 3}),
    ("red dog", {"max_new_tokens": 8, "num_beams": 3}),
    ("two", {"max_new_tokens": 9, "repetition_penalty": 1.5}),
    ("Question: what is two? Short answer:", {"max_new_tokens": 5, "min_new_tokens": 4}),
    (None, {"max_new_tokens": 1}),
    ("a", {"max_new_tokens": 30}),
)


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


class Gate:
    """An encoder that lets pictures through when told to."""

    def __init__(self, captioner: Captioner) -> None:
        self.inner = captioner.encoder
        self.open = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def __call__(
        self,
        images: Sequence[ItemSource],
        texts: Sequence[PromptText | None],
        clock: StageClock,
        queries: int | None = None,
    ) -> EncodedBatch:
        self.entered.release()
        assert self.open.acquire(timeout=LONG)
        return self.inner(images, texts, clock, queries)


@pytest.fixture
def gate(captioner: Captioner) -> Gate:
    return Gate(captioner)


@pytest.fixture
def gated(captioner: Captioner, gate: Gate) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def make(**options: Any) -> Scheduler:
        made.append(Scheduler(gate, captioner.generator, **options))
        return made[-1]

    yield make
    for _ in range(100):
        gate.open.release()
    for scheduler in made:
        scheduler.close()


@pytest.mark.parametrize("max_batch", [1, 2, 3, 8])
def test_the_words_are_those_that_each_gets_alone(max_batch: int, captioner: Captioner) -> None:
    images = draw_pictures(len(CASES), 3)
    alone = [
        captioner.caption(image, prompt=prompt, **options)
        for image, (prompt, options) in zip(images, CASES, strict=True)
    ]
    with captioner.scheduler(max_batch=max_batch) as scheduler:
        requests = [
            scheduler.submit(image, captioner.options(**options), prompt=prompt)
            for image, (prompt, options) in zip(images, CASES, strict=True)
        ]
        results = [request.result(LONG) for request in requests]
        streamed = ["".join(request.pieces()).strip() for request in requests]
    assert [result.tokens for result in results] == [result.tokens for result in alone]
    assert [result.finish_reason for result in results] == [result.finish_reason for result in alone]
    assert streamed == [result.text for result in alone]
    for result in results:
        assert list(result.timings_ms) == list(alone[0].timings_ms)
        assert result.timings_ms["vision"] > 0
        assert result.timings_ms["prefill"] > 0


def test_a_new_picture_joins_the_running_ones_and_a_finished_one_leaves(
    captioner: Captioner, gate: Gate, gated: Callable[..., Scheduler]
) -> None:
    spans: list[Span] = []
    begun = threading.Event()
    hold = threading.Event()

    def trace(span: Span) -> None:
        spans.append(span)
        if span.stage == "decode" and len([one for one in spans if one.stage == "decode"]) == 3:
            begun.set()
            hold.wait(LONG)  # the decoder stands still after its third step

    scheduler = gated(max_batch=4, trace=trace)
    first, second = draw_pictures(2, 5)
    long = scheduler.submit(first, captioner.options(max_new_tokens=12, min_new_tokens=12))
    gate.open.release()
    assert begun.wait(LONG)
    late = scheduler.submit(second, captioner.options(max_new_tokens=4, min_new_tokens=4))
    gate.open.release()
    while scheduler.load["ready"] == 0:
        time.sleep(0.002)
    hold.set()
    assert late.result(LONG).tokens == captioner.caption(second, max_new_tokens=4, min_new_tokens=4).tokens
    assert long.result(LONG).tokens == captioner.caption(first, max_new_tokens=12, min_new_tokens=12).tokens
    rows = [span.requests for span in spans if span.stage == "decode"]
    assert rows == [(0,)] * 3 + [(0, 1)] * 4 + [(0,)] * 5
    assert late.future.done()


def test_a_full_queue_refuses_or_waits(captioner: Captioner, gate: Gate, gated: Callable[..., Scheduler]) -> None:
    scheduler = gated(max_batch=1, max_waiting=2)
    options = captioner.options(max_new_tokens=2)
    picture = draw_pictures(1)[0]
    requests = [scheduler.submit(picture, options)]
    assert gate.entered.acquire(timeout=LONG)
    requests += [scheduler.submit(picture, options) for _ in range(2)]
    assert scheduler.load == {"waiting": 2, "encoding": 1, "ready": 0, "running": 0}
    with pytest.raises(OverloadError, match="2 pictures are waiting"):
        scheduler.submit(picture, options, wait=False)
    requests.pop().cancel()  # what was given up holds no place
    requests.append(scheduler.submit(picture, options, wait=False))
    waiting = threading.Thread(target=lambda: requests.append(scheduler.submit(picture, options)))
    waiting.start()
    for _ in range(4):
        gate.open.release()
    waiting.join(LONG)
    assert len({request.result(LONG).tokens for request in requests}) == 1
    assert len(requests) == 4


def test_a_deadline_ends_a_request_wherever_it_is(
    captioner: Captioner, gate: Gate, gated: Callable[..., Scheduler]
) -> None:
    scheduler = gated(max_batch=2)
    picture = draw_pictures(1)[0]
    late = scheduler.submit(picture, captioner.options(), deadline=0.01)
    patient = scheduler.submit(picture, captioner.options(max_new_tokens=3), deadline=LONG)
    time.sleep(0.02)
    for _ in range(3):
        gate.open.release()
    with pytest.raises(DeadlineError):
        late.result(LONG)
    with pytest.raises(DeadlineError):
        list(late.pieces())
    assert len(patient.result(LONG).tokens) == 3
    with pytest.raises(UsageError, match="deadline"):
        scheduler.submit(picture, captioner.options(), deadline=0)


def test_cancelling_before_and_while_decoding(captioner: Captioner) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def trace(span: Span) -> None:
        if span.stage == "decode" and not reached.is_set():
            reached.set()
            go_on.wait(LONG)

    image, other = draw_pictures(2, 8)
    with captioner.scheduler(max_batch=2, trace=trace) as scheduler:
        running = scheduler.submit(image, captioner.options(max_new_tokens=30, min_new_tokens=30))
        assert reached.wait(LONG)
        stays = scheduler.submit(other, captioner.options(max_new_tokens=6))
        gone = scheduler.submit(other, captioner.options(max_new_tokens=6))
        running.cancel()
        gone.cancel()
        go_on.set()
        assert stays.result(LONG).tokens == captioner.caption(other, max_new_tokens=6).tokens
        for request in (running, gone):
            with pytest.raises(CancelledError):
                request.result(LONG)
            with pytest.raises(CancelledError):
                list(request.pieces())


def test_a_broken_request_fails_alone(captioner: Captioner, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    image = draw_pictures(1)[0]
    with captioner.scheduler(max_batch=4) as scheduler:
        options = captioner.options(max_new_tokens=3)
        good = scheduler.submit(image, options)
        bad = scheduler.submit(broken, options)
        long = scheduler.submit(image, options, prompt="two " * 80)
        more = scheduler.submit(image, options)
        assert good.result(LONG).tokens == more.result(LONG).tokens
        with pytest.raises(ImageError, match=r"broken\.png"):
            bad.result(LONG)
        with pytest.raises(PromptError):
            long.result(LONG)


def test_a_decoder_that_breaks_fails_those_that_run_and_no_others(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = generate_module.GenerationBatch.step
    broken = [True]

    def breaking(self: generate_module.GenerationBatch) -> Any:
        if broken.pop() if broken else False:
            raise BackendError("logits are NaN")
        return step(self)

    monkeypatch.setattr(generate_module.GenerationBatch, "step", breaking)
    image = draw_pictures(1)[0]
    with captioner.scheduler() as scheduler:
        with pytest.raises(BackendError):
            scheduler.submit(image, captioner.options(max_new_tokens=3)).result(LONG)
        assert len(scheduler.submit(image, captioner.options(max_new_tokens=3)).result(LONG).tokens) == 3


def test_a_decoder_without_room_for_one_more_goes_on_with_the_others(
    captioner: Captioner, gate: Gate, gated: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise BackendError("2 rows are more than the 1 that the engine was built for")

    begun, hold = threading.Event(), threading.Event()

    def trace(span: Span) -> None:
        if span.stage == "decode" and not begun.is_set():
            begun.set()
            hold.wait(LONG)

    scheduler = gated(max_batch=4, trace=trace)
    first, second = draw_pictures(2, 5)
    long = scheduler.submit(first, captioner.options(max_new_tokens=8, min_new_tokens=8))
    gate.open.release()
    assert begun.wait(LONG)
    monkeypatch.setattr("blip2edge.runtime.decoding.kv.growing.GrowingState.join", full)
    monkeypatch.setattr("blip2edge.runtime.decoding.kv.in_place.InPlaceState.join", full)
    late = scheduler.submit(second, captioner.options())
    gate.open.release()
    while scheduler.load["ready"] == 0:
        time.sleep(0.002)
    hold.set()
    with pytest.raises(BackendError, match="engine was built for"):
        late.result(LONG)
    assert long.result(LONG).tokens == captioner.caption(first, max_new_tokens=8, min_new_tokens=8).tokens
    assert scheduler.load["running"] == 0


@pytest.mark.parametrize("half", ["encoder", "generator"])
def test_a_mistake_of_ours_lets_nobody_wait(half: str, captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    target = type(getattr(captioner, half))
    monkeypatch.setattr(target, "__call__" if half == "encoder" else "prefill", mistake)
    scheduler = captioner.scheduler()
    request = scheduler.submit(draw_pictures(1)[0], captioner.options())
    with pytest.raises(ZeroDivisionError):
        request.result(LONG)
    monkeypatch.undo()
    assert scheduler.submit(draw_pictures(1)[0], captioner.options(max_new_tokens=2)).result(LONG).tokens
    scheduler.close()


@pytest.mark.parametrize("loop", ["_encoded", "_advance"])
def test_a_scheduler_whose_thread_fails_refuses_requests(
    loop: str, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    scheduler = captioner.scheduler()
    monkeypatch.setattr(scheduler, loop, mistake)
    request = scheduler.submit(draw_pictures(1)[0], captioner.options())
    with pytest.raises(ZeroDivisionError):
        request.result(LONG)
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(draw_pictures(1)[0], captioner.options())
    assert scheduler.failed
    scheduler.close()


def test_closing_cancels_what_is_left(captioner: Captioner, gate: Gate, gated: Callable[..., Scheduler]) -> None:
    scheduler = gated(max_batch=1)
    requests = [scheduler.submit(picture, captioner.options()) for picture in draw_pictures(3)]
    assert gate.entered.acquire(timeout=LONG)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    gate.open.release()
    closing.join(LONG)
    assert not closing.is_alive()
    for request in requests:
        with pytest.raises(CancelledError):
            request.result(LONG)


def test_closing_in_a_thread_of_its_own_does_not_wait_for_itself(
    captioner: Captioner, gate: Gate, gated: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's garbage collector finds an iterator that nobody closed in whatever thread allocates memory."""
    faults: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: faults.append(found.exc_value))
    scheduler = gated(max_batch=1)
    monkeypatch.setattr(captioner, "scheduler", lambda **options: scheduler)
    gc.disable()
    try:
        results = captioner.caption_many(draw_pictures(7), max_new_tokens=4)
        gate.open.release()
        next(results)
        abandoned: list[Any] = [results]
        abandoned.append(abandoned)  # so that only the garbage collector finds it
        del results, abandoned
        monkeypatch.setattr(gate, "inner", lambda *given: (gc.collect(), captioner.encoder(*given))[1])
        gate.open.release(9)
        for thread in scheduler._threads:
            thread.join(LONG)
    finally:
        gc.enable()
    assert not any(thread.is_alive() for thread in scheduler._threads)
    assert not faults
    assert not scheduler.failed


def test_of_equal_requests_the_first_to_come_are_the_first_to_go(captioner: Captioner) -> None:
    done: list[int] = []
    with captioner.scheduler(max_batch=2) as scheduler:
        options = captioner.options(max_new_tokens=4, min_new_tokens=4)
        requests = [scheduler.submit(picture, options) for picture in draw_pictures(7)]
        numbers = {request.future: request.number for request in requests}
        for future in numbers:
            future.add_done_callback(lambda future: done.append(numbers[future]))
        for request in requests:
            request.result(LONG)
    assert [number // 2 for number in done] == sorted(number // 2 for number in done)


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"max_waiting": 0}])
def test_bounds(bad: dict[str, Any], captioner: Captioner) -> None:
    with pytest.raises(UsageError):
        captioner.scheduler(**bad)


SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_k": 9, "max_new_tokens": 8, "min_new_tokens": 8}


def test_a_seed_gives_one_text_whatever_else_runs(captioner: Captioner) -> None:
    """A request that samples with a seed shares no batch, so that rounding cannot change its draws."""
    spans: list[Span] = []
    pictures = draw_pictures(6, 8)
    alone = captioner.caption(pictures[0], prompt="two", seed=7, **SAMPLED)
    long = captioner.options(max_new_tokens=20, min_new_tokens=20)
    with captioner.scheduler(max_batch=4, trace=spans.append) as scheduler:
        load = [scheduler.submit(picture, long) for picture in pictures]
        options = captioner.options(seed=7, **SAMPLED)
        seeded = [scheduler.submit(pictures[0], options, prompt="two") for _ in range(3)]
        load += [scheduler.submit(picture, captioner.options(**SAMPLED)) for picture in pictures]
        results = [request.result(LONG) for request in seeded]
        for request in load:
            request.result(LONG)
    assert {result.tokens for result in results} == {alone.tokens}
    assert ["".join(request.pieces()) for request in seeded] == [alone.text] * 3
    numbers = {request.number for request in seeded}
    batches = [set(span.requests) for span in spans if numbers & set(span.requests)]
    assert all(len(batch) == 1 for batch in batches)
    assert any(len(span.requests) > 1 for span in spans if span.stage == "decode")


def test_pictures_of_one_call_have_streams_of_their_own_and_share_batches(captioner: Captioner) -> None:
    pictures = [draw_pictures(1, 8)[0]] * 3
    apart = list(captioner.caption_many(pictures, seed=7, **SAMPLED))
    assert len({result.tokens for result in apart}) == 3
    assert apart[0].tokens == captioner.caption(pictures[0], seed=7, **SAMPLED).tokens
    together = captioner.caption_many(pictures, seed=7, batch_size=3, **SAMPLED)
    assert [result.tokens for result in together] == [result.tokens for result in apart]
    with captioner.scheduler(max_batch=3) as scheduler:
        options = captioner.options(seed=7, **SAMPLED)
        rows = [scheduler.submit(picture, options, row=row) for row, picture in enumerate(pictures)]
        assert not any(request.separate for request in rows)
        assert [row.result(LONG).tokens for row in rows] == [result.tokens for result in apart]


def test_a_decoder_that_fails_for_a_separate_request_fails_no_other(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = draw_pictures(2, 9)
    step = generate_module.GenerationBatch.step

    def failing(batch: generate_module.GenerationBatch) -> list[generate_module.Generation]:
        if any(row.options.seed == 7 for row in batch.rows):
            raise BackendError("the decoder broke")
        return step(batch)

    monkeypatch.setattr(generate_module.GenerationBatch, "step", failing)
    with captioner.scheduler(max_batch=3) as scheduler:
        good = scheduler.submit(first, captioner.options(max_new_tokens=5, min_new_tokens=5))
        bad = scheduler.submit(second, captioner.options(seed=7, **SAMPLED))
        with pytest.raises(BackendError, match="broke"):
            bad.result(LONG)
        assert len(good.result(LONG).tokens) == 5
        assert scheduler.load["running"] == 0
