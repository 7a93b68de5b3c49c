"""A command that writes a directory refuses a wrong output at once: before it imports torch or reads a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip2edge.bundle.outputs.files import check_file
from blip2edge.bundle.outputs.locks import BusyError, locked
from blip2edge.bundle.outputs.publishing import check_output, check_target
from blip2edge.cli import main
from blip2edge.errors import OutputError, UsageError

# Replaces the packages of models by nothing, so that importing one of them is another error.
WITHOUT = (
    "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'tensorrt'])); "
    "from blip2edge.cli import main; sys.exit(main(sys.argv[1:]))"
)
COMMANDS = {
    "export": ["export", "checkpoint"],
    "calibrate": ["calibrate", "bundle", "--images", "pictures"],
    "calibrate without pictures": ["calibrate", "bundle", "--references", "captions"],
    "search": ["calibrate", "bundle", "--images", "pictures", "--search"],
    "build": ["build", "bundle"],
    "train": ["train", "stage2", "-c", "recipe.toml"],
    "capfilt": ["capfilt", "data", "--captioner", "bundle", "--matcher", "bundle"],
    "bulk": ["bulk", "pictures", "-b", "bundle"],
}


FILES = {
    "bench": (["bench", "bundle", "--html"], "page.html"),
    "build": (["build", "bundle", "--timing-cache"], "kernels"),
    "certify": (["certify", "bundle", "--output"], "certificate.json"),
    "embed": (["embed", "picture.png", "-b", "bundle", "--output"], "v.npy"),
    "eval": (["eval", "bundle", "--predictions"], "said.json"),
    "watch": (["watch", "pictures", "-b", "bundle", "--reuse-below", "auto", "--reuse-fit"], "fit.json"),
}
"""Commands that write one file, up to the flag that names it, and a usual name of the file."""


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_output_is_refused_first(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "notes").touch()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "file").touch()
    exists = ("exists", "exists exists; give another output directory")
    for output, message in (exists, ("file/a/b", "b cannot be written, because file is not a directory")):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, *words, "-o", output],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"exists", "pictures", "file"}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("name", ["file.parquet", "other", "."])
def test_force_is_offered_only_where_it_helps(
    name: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A user who follows the hint must not get another refusal."""
    monkeypatch.chdir(tmp_path)
    for folder in ("other", "pictures"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes").touch()
    (tmp_path / "file.parquet").write_bytes(b"mine")
    for force in ([], ["--force"]):
        assert main([*words, "-o", name, *force]) == 1
        error = capsys.readouterr().err
        assert "or replace it with --force" not in error
        assert "give another output" in error
    assert (tmp_path / "file.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize("words", [COMMANDS[name] for name in ("train", "capfilt")])
def test_a_bundle_is_replaced_only_by_a_bundle(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A calibrated bundle has a report.json too, the file by which capfilt knows its outputs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deployed").mkdir()
    for name in ("bundle.json", "report.json", "training.json", "_bulk.json"):
        (tmp_path / "deployed" / name).write_text("{}")
    assert main([*words, "-o", "deployed", "--force"]) == 1
    assert "this one is a bundle, so --force does not replace it" in capsys.readouterr().err
    assert len(list((tmp_path / "deployed").iterdir())) == 4
    with pytest.raises(OutputError, match="this one is a bundle"):
        check_target(tmp_path / "deployed", force=True, marker="_bulk.json")  # of bulk


def test_an_output_does_not_replace_what_it_is_made_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "bundle" / "source"
    source.mkdir(parents=True)
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    (tmp_path / "bundle" / "report.json").write_text("{}")
    for words in (["export", str(source)], ["calibrate", str(source), "--images", "x"], ["build", str(source)],
                  ["capfilt", str(source), "--captioner", "x", "--matcher", "x"],
                  ["train", "stage2", "-c", str(source)]):  # fmt: skip
        for force in ([], ["--force"]):
            assert main([*words, "-o", str(source.parent), *force]) == 1
            assert f"would replace {source}, which it is made from; give another" in capsys.readouterr().err
    assert source.is_dir()
    check_output(tmp_path / "org", True, None, "org/name", None)  # a name on the hub


@pytest.mark.parametrize(("words", "name"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_written_is_refused_first(words: list[str], name: str, tmp_path: Path) -> None:
    for directory in ("pictures", "exists"):
        (tmp_path / directory / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for output, message in (
        (f"absent/{name}", f"absent/{name} could not be written (No such file or directory); give another {words[-1]}"),
        (f"exists/{name}", f"exists/{name} could not be written (Is a directory); give another {words[-1]}"),
        (f"file/{name}", f"file/{name} cannot be written, because file is not a directory"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, *words, output],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_check_of_a_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.npy"
    check_file(path, "output", ".npy")
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    check_file(path, "output", ".npy")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
    check_file(Path(os.devnull), "output", ".npy")
    with pytest.raises(UsageError, match=r"suffix .html or .htm, got .*v.npy; give a name such as .*v.html"):
        check_file(path, "html", ".html", ".htm")
    with locked(path), pytest.raises(BusyError, match="another run writes"):
        check_file(path, "output")
    monkeypatch.setattr(os, "access", lambda place, mode: place == path)
    check_file(path, "output")  # it is written in place
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(OutputError, match=r"could not be written \(Permission denied\); give another output"):
        check_file(path, "output")


def test_a_search_that_a_kill_ended_after_it_published_may_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    words = ["calibrate", str(tmp_path / "none"), "--images", ".", "--search", "-o", str(tmp_path / "out")]
    assert main(words) == 1
    assert "out exists" in capsys.readouterr().err
    (tmp_path / "out.run").mkdir()
    assert main(words) == 1
    assert "none is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_a_part_of_the_path_that_is_not_a_directory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    part = Path("part")
    if kind == "file":
        part.touch()
    else:
        part.symlink_to("nowhere")
    with pytest.raises(OutputError, match="part/x/y cannot be written, because part is not a directory"):
        check_output(part / "x" / "y", force=True)
    assert check_output(Path("new/x"), force=False) == Path("new/x")
    assert check_output(Path(), force=True, marker=None) == tmp_path
