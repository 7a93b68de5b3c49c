"""A command that writes a directory refuses a wrong output at once: before it imports torch or reads a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip2edge.bundle.outputs.publishing import check_output
from blip2edge.cli import main
from blip2edge.errors import OutputError

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
