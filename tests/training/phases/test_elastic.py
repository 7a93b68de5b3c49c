"""Elastic training: how many queries a step uses, what it trains, and the weights of a resumed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from blip2edge.errors import ConfigError  # noqa: E402
from blip2edge.model.bridges.mlp import MLPConfig  # noqa: E402
from blip2edge.model.checkpoint.directory import load_checkpoint  # noqa: E402
from blip2edge.training.config import Stage2Phase  # noqa: E402
from blip2edge.training.phases.stage2 import ElasticDraw, GenerativeStage, elastic_draw  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from tests import drawing  # noqa: E402
from tests.training import recipes  # noqa: E402
from tests.training.phases.test_stage2 import case, draw, expected  # noqa: E402

ELASTIC = "elastic = true\nelastic_min = 2\nitg_weight = 1.0"
LOOP = "snapshot_every = 1"


def test_the_numbers_depend_on_seed_and_step_alone() -> None:
    draws = [ElasticDraw(3, 2, 8), ElasticDraw(3, 2, 8), ElasticDraw(4, 2, 8)]
    rows = [[one(step) for step in range(2000)] for one in draws]
    assert rows[0] == rows[1] != rows[2]
    counts = Counter(rows[0])
    assert set(counts) == set(range(2, 9))
    assert counts[2] > counts[4] > counts[8] > 100  # log-uniform: 27 %, 15 %, 8 %
    assert {ElasticDraw(0, 5, 5)(step) for step in range(9)} == {5}


@pytest.mark.parametrize("kind", ["opt", "t5", "instruct-llama"])
def test_the_loss_is_that_of_transformers_with_cut_queries(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = draw(kind, tmp_path)
    made = case(theirs, tmp_path, ("what is it ?", "a dog", "is it red"))
    stage = GenerativeStage(made.ours, elastic=ElasticDraw(0, 3, 3)).eval()
    stage.begin_step(0)
    loss = stage(made.batch)["loss"]
    loss.backward()
    gradient: Any = stage.bridge.get_parameter("qformer.query_tokens").grad
    used = gradient.abs().sum(dim=(0, 2)) > 0
    assert used.tolist() == [True] * 3 + [False] * 2
    assert stage.gauges() == {"queries": 3.0}
    monkeypatch.setattr(theirs.query_tokens, "data", theirs.query_tokens.data[:, :3])
    monkeypatch.setattr(theirs.config, "num_query_tokens", 3)
    bridge = made.ours.config.bridge
    config = replace(made.ours.config, bridge=replace(bridge, num_query_tokens=3))  # type: ignore[type-var]
    monkeypatch.setattr(made.ours, "config", config)
    assert float(loss.detach()) == pytest.approx(float(expected(made).detach()), rel=1e-5)


def test_bridges_without_queries_are_refused_by_name(tmp_path: Path) -> None:
    drawing.save(tmp_path, seed=4)
    config = load_checkpoint(tmp_path).config
    for least in (5, 6):  # with 5 every step would use all queries
        with pytest.raises(ConfigError, match=rf"elastic_min must be below 5, the number of queries, not {least}"):
            elastic_draw(config, Stage2Phase(elastic=True, elastic_min=least), 0)
    assert elastic_draw(config, Stage2Phase(elastic=True, elastic_min=4), 0) is not None
    assert elastic_draw(config, Stage2Phase(), 0) is None
    with pytest.raises(ConfigError, match=r"\[stage2\] elastic is true, but the bridge of kind 'mlp' has no learned"):
        elastic_draw(replace(config, bridge=MLPConfig(32, 32, 17)), Stage2Phase(elastic=True), 0)


def weights(directory: Path) -> dict[str, Any]:
    return {**load_file(directory / "model.safetensors"), **load_file(directory / "draft.safetensors")}


def gauges(directory: Path) -> list[float]:
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [line["gauges"]["queries"] for line in lines if line["phase"] == "stage2"]


KILLED = """
import os, signal, sys
from blip2edge.training.run import train

def progress(phase, done, total):
    if phase == "stage2" and done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

train("stage2", sys.argv[1], sys.argv[2], evaluation_scenes=0, progress=progress)
"""


@pytest.mark.slow  # a process of its own
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    path = recipes.write(tmp_path / "recipe.toml", stage2=ELASTIC, loop=LOOP)
    train("stage2", path, tmp_path / "whole", evaluation_scenes=0)
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "resumed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, timeout=600, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "resumed").exists()
    train("stage2", path, tmp_path / "resumed", evaluation_scenes=0)
    whole, resumed = (weights(tmp_path / name) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert gauges(tmp_path / "whole") == gauges(tmp_path / "resumed")


def test_a_later_run_without_elastic_takes_the_mark_away(tmp_path: Path) -> None:
    first = recipes.write(tmp_path / "first.toml", stage2=ELASTIC)
    train("stage2", first, tmp_path / "elastic", evaluation_scenes=0)
    assert json.loads((tmp_path / "elastic" / "config.json").read_text())["elastic_queries"] == 2
    assert load_checkpoint(tmp_path / "elastic").config.elastic == 2
    (tmp_path / "second.toml").write_text(f'[model]\ncheckpoint = "elastic"\n[stage2]\n{recipes.PHASE}')
    train("stage2", tmp_path / "second.toml", tmp_path / "plain", evaluation_scenes=0)
    assert "elastic_queries" not in json.loads((tmp_path / "plain" / "config.json").read_text())
