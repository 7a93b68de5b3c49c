"""The package as a whole: import time, the bare environment, public names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blip2edge

ROOT = Path(__file__).resolve().parent.parent
IMPORT_SECONDS = 0.3  # of CPU time; promised
BLOCKED = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "tensorrt", "tensorrt_rtx")

IMPORT_TIME = """
import sys, time
started = time.process_time()
import blip2edge
print(time.process_time() - started, any(name in sys.modules for name in ("numpy", "torch")))
"""

BARE_IMPORT = """
import importlib, json, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import blip2edge, blip2edge.cli.parser, blip2edge.bundle.schema, blip2edge.bundle.manifest, blip2edge.progress
import blip2edge.runtime
names = [m.name for m in pkgutil.walk_packages(blip2edge.runtime.__path__, "blip2edge.runtime.")]
for name in names:
    importlib.import_module(name)
blip2edge.cli.parser.build_parser()
print(json.dumps(names))
"""


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_promised() -> None:
    seconds, heavy = python(IMPORT_TIME).split()
    assert heavy == "False"
    assert float(seconds) < IMPORT_SECONDS


def test_every_runtime_module_imports_in_a_bare_environment() -> None:
    names = json.loads(python(f"BLOCKED = {BLOCKED!r}\n{BARE_IMPORT}"))
    files = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "runtime").rglob("*.py")}
    modules = {".".join(path.parts) for path in files if path.name != "__init__"}
    assert len(modules) > 30
    assert {name.removeprefix("blip2edge.") for name in names} >= modules


def test_public_names() -> None:
    assert set(blip2edge.__all__) <= set(dir(blip2edge))
    assert set(blip2edge._HOMES) == set(blip2edge.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'Captioneer'"):
        blip2edge.Captioneer  # noqa: B018
    for name, home in blip2edge._HOMES.items():
        if home.startswith("blip2edge.runtime."):
            assert getattr(blip2edge, name).__name__ == name


def test_ci_runs_both_test_commands_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [line.removesuffix(" || status=$?") for line in lines if ".venv/bin/pytest " in line]
    assert [re.findall(r"pytest .*-m (.*)", command) for command in commands] == [['"not slow"'], ["slow"]]
    assert lines[-1] == 'exit "$status"'
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert set(commands) <= {line for block in blocks for line in block.splitlines()}


def test_every_error_stands_in_the_tree() -> None:
    from blip2edge import errors

    names = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert errors.__doc__ is not None
    assert names == set(re.findall(r"\b[A-Z]\w*Error\b", errors.__doc__))
