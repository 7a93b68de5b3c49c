"""Builds wheels and sdists from all kinds of copies of the repository: all are complete and equal."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import blip2edge

ROOT = Path(__file__).resolve().parent.parent
COPIES = ("zip", "tar", "clone without symlinks")
TOP = f"blip2edge-{blip2edge.__version__}"
Build = Callable[[str, str], Path]


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def backend(kind: str, source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """What pip runs, without its isolated environment: the backend of pyproject.toml."""
    code = f"from hatchling import build; print(build.build_{kind}({str(target)!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)


def built(kind: str, source: Path, target: Path) -> Path:
    done = backend(kind, source, target)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files that git tracks, and that are still there."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in filter(None, done.stdout.split("\0")) if os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def links(tracked: list[str]) -> list[str]:
    """Names of the folders that are linked into the package."""
    return [Path(name).name for name in tracked if (ROOT / name).is_symlink()]


@pytest.fixture(scope="module")
def copies(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The working tree as users get it: two archives unpacked, and a clone as on Windows."""
    base = tmp_path_factory.mktemp("copies")
    repository, copies = base / "repository", {name: base / name for name in COPIES}
    for name in tracked:
        copy = repository / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            copy.symlink_to(os.readlink(ROOT / name))
        else:
            copy.write_bytes((ROOT / name).read_bytes())
    git = ("git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false")
    run(*git, "init", "-q", cwd=repository)
    run(*git, "add", "--force", "--all", cwd=repository)
    run(*git, "commit", "-q", "--no-verify", "-m", "copy", cwd=repository)
    for kind in ("zip", "tar"):
        run("git", "archive", f"--format={kind}", "-o", base / f"a.{kind}", "HEAD", cwd=repository)
    with zipfile.ZipFile(base / "a.zip") as archive:  # which knows no symlinks
        archive.extractall(copies["zip"])
    with tarfile.open(base / "a.tar") as packed:
        packed.extractall(copies["tar"], filter="data")
    run("git", "clone", "-q", "-c", "core.symlinks=false", repository, copies[COPIES[2]], cwd=base)
    return copies


@pytest.fixture(scope="module")
def build(copies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A kind of archive and of copy to what the backend makes of them."""
    return cache(lambda kind, copy: built(kind, copies[copy], tmp_path_factory.mktemp("built")))


@pytest.fixture(scope="module")
def expected(tracked: list[str], links: list[str]) -> dict[str, bytes]:
    """What must be installed: names in the wheel and contents."""
    packed = [name for name in tracked if name.startswith(tuple(f"{link}/" for link in links))]
    examples = ("examples/checkpoint/", "examples/pictures/")
    packed = [name for name in packed if not name.startswith("examples/") or name.startswith(examples)]
    package = [name for name in tracked if name.startswith("blip2edge/") and not (ROOT / name).is_symlink()]
    plugins = {name.removeprefix("plugins/"): name for name in tracked if name.startswith("plugins/")}
    files = {f"blip2edge/{name}": name for name in packed} | {name: name for name in package} | plugins
    return {name: (ROOT / source).read_bytes() for name, source in files.items()}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert len(archive.namelist()) == len(set(archive.namelist()))
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_copies_differ_in_their_links(copies: dict[str, Path], links: list[str]) -> None:
    assert len(links) >= 8
    for link in links:
        assert (copies["tar"] / "blip2edge" / link).is_symlink()
        assert (copies["zip"] / "blip2edge" / link).is_file()
        assert (copies[COPIES[2]] / "blip2edge" / link).is_file()


@pytest.mark.parametrize("copy", COPIES)
def test_a_wheel_holds_what_git_tracks_and_nothing_else(copy: str, build: Build, expected: dict[str, bytes]) -> None:
    assert {"blip2edge/py.typed", "blip2edge/runtime/serving/page.html"} < expected.keys()
    assert {"blip2edge/examples/checkpoint/model.safetensors"} < expected.keys()
    found = contents(build("wheel", copy))
    assert {name: found[name] for name in found if not name.startswith(f"{TOP}.dist-info/")} == expected


@pytest.mark.parametrize("copy", COPIES)
def test_the_wheel_of_an_sdist_is_the_same(copy: str, build: Build, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", copy)) as archive:
        assert not [member.name for member in archive if member.issym()]
        archive.extractall(tmp_path, filter="data")
    assert contents(built("wheel", tmp_path / TOP, tmp_path)) == contents(build("wheel", copy))


def test_a_wheel_runs_where_it_is_unpacked(build: Build, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", "zip")) as archive:
        archive.extractall(tmp_path)
    code = (
        "import blip2edge.runtime.captioning.captioner as module; print(module.__file__)\n"
        "from blip2edge.__main__ import run; import sys; sys.argv[1:] = ['--help']; run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    place, usage = done.stdout.split("\n", 1)
    assert place == str(tmp_path / "blip2edge" / "runtime" / "captioning" / "captioner.py")
    assert usage.startswith("usage: blip2edge")


def test_an_editable_install_follows_the_links(copies: dict[str, Path], tmp_path: Path) -> None:
    files = contents(built("editable", copies["tar"], tmp_path))
    (pointer,) = (name for name in files if not name.startswith(f"{TOP}.dist-info/"))
    assert pointer.endswith(".pth")
    assert files[pointer].decode().split() == [str(copies["tar"]), str(copies["tar"] / "plugins")]


@pytest.mark.parametrize("copy", ["zip", COPIES[2]])
def test_an_editable_install_without_links_names_the_remedy(copy: str, copies: dict[str, Path], tmp_path: Path) -> None:
    done = backend("editable", copies[copy], tmp_path)
    assert done.returncode == 1
    assert "git config core.symlinks true" in done.stderr
    assert "blip2edge/ (bulk, calibration, engine, " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
