"""The names that options accept are those that the code implements, and every argument is described."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import pytest

from blip2edge import choices
from blip2edge.bundle.schema import BackendName
from blip2edge.calibration.activations.histogram import THRESHOLDS
from blip2edge.cli.parser import COMMANDS, build_parser
from blip2edge.runtime.backends.base import BACKENDS
from blip2edge.runtime.tensorrt.session import TARGETS


def commands() -> dict[str, argparse.ArgumentParser]:
    found = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    return dict(next(found))


def test_names_are_those_of_the_registries() -> None:
    assert {*choices.RANGE_METHODS} == {*THRESHOLDS, "smooth"}
    assert tuple(TARGETS) == choices.TENSORRT_EDITIONS
    assert tuple(row.copy for row in BACKENDS.values() if row.copy) == choices.COPIED_BACKENDS
    assert {*get_args(BackendName)} == {"auto", *BACKENDS}


def test_copies_are_made_for_the_named_backends() -> None:
    pipeline = pytest.importorskip("blip2edge.optimization.pipeline", reason="needs onnx-ir", exc_type=ImportError)
    assert tuple(pipeline.BACKENDS) == choices.COPIED_BACKENDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_has_a_help_text(command: str) -> None:
    parser = commands()[command]
    assert [action.dest for action in parser._actions if not action.help] == []


def test_help_ends_with_the_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    commands()["bench"].print_help()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("(default: 10)") for line in lines) == 1
    assert sum(line.endswith("(default: 1 2 4 8)") for line in lines) == 1
    assert not any("default: None" in line or "default: False" in line for line in lines)


MAY_BE_EMPTY = {"prompt", "text", "question", "api_key"}  # texts; serve checks an empty key itself


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_path_address_or_name_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As from a variable of a script that is not set."""
    before: list[str] = []
    for action in commands()[command]._actions:
        if action.nargs == 0:
            continue
        words = [action.option_strings[-1], ""] if action.option_strings else [*before, ""]
        if not action.option_strings:
            before.append(next(iter(action.choices or ["x"])))
        allowed = action.dest in MAY_BE_EMPTY
        with pytest.raises(SystemExit) as refused:
            build_parser().parse_args([command, *words])
        assert refused.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        told = "/".join(action.option_strings) or str(action.metavar)
        if allowed:  # another argument is missing, or nothing is
            assert f"argument {told}" not in error
        elif action.choices is None and action.type in (None, Path):
            assert f"argument {told}: expected {action.metavar}, got an empty text (a variable" in error
        else:
            assert "error: argument " in error


@pytest.mark.parametrize("flag", ["--port", "--host"])
def test_an_empty_host_does_not_listen_on_all_addresses(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "bundle", f"{flag}="])
    assert f"argument {flag}: expected" in capsys.readouterr().err


def test_one_argument_may_be_left_out_and_the_other_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve"])
    assert capsys.readouterr().err == (
        "error: the following arguments are required: BUNDLE (or -b BUNDLE); see blip2edge serve --help\n"
    )
    assert build_parser().parse_args(["serve", "bundle"]).models == []
