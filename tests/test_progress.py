"""The progress reporter on a terminal and in a log."""

from __future__ import annotations

import io
import threading

import pytest

from blip2edge.progress import Progress, counted


def test_log_gets_a_line_at_the_start_and_at_the_end_of_a_stage() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        for done in range(101):
            progress("vision_encoder", done, 100)
        progress("decoder", 1, 1)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "vision_encoder: 0/100"
    assert lines[1].startswith("vision_encoder: 100/100  ")
    assert lines[2].startswith("decoder: 1/1  ")
    assert len(lines) == 3
    assert "\r" not in stream.getvalue()


def test_terminal_gets_a_bar_in_place() -> None:
    stream = io.StringIO()
    with Progress(stream, terminal=True) as progress:
        progress("decoder", 0, 4)
        progress("decoder", 4, 4)
    assert "[........................] 0/4" in stream.getvalue()
    assert "[########################] 4/4" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_last_state_is_shown_when_the_work_stops_early() -> None:
    stream = io.StringIO()

    def work() -> None:
        with Progress(stream) as progress:
            progress("decoder", 0, 4)
            progress("decoder", 2, 4)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        work()
    assert stream.getvalue().splitlines()[-1].startswith("decoder: 2/4")


def test_the_rate_and_the_time_left_count_what_this_run_did() -> None:
    progress = Progress(io.StringIO(), terminal=False, unit="pictures")
    progress("captions", 500, 1000)
    progress("captions", 600, 1000)
    assert progress._text(10.0) == "captions: 600/1000  10.0 s, 10 pictures/s, about 40 s left"


def test_unknown_total_counts_without_a_bar() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress("reading", 0, 0)
        progress("reading", 7, 0)
    assert stream.getvalue().splitlines() == ["reading …", "reading: 7"]


@pytest.mark.parametrize(
    ("seconds", "left"),
    [(3.0, ", about 9 s left"), (60.0, ", about 3 min left"), (3000.0, ", about 2 h 30 min left")],
)
def test_a_long_stage_tells_about_how_much_is_left(monkeypatch: pytest.MonkeyPatch, seconds: float, left: str) -> None:
    now = [100.0]
    monkeypatch.setattr("blip2edge.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress("ranges", 0, 4)
        now[0] += seconds
        progress("ranges", 1, 4)
    assert stream.getvalue().splitlines()[-1] == f"ranges: 1/4  {seconds:.1f} s{left}"


def test_counted_reports_before_each_item_and_at_the_end() -> None:
    seen: list[tuple[int, int]] = []
    assert list(counted("ab", 2, lambda done, total: seen.append((done, total)))) == ["a", "b"]
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert list(counted("ab", 2, None)) == ["a", "b"]


def test_a_note_is_a_line_above_the_bar() -> None:
    stream = io.StringIO()
    with Progress(stream, terminal=True) as progress:
        progress.note("before")
        progress("stage2", 1, 4)
        progress.note("stage2: step 1/4 loss 0.5")
    before, bar, rest = stream.getvalue().split("\n", 1)[0], *stream.getvalue().split("\n", 1)[1].split("\x1b[K", 1)
    assert before == "\rbefore\x1b[K"
    assert bar.startswith("\rstage2  [######")
    assert rest.startswith("\rstage2: step 1/4 loss 0.5\x1b[K\n\rstage2  [######")
    log = io.StringIO()
    with Progress(log) as progress:
        progress.note("stage2: step 1/4 loss 0.5")
    assert log.getvalue() == "stage2: step 1/4 loss 0.5\n"


class Signalling(io.StringIO):
    """A stream that sets an event when something is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        count = super().write(text)
        self.written.set()
        return count


def test_time_moves_while_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2edge.progress.TICK_SECONDS", 0.001)
    monkeypatch.setattr("blip2edge.progress.REDRAW_SECONDS", 0.0)
    stream = Signalling()
    with Progress(stream, terminal=True) as progress:
        progress("decoder: trace", 0, 1)
        stream.written.clear()
        assert stream.written.wait(60)
    assert stream.getvalue().count("decoder: trace  [........................] 0/1") >= 2
    assert stream.getvalue().count("\n") == 1


def test_a_complete_stage_keeps_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are written while the next stage is prepared draw the bar again."""
    now = [100.0]
    monkeypatch.setattr("blip2edge.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(stream, terminal=True)
    progress("stage1", 1, 2)
    now[0] = 103.0
    progress("stage1", 2, 2)
    now[0] = 150.0
    progress.note("stage2: begins")
    progress.close()
    assert stream.getvalue().count("2/2  3.0 s") == 2
    progress("stage2", 0, 2)
    assert "0/2  0.0 s" in stream.getvalue()
