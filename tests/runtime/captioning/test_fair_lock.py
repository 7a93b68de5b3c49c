"""The fair lock of the scheduler: one holder at a time, in order of request."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")

from blip2edge.runtime.backends.probe import cores
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import FairLock
from blip2edge.runtime.captioning.request import Span
from tests.drawing import draw_pictures


def test_a_loop_does_not_overtake_a_waiting_thread() -> None:
    lock, order, held = FairLock(), list[str](), threading.Event()

    def other() -> None:
        held.wait()
        with lock():
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    for number in range(3):
        with lock():
            order.append("loop")
            held.set()
            if number == 0:
                while len(lock._line) < 2 and thread.is_alive():
                    time.sleep(0.001)
    thread.join()
    assert order == ["loop", "other", "loop", "loop"]


def test_an_error_releases_the_lock() -> None:
    lock = FairLock()
    with pytest.raises(ValueError, match="broken"), lock():
        raise ValueError("broken")
    with lock():
        pass


@pytest.mark.parametrize(("threads", "one_at_a_time"), [(None, True), (max(1, cores() // 2), cores() == 1)])
def test_graphs_that_take_all_cores_never_run_at_once(
    tiny_bundle: Path, threads: int | None, one_at_a_time: bool
) -> None:
    captioner = Captioner.load(tiny_bundle, threads=threads)
    assert captioner.graphs.takes_all_cores is one_at_a_time
    pictures = draw_pictures(6, 3)
    wanted = [captioner.caption(picture, max_new_tokens=8).tokens for picture in pictures]
    spans: list[Span] = []
    with captioner.scheduler(max_batch=2, trace=spans.append) as scheduler:
        options = captioner.options(max_new_tokens=8)
        requests = [scheduler.submit(picture, options) for picture in pictures]
        assert [request.result().tokens for request in requests] == wanted
    graphs = [span for span in spans if span.stage != "preprocess"]
    assert {span.stage for span in graphs} == {"vision", "bridge", "prefill", "decode"}
    ordered = sorted(graphs, key=lambda span: span.start)
    if one_at_a_time:
        assert all(one.end <= two.start for one, two in itertools.pairwise(ordered))


def test_a_row_that_comes_free_wakes_the_encoder(tiny_bundle: Path) -> None:
    captioner = Captioner.load(tiny_bundle)

    def look_now(span: Span) -> None:
        """Lets the encoder's thread see that the row is taken."""
        if span.stage == "decode":
            with scheduler._changed:
                scheduler._changed.notify_all()
            time.sleep(0.005)

    with captioner.scheduler(max_batch=1, trace=look_now) as scheduler:
        options = captioner.options(max_new_tokens=3)
        requests = [scheduler.submit(picture, options) for picture in draw_pictures(3, 4)]
        assert all(request.future.result(timeout=60).tokens for request in requests)
