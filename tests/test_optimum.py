"""``optimum-cli export blip2edge``, with the real optimum."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"


@pytest.fixture
def optimum_cli(monkeypatch: pytest.MonkeyPatch) -> object:
    """The module of optimum's command line, with the plugin on the path."""
    if find_spec("optimum") is None or find_spec("optimum.commands.optimum_cli") is None:
        pytest.skip("optimum is not installed: pip install --no-deps optimum")
    pytest.importorskip("transformers", reason="optimum imports transformers")
    for name in [name for name in sys.modules if name.partition(".")[0] == "optimum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(PLUGINS))
    return importlib.import_module("optimum.commands.optimum_cli")


def run(cli: object, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()  # type: ignore[attr-defined]
    return int(ended.value.code or 0)


def test_the_command_is_registered(
    optimum_cli: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(optimum_cli, monkeypatch, "export", "--help") == 0
    assert "blip2edge" in capsys.readouterr().out
    assert run(optimum_cli, monkeypatch, "export", "blip2edge", "--help") == 0
    told = capsys.readouterr().out
    assert all(flag in told for flag in ("CHECKPOINT", "--output", "--precision", "--verify", "--merge-tokens"))


def test_it_exports(
    optimum_cli: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = []

    def export(checkpoint: str, output: Path, **options: object) -> object:
        seen.append((checkpoint, output, options["precision"]))
        raise FileNotFoundError(2, "no such checkpoint", checkpoint)

    monkeypatch.setattr("blip2edge.export.pipeline.export_checkpoint", export)
    output = tmp_path / "bundle"
    assert run(optimum_cli, monkeypatch, "export", "blip2edge", "DIR", "-o", str(output), "--precision", "fp16") == 1
    assert seen == [("DIR", output, "fp16")]
    assert "error: " in capsys.readouterr().err
