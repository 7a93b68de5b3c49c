"""A sample of the kills of ``make faults``: the output is the old or the new one, and the next run cleans up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

KILLS = 21  # three of each of the seven commands


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed runs are forked")
def test_a_sample_of_kills(tmp_path: Path) -> None:
    result, own = tmp_path / "faults.json", tmp_path / "torch"
    words = ["--kills", str(KILLS), "--json", str(result)]
    command = [sys.executable, "-m", "tests.faults", *words]
    torch_directory = {"TORCHINDUCTOR_CACHE_DIR": str(own)}  # torch makes it when it is imported
    environment = {**os.environ, **torch_directory, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = json.loads(result.read_text())["tallies"]
    assert {sum(tally["kills"] for tally in ways.values()) for ways in commands.values()} == {KILLS // 7}
    tallies = [tally for ways in commands.values() for tally in ways.values()]
    assert sum(tally["held"] for tally in tallies) == KILLS
    assert sum(tally["kills"] - tally["too_late"] for tally in tallies) >= KILLS // 3
    assert set(os.listdir(tmp_path)) - {own.name} == {result.name}
