"""The names that options accept are those that the code implements, and every argument is described."""

from __future__ import annotations

import argparse
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
