"""A killed and resumed run ends like an uninterrupted one; two processes give the result of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

from tests.training import recipes

pytestmark = pytest.mark.slow  # one process for each kill

LOOP = "snapshot_every = 2\nworkers = 1\ncache_features = true"
DATA = "count = 6\nprompt_share = 0.5"
MIXTURE = "[[data]]\ncount = 6\nratio = 2.0\ncrop = 0.6\n[[data]]\ncount = 8\nseries = 1\nratio = 1.0\nflip = 0.5\n"


@pytest.fixture(scope="module", name="results")
def _results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    root = tmp_path_factory.mktemp("forked")
    recipes.write(root / "recipe.toml", stage2="itg_weight = 1.0", loop=LOOP, data=DATA)
    full = 'seed = 1\nweights_dtype = "float32"'
    recipes.write(root / "start.toml", full)
    begin = 'checkpoint = "start"'
    for name, lines in {"two": "", "one": "batch_size = 4", "summed": "accumulate = 2"}.items():
        text = recipes.recipe(full, model=begin, data="prompt_share = 0.5").replace(
            "[stage1]\nsteps = 4", "[stage1]\nsteps = 0"
        )
        head, stage2 = text.split("[stage2]\n")
        stage2 = stage2.replace("batch_size = 2", lines) if name == "one" else f"{lines}\n{stage2}"
        (root / f"{name}.toml").write_text(f"{head}[stage2]\n{stage2}")
    text = recipes.recipe(full, model=begin, loop="snapshot_every = 2\ndata_streams = 2\nworkers = 1")
    text = text.replace("[stage1]\nsteps = 4", "[stage1]\nsteps = 0")
    head, stage2 = text.split("[stage2]\n")
    (root / "mixed.toml").write_text(f"{head}[stage2]\n{stage2.replace('batch_size = 2', 'batch_size = 4')}\n{MIXTURE}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.forked", str(root)],
        check=False,
        timeout=1200,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_killed_run_ends_with_the_same_weights(results: dict[str, Any]) -> None:
    found = results["resumed"]
    assert set(found["ends"][:-1]) == {-signal.SIGKILL}
    assert found["ends"][-1] == 0
    assert len(found["ends"]) > 5, "it was killed in every phase"
    assert found["broken"] == found["whole"]
    assert set(found["whole"]) == {"model.safetensors", "draft.safetensors"}


def test_its_log_is_the_same_and_nothing_is_left(results: dict[str, Any]) -> None:
    assert results["resumed"]["same_log"]
    assert results["resumed"]["left"] == []


def test_two_processes_take_the_step_of_one_with_twice_the_batch(results: dict[str, Any]) -> None:
    found = results["paired"]
    assert found["ends"] == [0] * len(found["ends"])
    assert found["moved"] > 1e-3
    assert found["difference"]["two"] < 5e-5
    assert found["losses"]["two"] == pytest.approx(found["losses"]["one"], rel=1e-5)


def test_a_mixture_in_streams_is_the_same_for_one_process_and_two_and_is_resumed(results: dict[str, Any]) -> None:
    found = results["mixed"]
    assert found["ends"] == [0] * 5
    assert any(found["killed"])
    assert found["same"]
    assert found["difference"] < 5e-5
    assert found["losses"]["mixed-two"] == pytest.approx(found["losses"]["mixed-one"], rel=1e-5)


def test_two_summed_batches_are_one_of_twice_the_size(results: dict[str, Any]) -> None:
    found = results["paired"]
    assert found["difference"]["summed"] < 5e-5
    assert found["losses"]["summed"] == pytest.approx(found["losses"]["one"], rel=1e-5)


def test_parameters_spread_over_processes_are_kept_and_gathered(results: dict[str, Any]) -> None:
    found = results["sharded"]
    assert found["ends"] == [0, 0]
    assert found["share"] < 0.6, "each process holds about half"
    assert found["same"]
    assert found["collected"]
    assert found["weights"] > 10


def test_half_precision_trains_and_resumes(results: dict[str, Any]) -> None:
    assert results["half"]["ends"] == [0, -signal.SIGKILL, 0, 0]
    for losses in results["half"]["losses"].values():
        assert all(0 < loss < 20 for loss in losses)
    assert results["half"]["same"]


def test_a_process_whose_partner_is_killed_says_so_and_names_the_snapshot(results: dict[str, Any]) -> None:
    found = results["orphaned"]
    assert found["ends"] == [1, -signal.SIGKILL]
    assert found["said"].startswith("ProcessError: another process of this run has ended, or is not reachable (")
    assert "from the snapshot of stage2 step 2 in " in found["said"]
