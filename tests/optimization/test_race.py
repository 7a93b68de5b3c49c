"""The choice among forms of a graph: never a slower one, the earlier one where times are nearly equal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the copy is for ONNX Runtime")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, VISION
from blip2edge.optimization import checks, race
from blip2edge.optimization.checks import CopyTask, Form, references
from blip2edge.optimization.race import Times
from blip2edge.optimization.recipes import PassContext, Recipe

PLAIN, PREPACKED = Recipe(("fused attention",)), Recipe(("pointwise convolutions",))
_FASTEST = race.fastest  # before tests/conftest.py replaces it


def busy(seconds: float) -> Callable[[], None]:
    def run() -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return run


def test_a_race_measures_the_ratio_of_cpu_times() -> None:
    times = race.race(busy(0.004), busy(0.002))
    assert times.ratio == pytest.approx(2, rel=0.25)
    assert list(times.milliseconds) == pytest.approx([4, 2], rel=0.25)


@pytest.mark.parametrize(
    ("seconds", "second", "rounds"),
    [(0.0, [1.0, 1.01, 0.99], 5), (4.0, [1.0, 1.01, 0.99], 3), (4.0, [1.0, 1.2, 0.9], 5), (2.0, [1.0, 1.01, 0.99], 3),
     (1.0, [1.0, 1.01, 0.99], 5)],
    ids=["short", "long", "long, and the rounds differ", "10 s in the third round", "10 s in the fifth round"],
)  # fmt: skip
def test_a_long_race_has_fewer_rounds_if_they_agree(
    seconds: float, second: list[float], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``seconds``: wall time of a run; ``second``: CPU time of the second form, whose first form takes 1 s."""
    clock, runs = [0.0], iter(range(100))
    done: list[int] = []

    def cpu_seconds(run: Callable[[], object]) -> float:
        clock[0] += seconds
        done.append(next(runs))
        return second[done[-1] // 2 % 3] if done[-1] % 2 else 1.0

    monkeypatch.setattr(race, "_cpu_seconds", cpu_seconds)
    monkeypatch.setattr(race, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    times = race.race(lambda: None, lambda: None)
    assert len(done) == 2 * rounds
    assert list(times.milliseconds) == [1000, min(second) * 1000]
    assert times.ratio == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("together", "steps"), [(True, 3), (False, 4)])
def test_progress_moves_with_each_form(together: bool, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large form (not together with the portable graph) is the only one; it is loaded and timed in four turns."""
    reports: list[tuple[str, int, int]] = []
    task: Any = SimpleNamespace(report=lambda *report: reports.append(report))
    if together:
        monkeypatch.setattr(race, "race_forms", lambda *_, **__: Times(0.9, (1.0, 1.0)))
    else:
        monkeypatch.setattr(race, "_least_seconds", lambda *_: 1.0)
    forms = [Form(Path(str(at)), PLAIN) for at in range(3 if together else 1)]
    _FASTEST(task, VISION, Form(Path("portable")), forms, together=together)
    assert reports == [(f"time {VISION}", done, steps) for done in range(steps)]


def test_sleeping_is_not_counted() -> None:
    def sleepy() -> None:
        time.sleep(0.02)
        busy(0.002)()

    assert race.race(sleepy, busy(0.002)).ratio == pytest.approx(1, rel=0.4)


def chosen(monkeypatch: pytest.MonkeyPatch, *forms: tuple[Recipe, float]) -> tuple[str, tuple[float, float]]:
    """Name of the form that is chosen when the portable graph takes 100 ms and the others take these times."""
    milliseconds = {Path("portable"): 100.0} | {Path(str(at)): seconds for at, (_, seconds) in enumerate(forms)}
    raced: list[bool] = []

    def race_forms(task: Any, name: str, first: Form, second: Form, *, together: bool) -> Times:
        raced.append(together)
        one, other = milliseconds[first.file], milliseconds[second.file]
        return Times(one / other, (one, other))

    monkeypatch.setattr(race, "race_forms", race_forms)
    task: Any = SimpleNamespace(report=lambda stage, done, total: None)
    made = [Form(Path(str(at)), recipe) for at, (recipe, _) in enumerate(forms)]
    best, times = _FASTEST(task, VISION, Form(Path("portable")), made, together=False)
    assert set(raced) <= {False}
    return str(best.file), times


@pytest.mark.parametrize(
    ("forms", "wanted"),
    [
        ([], "portable"),
        ([(PLAIN, 101)], "portable"),
        ([(PLAIN, 99)], "0"),  # opens sooner, and is not slower
        ([(PREPACKED, 97)], "portable"),  # does not open sooner
        ([(PREPACKED, 90)], "0"),
        ([(PLAIN, 80), (PLAIN, 78)], "0"),  # nearly equal: the earlier one
        ([(PLAIN, 80), (PLAIN, 70)], "1"),
        ([(PLAIN, 110), (PREPACKED, 99), (PLAIN, 60), (PLAIN, 61)], "2"),
    ],
)
def test_the_form_that_is_chosen(
    forms: list[tuple[Recipe, float]], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, times = chosen(monkeypatch, *forms)
    assert found == wanted
    if wanted != "portable":
        assert times == (100, forms[int(wanted)][1])
    elif forms:
        assert times[1] == forms[0][1]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", [VISION, DECODER])
def test_a_slower_form_of_a_real_graph_is_not_kept(
    name: str, together: bool, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    task = CopyTask(bundle, PassContext(None, 0), tmp_path, tmp_path, None, {})
    task.upstream.update(references(task, name)[0])
    portable, rewritten = Form(tiny_bundle / f"{name}.onnx"), Form(tiny_bundle / f"{name}.onnx", Recipe(()))
    runs: list[Form] = []

    def timed_run(_: CopyTask, name: str, session: Any) -> Callable[[], object]:
        run = real(task, name, session)
        runs.append(portable)
        slower = busy(0.003 if len(runs) % 2 == 0 else 0.0)

        def both() -> None:
            run()
            slower()

        return both

    real = checks.timed_run
    monkeypatch.setattr(race, "timed_run", timed_run)
    monkeypatch.setattr(race, "ENOUGH_SECONDS", 0.0)
    best, (before, after) = _FASTEST(task, name, portable, [rewritten], together=together)
    assert best is portable
    assert after > before + 2
