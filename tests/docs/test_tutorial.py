"""Runs every line of docs/tutorial.md, in order, in an empty directory."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```(\w*)$", re.MULTILINE)
TIMED = re.compile(r" *\d+\.\d ms  (.*)")
PORT = "8765"
NEEDED = ("torch", "accelerate", "onnxscript", "onnxruntime", "starlette")


def script(page: str) -> str:
    """The shell and Python blocks of a page as one shell script that ends at the first error."""
    parts = ["set -eu"]
    for number, (language, text) in enumerate(BLOCK.findall(page)):
        if language == "bash":
            parts.append(text)
        else:
            parts.append(f"python - <<'END_OF_BLOCK_{number}'\n{text}END_OF_BLOCK_{number}\n")
    return "\n".join(parts)


def test_every_block_of_the_page_is_run() -> None:
    page = PAGE.read_text(encoding="utf-8")
    opened = FENCE.findall(page)[::2]
    assert set(opened) == {"bash", "python"}
    assert len(BLOCK.findall(page)) == len(opened)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_tutorial_runs_from_training_to_the_device(tmp_path: Path) -> None:
    for package in NEEDED:
        pytest.importorskip(package, reason=f"the tutorial needs {package}")
    programs, work = tmp_path / "bin", tmp_path / "tutorial"
    programs.mkdir()
    work.mkdir()
    for name, arguments in (("python", ""), ("blip2edge", "-m blip2edge ")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        (programs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        ["bash", "-c", script(PAGE.read_text(encoding="utf-8")).replace(PORT, port)],
        capture_output=True,
        text=True,
        cwd=work,
        env=environment,
        timeout=1100,
        check=False,
    )
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    print(done.stdout, done.stderr, f"{seconds:.0f} s of CPU", sep="\n")
    assert done.returncode == 0, done.stderr
    assert "stage2: step 240/240 loss" in done.stderr
    truth = [(work / "pictures" / "test" / f"{number:04d}.txt").read_text() for number in range(8)]
    lines = done.stdout.splitlines()
    found = [match[1] for line in lines if (match := TIMED.match(line))]
    assert sum(one == other for one, other in zip(found, truth, strict=True)) >= 5
    (answer,) = (json.loads(line) for line in lines if line.startswith("{"))
    assert answer["image"].endswith("0003.png")
    assert lines[-1] == found[4], "the server gives another caption than Python"
