"""Hints that name a pip command, in the program and in the docs: they work from where blip2edge was installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blip2edge import packages
from blip2edge.packages import EXTRAS, pip_command
from tests.project import extras

ROOT = Path(__file__).resolve().parent.parent
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("docker/*"))
NAMED = re.compile(r"\[([a-z][a-z,-]*)\]['\" ]")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that says where blip2edge was installed from; see PEP 610."""

    def say(record: dict[str, Any] | None) -> None:
        monkeypatch.setattr(packages, "_direct_url", lambda: record or {})

    return say


def test_the_hint_of_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "CLONE", ROOT)
    assert pip_command("serve") == f"pip install -e '{ROOT}[serve]'"
    assert pip_command() == f"pip install -e {ROOT}"
    assert pip_command(upgrade=True) == f"git -C {ROOT} pull"


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        (None, "'blip2edge[cpu,serve]'"),
        ({"url": "file://TMP/my%20clone", "dir_info": {}}, "'TMP/my clone[cpu,serve]'"),
        (
            {"url": "https://example.org/b.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}},
            "'blip2edge[cpu,serve] @ git+https://example.org/b.git'",
        ),
        (
            {"url": "https://example.org/b.git", "vcs_info": {"vcs": "git", "requested_revision": "v1"}},
            "'blip2edge[cpu,serve] @ git+https://example.org/b.git@v1'",
        ),
        (
            {"url": "file://TMP/blip2edge-0.1.0-py3-none-any.whl", "archive_info": {}},
            "'blip2edge[cpu,serve] @ file://TMP/blip2edge-0.1.0-py3-none-any.whl'",
        ),
        ({"url": "file://TMP/removed/blip2edge-0.1.0-py3-none-any.whl", "archive_info": {}}, "'blip2edge[cpu,serve]'"),
        ({"url": "file://TMP/removed", "dir_info": {}}, "'blip2edge[cpu,serve]'"),
    ],
)
def test_the_hint_of_an_installed_package(
    record: dict[str, Any] | None, hint: str, installed: Any, tmp_path: Path
) -> None:
    """TMP is a directory that has a clone and a wheel, and no ``removed``."""
    (tmp_path / "my clone").mkdir()
    (tmp_path / "blip2edge-0.1.0-py3-none-any.whl").touch()
    installed(record and {**record, "url": record["url"].replace("TMP", tmp_path.as_posix())})
    hint = hint.replace("TMP", tmp_path.as_posix())
    assert pip_command("cpu,serve") == f"pip install {hint}"
    assert pip_command("cpu,serve", upgrade=True) == f"pip install --upgrade {hint}"


def test_the_hint_names_the_environment_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without activation, the shell's pip is that of another environment."""
    monkeypatch.undo()
    here = Path(sys.executable).absolute().parent
    for found, word in ((here / "pip", "pip"), (Path("/usr/bin/pip"), f"{sys.executable} -m pip"), (None, None)):
        monkeypatch.setattr("shutil.which", lambda _, found=found: found and str(found))
        assert packages._pip() == (word or f"{sys.executable} -m pip")


def test_a_process_in_this_clone_gives_the_hint_of_a_clone() -> None:
    code = "from blip2edge.packages import pip_command; print(pip_command('serve'))"
    hint = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert hint.rstrip().endswith(f"install -e '{ROOT}[serve]'")


def test_the_record_of_pip_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def read_text(self, name: str) -> str:
            return json.dumps({"url": name})

    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: Distribution())
    assert packages._direct_url() == {"url": "direct_url.json"}


def test_every_extra_of_a_hint_exists() -> None:
    assert set(EXTRAS.values()) <= extras().keys()
    called = re.compile(r"(?:pip|install)_command\(\s*[\"']([\w,-]+)[\"']")
    sources = [path for name in ("blip2edge", "runtime", "training", "model") for path in (ROOT / name).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    found = [extra for text in texts.values() for names in called.findall(text) for extra in names.split(",")]
    assert len(found) >= 8
    assert set(found) <= extras().keys()
    literal = [str(path) for path, text in texts.items() if re.search(r"pip install '?blip2edge", text)]
    assert [Path(path).name for path in literal] == ["packages.py"]  # one place makes the hints


def test_every_pip_line_of_the_docs_works_from_a_clone() -> None:
    count = 0
    for page in PAGES:
        text = " ".join(page.read_text(encoding="utf-8").split())
        for line in re.findall(r"pip install ([^`#&]*)", text):
            count += 1
            for names in NAMED.findall(line):
                assert set(names.split(",")) <= extras().keys(), (page.name, line)
            assert not re.match(r"'?blip2edge(?!\[\w+\] @ git\+)", line) or page.name == "install.md", (page.name, line)
    assert count >= 20


def test_the_page_of_the_installation_is_complete() -> None:
    page = " ".join((ROOT / "docs" / "install.md").read_text(encoding="utf-8").split())
    assert "run them in the clone, with its environment activated" in page
    assert "docs/install.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| extra \|(.*?) The runtime alone", page)
    assert set(re.findall(r"`([\w-]+)`", table)) >= extras().keys()
