"""Chooses the fastest of several versions of a graph. Two versions are timed in turn, under the same conditions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from blip2edge.optimization.checks import CopyTask, Form, timed_run
from blip2edge.runtime.backends.huge_pages import wait_for_huge_pages

FEWEST, MOST, ENOUGH_SECONDS = 5, 15, 1.5
"""Limits of a race: smallest number of rounds, largest number of rounds, and seconds of CPU time.

A race ends when this CPU time is used and the smallest number of rounds is done, or after the largest number of rounds.
"""

FEWEST_LONG, LONG_SECONDS = 3, 10.0
"""Number of rounds, and seconds of wall time, of a long race.

A race that has taken ``LONG_SECONDS`` ends after ``FEWEST_LONG`` rounds, if the ratios of its rounds differ by less
than :data:`CLEARLY_SLOWER`. If they differ more, the race has at least :data:`FEWEST` rounds.
"""

CLEARLY_SLOWER = 1.05
"""A version of a graph is replaced by the next version only if it is slower than the next version by this factor.

So small differences, which change from measurement to measurement, do not decide.
"""


@dataclass(frozen=True)
class Times:
    """The result of timing two versions of a graph in turn.

    Attributes:
        ratio: CPU time of the first version divided by that of the second, the median over rounds.
        milliseconds: The least CPU time of each version.
    """

    ratio: float
    milliseconds: tuple[float, float]


def race(first: Callable[[], object], second: Callable[[], object]) -> Times:
    """Times two functions in turn (A B A B).

    The CPU time of the process is measured, and the ratio is computed within each round, because other processes on the
    machine slow both functions down.
    """
    first()
    second()
    start = time.perf_counter()
    rounds: list[tuple[float, float]] = []
    ratios: list[float] = []
    while not (
        _agree_after_long(ratios, start)
        or (len(rounds) >= FEWEST and (len(rounds) >= MOST or sum(map(sum, rounds)) >= ENOUGH_SECONDS))
    ):
        one, other = _cpu_seconds(first), _cpu_seconds(second)
        rounds.append((one, other))
        ratios.append(one / max(other, 1e-9))
    least = [round(min(times) * 1e3, 3) for times in zip(*rounds, strict=True)]
    return Times(statistics.median(ratios), (least[0], least[1]))


def _agree_after_long(measured: Sequence[float], start: float) -> bool:
    """Returns whether a race that began at ``start`` has lasted long, and its measured values are nearly equal."""
    return (
        len(measured) >= FEWEST_LONG
        and time.perf_counter() - start >= LONG_SECONDS
        and max(measured) < min(measured) * CLEARLY_SLOWER
    )


def race_forms(task: CopyTask, name: str, first: Form, second: Form, *, together: bool = True) -> Times:
    """Loads two versions of a graph and times them in turn.

    Args:
        task: The bundle, and the directories of the copies.
        name: The graph's name.
        first: A version of the graph.
        second: Another version of the graph.
        together: Whether both may be in memory at the same time. If not, they are loaded and timed in turn, twice.
    """
    if not together:
        turns = first, second, first, second
        alone = []
        for done, form in enumerate(turns):
            task.report(f"time {name}", done, len(turns))
            alone.append(_least_seconds(task, name, form))
        one, other = min(alone[::2]), min(alone[1::2])
        return Times(one / other, (round(one * 1e3, 3), round(other * 1e3, 3)))
    with ExitStack() as stack:
        return race(*(stack.enter_context(_opened(task, name, form)) for form in (first, second)))


def fastest(
    task: CopyTask, name: str, portable: Form, forms: Sequence[Form], *, together: bool = True
) -> tuple[Form, tuple[float, float]]:
    """Chooses the version of a graph that is used.

    A rewritten version replaces the exported graph if it is clearly faster. If the weights of the rewritten version are
    not prepacked when it is loaded, the version opens sooner than the exported graph, and any gain in speed is enough.
    A later version replaces an earlier version only if it is clearly faster.

    Args:
        task: The bundle, and the directories of the copies.
        name: The graph's name.
        portable: The exported (not optimized) graph.
        forms: Rewritten versions whose outputs were checked; the version that is fastest most often is first.
        together: Whether two versions may be in memory at the same time. If not, they are loaded and timed in turn.

    Returns:
        The chosen version, and the CPU milliseconds of the exported graph and of this version. If the exported graph is
        chosen, the second number is the time of the last rewritten version.
    """
    best, gained, milliseconds = portable, 0.0, (0.0, 0.0)
    for done, form in enumerate(forms):
        if together:  # otherwise each form is one of several steps
            task.report(f"time {name}", done, len(forms))
        found = race_forms(task, name, portable, form, together=together)
        if found.ratio <= _least_gain(form):
            milliseconds = milliseconds if gained else found.milliseconds
        elif not gained or (
            found.ratio > gained and race_forms(task, name, best, form, together=together).ratio > CLEARLY_SLOWER
        ):
            best, gained, milliseconds = form, found.ratio, found.milliseconds
    return best, milliseconds


def _least_gain(form: Form) -> float:
    """Returns the ratio (time of the exported graph / time of this version) above which this version may be used."""
    return CLEARLY_SLOWER if form.recipe is not None and form.recipe.layout else 1.0


@contextmanager
def _opened(task: CopyTask, name: str, form: Form) -> Iterator[Callable[[], object]]:
    """Loads a version of a graph, yields the function that is timed, and closes the graph at the end."""
    session = form.open()
    wait_for_huge_pages()
    try:
        yield timed_run(task, name, session)
    finally:
        session.close()


def _least_seconds(task: CopyTask, name: str, form: Form) -> float:
    with _opened(task, name, form) as run:
        run()
        start = time.perf_counter()
        seconds: list[float] = []
        while len(seconds) < FEWEST and not _agree_after_long(seconds, start):
            seconds.append(_cpu_seconds(run))
        return min(seconds)


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
