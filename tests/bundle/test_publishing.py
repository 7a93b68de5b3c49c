"""Publishing by rename: the old directory stays until the new one is complete, also after an error."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blip2edge.bundle import publishing
from blip2edge.bundle.publishing import publish, staged
from blip2edge.errors import OutputError

MARK = "bundle.json"


def holding(path: Path, text: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / MARK).write_text(text)
    return path


@pytest.fixture(params=["one step", "two renames"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A name in an empty folder; both ways of replacing a directory."""
    if request.param == "two renames":
        monkeypatch.setattr(publishing, "_exchange", lambda first, second: False)
    elif not _exchanges(tmp_path):
        pytest.skip("this file system exchanges no names")
    return tmp_path / "out"


def _exchanges(folder: Path) -> bool:
    first, second = holding(folder / "a", "a"), holding(folder / "b", "b")
    done = publishing._exchange(first, second)
    assert (first / MARK).read_text() == ("b" if done else "a")
    for path in (first, second):
        publishing._remove(path)
    return done


@pytest.mark.parametrize("there", [False, True])
def test_the_new_directory_takes_the_name(there: bool, out: Path) -> None:
    if there:
        (holding(out, "old") / "optimized").mkdir()
    with staged(out, force=there) as staging:
        holding(staging, "new")
        assert out.exists() == there
    assert [path.name for path in out.iterdir()] == [MARK]
    assert (out / MARK).read_text() == "new"
    assert os.listdir(out.parent) == ["out"]


def test_a_link_is_replaced_and_what_it_names_stays(out: Path) -> None:
    kept = holding(out.parent / "kept", "old")
    out.symlink_to(kept)
    with staged(out, force=True) as staging:
        holding(staging, "new")
    assert (out / MARK).read_text() == "new"
    assert not out.is_symlink()
    assert (kept / MARK).read_text() == "old"
    assert sorted(os.listdir(out.parent)) == ["kept", "out"]


def write_while_another_does(out: Path, file: str, *, force: bool) -> None:
    with staged(out, force) as staging:
        holding(staging, "new")
        out.mkdir()
        (out / file).write_text("mine")


@pytest.mark.parametrize("file", ["precious.txt", MARK])
def test_what_another_program_makes_meanwhile_is_kept(file: str, out: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        write_while_another_does(out, file, force=False)
    assert (out / file).read_text() == "mine"
    assert os.listdir(out.parent) == ["out"]


def test_force_does_not_replace_other_files_that_appear_meanwhile(out: Path) -> None:
    with pytest.raises(OutputError, match=r"no bundle\.json"):
        write_while_another_does(out, "precious.txt", force=True)
    assert os.listdir(out) == ["precious.txt"]


def test_without_a_marker_any_directory_is_replaced(out: Path) -> None:
    out.mkdir()
    (out / "half.engine").write_text("left by a crash")
    with staged(out, force=True, marker=None) as staging:
        holding(staging, "new")
    assert os.listdir(out) == [MARK]


def test_publish_refuses_an_existing_name(out: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        publish(holding(out.parent / "fresh", "new"), holding(out, "old"), replace=False)
    assert (out / MARK).read_text() == "old"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()])
def test_the_old_directory_comes_back_when_a_rename_fails(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = holding(tmp_path / "out", "old")
    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(publishing, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises((OutputError, KeyboardInterrupt)), staged(out, force=True) as staging:
        holding(staging, "new")
    assert len(calls) == 3
    assert (out / MARK).read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


KILLED_BEFORE_A_RENAME = """
import os, signal, sys
from pathlib import Path
from blip2edge.bundle import publishing

out, fatal, in_one_step = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
rename, calls = Path.rename, []

def dies(self, target):
    calls.append(self)
    if len(calls) == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

Path.rename = dies
if not in_one_step:
    publishing._exchange = lambda first, second: False
with publishing.staged(out, force=True) as staging:
    (staging / "bundle.json").write_text("new")
"""


@pytest.mark.parametrize(("fatal", "in_one_step"), [(1, False), (2, False), (1, True)])
def test_a_kill_leaves_the_old_or_the_new_directory(fatal: int, in_one_step: bool, tmp_path: Path) -> None:
    """As by a power cut; after two renames cut short, the old directory stands beside its name."""
    out = holding(tmp_path / "out", "old")
    words = [sys.executable, "-c", KILLED_BEFORE_A_RENAME, str(out), str(fatal), str(in_one_step)]
    done = subprocess.run(words, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL or in_one_step
    beside = list(tmp_path.glob(f"out.replaced.*/out/{MARK}"))
    found = [out / MARK] if out.exists() else beside
    assert found
    assert found[0].read_text() == ("new" if done.returncode == 0 else "old")
