"""Tests of races: the order of contestants, the measured times, and the table of results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import json, os, sys
kind, path = sys.argv[1:]
assert os.environ["OMP_NUM_THREADS"] == "1"
print("ready" if kind != "broken" else "no", flush=True)
for number, line in enumerate(sys.stdin):
    work = json.loads(line)
    with open(path, "a") as log:
        log.write(f"{kind} {work[0]}\\n")
    print(number * 10 + work[1], flush=True)
"""


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("race")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(module, "WORKER", worker)
    return module


def test_the_median_of_the_rounds_ratios(race: Any) -> None:
    """Medians 2 and 4 s would say 0.5; the rounds say 0.5, 0.25 and 0.75."""
    seconds = {"run": {"base": [2.0, 1.0, 3.0], "ours": [4.0, 4.0, 4.0], "twice": [1.0, 0.5, 1.5]}}
    rows = race.table(seconds, "base")
    assert [row["name"] for row in rows] == ["base", "ours", "twice"]
    assert [row["run"]["times"] for row in rows] == [1.0, 0.5, 2.0]
    assert [row["run"]["cpu_ms"] for row in rows] == [2000.0, 4000.0, 1000.0]
    uneven = race.table({"run": {"base": [1.0, 1.0, 9.0], "ours": [1.0, 2.0, 3.0]}}, "base")
    assert uneven[1]["run"] == {"cpu_ms": 2000.0, "times": 1.0}  # of the ratios 1, 0.5 and 3


def test_contestants_take_turns_and_the_first_round_warms_up(race: Any, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    contestants = [race.Contestant(name, name, log) for name in ("a", "b")]
    seconds = race.race(contestants, {"short": ["short", 1], "long": ["long", 2]}, rounds=2)
    # The worker says 10 times the number of the work that it is asked, and the work's own figure.
    assert seconds == {
        "short": {"a": [21.0, 41.0], "b": [21.0, 41.0]},
        "long": {"a": [32.0, 52.0], "b": [32.0, 52.0]},
    }
    turns = Path(log).read_text().splitlines()
    assert turns == ["a short", "b short", "a long", "b long"] * 3


def test_one_that_does_not_start(race: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ours did not start"):
        race.Running(race.Contestant("ours", "broken", str(tmp_path / "log")))


def test_the_versions_of_each_environment(race: Any) -> None:
    contestants = [race.Contestant(name, name, "") for name in ("a", "b")]
    found = race.versions(contestants, ("pytest", "no-such-package"))
    assert found == {"environment 1": {"pytest": pytest.__version__}}


def test_what_is_written(race: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/peers.py", "--rounds", "3"])
    reporting = importlib.import_module("reporting")
    reporting.write_result(None, results=[])
    reporting.write_result(tmp_path / "race.json", results=[1])
    document = json.loads((tmp_path / "race.json").read_text())
    assert document["command"] == "python benchmarks/peers.py --rounds 3"
    assert document["results"] == [1]
    monkeypatch.setattr(sys, "argv", ["/somewhere/tests/faults.py", "--kills", "3"])
    assert reporting.command() == "python -m tests.faults --kills 3"
    assert document["machine"]["cpu"] == reporting.cpu_model()
