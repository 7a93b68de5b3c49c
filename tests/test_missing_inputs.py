"""A command whose input is missing says so in one line, with exit status 1, before it imports what takes seconds."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

from tests.drawing import draw_pictures

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "checkpoint"
MOST_S = 1.5  # CPU time; importing torch alone takes longer

COMMANDS = (
    "ask nowhere.png what -b BUNDLE",
    "bench nowhere",
    "build nowhere",
    "bulk nowhere -o out -b BUNDLE",
    "bulk FOLDER -o out -b nowhere",
    "calibrate nowhere -o out --images FOLDER",
    "calibrate BUNDLE -o out --images nowhere",
    "calibrate BUNDLE -o out --references nowhere.json",
    "capfilt nowhere --captioner BUNDLE --matcher BUNDLE -o out",
    "capfilt FOLDER --captioner nowhere --matcher CHECKPOINT -o out",
    "capfilt FOLDER --captioner CHECKPOINT --matcher nowhere -o out",
    "caption nowhere.png -b BUNDLE",
    "caption FOLDER/a.png -b nowhere",
    "certify nowhere",
    "embed FOLDER/a.png -b nowhere",
    "eval nowhere",
    "eval BUNDLE --data nowhere.json",
    "eval CHECKPOINT --data nowhere.json",
    "eval CHECKPOINT --clip nowhere",
    "eval CHECKPOINT --data questions.json --reader nowhere",
    "explain nowhere.png -b BUNDLE -o out",
    "explain FOLDER/a.png -b nowhere -o out",
    "export nowhere -o out",
    "export nowhere.pth -o out",
    "export CHECKPOINT -o out --base nowhere",
    "inspect nowhere",
    "match FOLDER/a.png --text a -b nowhere",
    "optimize nowhere --backend cpu",
    "plan nowhere/config.json",
    "push nowhere ORG/NAME",
    "serve nowhere",
    "serve BUNDLE --tls-cert nowhere --tls-key nowhere",
    "sign nowhere --key KEY",
    "sign BUNDLE --key nowhere",
    "train stage2 -c nowhere.toml",
    "train stage2 -c FOLDER/checkpoint.toml",
    "train stage2 -c FOLDER/data.toml",
    "train stage2 -c FOLDER/validation.toml",
    "triton nowhere -o out",
    "verify BUNDLE --key nowhere",
    "watch nowhere -b BUNDLE",
    "watch FOLDER -b nowhere --once",
)

WITH_TORCH = ("train", "export", "eval", "capfilt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pictures")
    draw_pictures(1)[0].save(made / "a.png")
    parts = '[model]\ncheckpoint = "{}"\n[data]\nkind = "folder"\npath = "{}"\n'
    validation = '[validation]\nevery = 1\nkind = "coco-captions"\npath = "nowhere.json"\n'
    recipes = {"checkpoint": ("nowhere", "."), "data": (CHECKPOINT, "nowhere"), "validation": (CHECKPOINT, ".")}
    for name, given in recipes.items():
        text = f"{parts.format(*given)}{validation if name == 'validation' else ''}[stage2]\nsteps = 2\n"
        (made / f"{name}.toml").write_text(text, encoding="utf-8")
    return made


@pytest.mark.parametrize(
    "command",
    [pytest.param(each, marks=() if each.split()[0] in WITH_TORCH else pytest.mark.slow, id=each) for each in COMMANDS],
)
def test_a_missing_input(command: str, tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    places = {"BUNDLE": tiny_bundle, "CHECKPOINT": CHECKPOINT, "FOLDER": folder}
    for name, path in places.items():
        command = command.replace(name, str(path))
    words = [sys.executable, "-m", "blip2edge", *shlex.split(command)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        words,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 1, run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "nowhere" in last or "No such file" in last or "no signature" in last
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST_S
    assert not any(path.name == "out" for path in tmp_path.iterdir())
