"""The package as a whole: import time, an environment without optional packages, public names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import blip2edge
from blip2edge import errors

ROOT = Path(__file__).resolve().parent.parent
IMPORT_SECONDS = 0.3  # of CPU time; promised
BLOCKED = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "tensorrt", "tensorrt_rtx")

IMPORT_TIME = """
import sys, time
started = time.process_time()
import blip2edge
print(time.process_time() - started, any(name in sys.modules for name in ("numpy", "torch")))
"""

BLOCKER = """
import importlib, json, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""
BARE_IMPORT = """
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
    names = json.loads(python(f"BLOCKED = {BLOCKED!r}\n{BLOCKER}\n{BARE_IMPORT}"))
    files = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "runtime").rglob("*.py")}
    modules = {".".join(path.parts) for path in files if path.name != "__init__"}
    assert len(modules) > 30
    assert {name.removeprefix("blip2edge.") for name in names} >= modules


def error_names() -> set[str]:
    """The names of the error classes; the module has warnings and imported classes too."""
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    return {name for name, value in classes.items() if issubclass(value, errors.Blip2EdgeError)}


def test_public_names() -> None:
    assert set(blip2edge.__all__) <= set(dir(blip2edge))
    raised = error_names()
    assert set(blip2edge._HOMES) | raised | {"__version__"} == set(blip2edge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Captioneer'"):
        blip2edge.Captioneer  # noqa: B018
    for name, (home, extra) in blip2edge._HOMES.items():
        if not extra:
            assert getattr(blip2edge, name).__name__ == name
            assert home.startswith(("blip2edge.runtime.", "blip2edge.bundle."))


# All names of the package in an installation without the packages of the extras.
WITHOUT_EXTRAS = """
import inspect, io, pydoc
from blip2edge import *
import blip2edge

for name in blip2edge.__all__:
    assert hasattr(blip2edge, name), name
members = dict(inspect.getmembers(blip2edge))
assert set(blip2edge.__all__) <= set(members) and set(blip2edge.__all__) <= set(dir(blip2edge))
help_text = pydoc.plain(pydoc.render_doc(blip2edge))
assert "class Captioner" in help_text and "Not available: blip2edge.optimize needs" in help_text
assert isinstance(Captioner, type) and issubclass(UsageError, Blip2EdgeError)
told = {}
for name in ("build", "calibrate", "evaluate", "explain", "export_checkpoint", "optimize"):
    try:
        members[name]("somewhere")
    except Blip2EdgeError as error:
        told[name] = [type(error).__name__, str(error)]
print(json.dumps(told))
"""


def test_public_names_without_the_extras() -> None:
    told = json.loads(python(f"BLOCKED = {BLOCKED!r}\n{BLOCKER}\n{WITHOUT_EXTRAS}"))
    assert told.pop("evaluate")[0] == "BundleError"  # a bundle is scored without torch
    assert {kind for kind, _ in told.values()} == {"MissingPackageError"}
    assert told["build"][1].startswith(
        "blip2edge.build needs the package 'onnx_ir', which is not installed; install it: "
    )
    assert told["build"][1].endswith("[build]'")
    assert told["export_checkpoint"][1].endswith("[cpu,export]'")


def test_a_name_is_looked_up_again_after_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blip2edge._HOMES, "Later", ("not_installed_yet:Later", "later"))
    with pytest.raises(ImportError, match=r"blip2edge\.Later needs .*pip install 'blip2edge\[later\]'"):
        blip2edge.Later()
    module = ModuleType("not_installed_yet")
    vars(module)["Later"] = dict
    monkeypatch.setitem(sys.modules, "not_installed_yet", module)
    assert blip2edge.Later is dict
    monkeypatch.delitem(vars(blip2edge), "Later")


def test_a_mistake_of_ours_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blip2edge._HOMES, "Moved", ("blip2edge.no_such_module:Moved", ""))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        blip2edge.Moved  # noqa: B018


# What mypy must refuse; `warn_unused_ignores` makes every comment below an assertion of its own.
TYPED = """
from blip2edge import Captioner, GenerationOptions, Matcher

captioner = Captioner.load("bundle", backend="cpu", draft="lookup")
captioner.caption("dog.jpg", prompt="a", max_new_tokens=3, num_beams=1, top_p=0.9, stop=["."], draft="none").text
captioner.ask("dog.jpg", "is it red?", seed=1)
list(captioner.caption_many(["dog.jpg"], prompts=["a"], batch_size=2, length_penalty=1))
with Captioner.load("bundle") as opened, Matcher.load("bundle", backend="cuda") as matcher:
    opened.options(max_new_tokens=3).max_new_tokens + 1
    matcher.match("dog.jpg", "a dog").cosine + 1.0
captioner.caption("dog.jpg", max_tokens=3)  # type: ignore[call-arg]
captioner.caption("dog.jpg", max_new_tokens="3")  # type: ignore[arg-type]
captioner.caption("dog.jpg", stop=".")  # type: ignore[arg-type]
captioner.stream("dog.jpg", draft="qformer")  # type: ignore[arg-type]
captioner.ask("dog.jpg", 3)  # type: ignore[arg-type]
Captioner.load("bundle", backend="cudaa")  # type: ignore[arg-type]
Matcher.load("bundle", backend="gpu")  # type: ignore[arg-type]
Captioner("bundle")  # type: ignore[arg-type]
GenerationOptions(draft="yes")  # type: ignore[arg-type]
"""


@pytest.mark.slow
def test_mypy_refuses_wrong_options(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
    command += ["--follow-imports=silent", str(tmp_path / "user.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_both_test_commands_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [line.removesuffix(" || status=$?") for line in lines if ".venv/bin/pytest " in line]
    assert [re.findall(r"pytest .*-m (.*)", command) for command in commands] == [['"not slow"'], ["slow"]]
    assert lines[-1] == 'exit "$status"'
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert set(commands) <= {line for block in blocks for line in block.splitlines()}


def test_every_error_stands_in_the_tree() -> None:
    from blip2edge import errors

    assert errors.__doc__ is not None
    assert error_names() == set(re.findall(r"\b[A-Z]\w*Error\b", errors.__doc__))
