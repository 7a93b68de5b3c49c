"""Credentials of flags from the environment or a file: filled in, never printed."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest

from blip2edge import errors
from blip2edge.cli import main
from blip2edge.cli.credentials import filled_address, filled_text
from blip2edge.errors import DataError, UsageError, hide, one_line, shown_address

SECRET = "p@ss:w/rd {x}"


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_HIDDEN", set())
    monkeypatch.setenv("CAMERA", SECRET)


def test_an_address_and_a_text_are_filled_in(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{SECRET}\n")
    address = filled_address("rtsp://me:{env:CAMERA}@cam/1")
    assert unquote(address) == f"rtsp://me:{SECRET}@cam/1"
    assert address.count("@") == address.count(" ") + 1 == 1
    assert filled_address("{env:CAMERA}") == SECRET  # a whole address
    assert filled_text(f"Bearer {{file:{file}}}") == f"Bearer {SECRET}"
    assert filled_address("rtsp://cam/{1}") == "rtsp://cam/{1}"


def test_a_missing_credential(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for place, problem in (
        ("{env:NOWHERE}", "the environment variable NOWHERE is not set or empty"),
        (f"{{file:{tmp_path}/empty}}", "empty is empty"),
        (f"{{file:{tmp_path}/none}}", r"cannot be read \(No such file or directory\)"),
    ):
        with pytest.raises(UsageError, match=problem):
            filled_text(place)


def test_a_credential_is_in_no_message() -> None:
    address = filled_address("http://cam/hook/{env:CAMERA}")
    for shown in (shown_address(address), one_line(ValueError(address)), str(DataError(address, SECRET))):
        assert "***" in shown
        assert "rd" not in shown
    secret = "two  spaces\nand a line"
    hide(secret)
    written = str(DataError(f"got {secret!r}"))
    for shown in (str(DataError(f"a {secret} b", secret)), one_line(ValueError(secret)), written):
        assert "***" in shown
        assert "spaces" not in shown
    hide("abc")  # too short: it would be hidden within words
    assert shown_address("abcdef") == "abcdef"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["rtsp://me:{env:CAMERA}@127.0.0.1:1/"], 1),
        (["{env:CAMERA}"], 1),
        ([".", "--post", "ftp://host/{env:CAMERA}"], 2),
        ([".", "--post", "{env:CAMERA}"], 2),
        ([".", "--mqtt", "mqtt://me:{env:CAMERA}@127.0.0.1:1"], 2),
        (["rtspsrc user-pw={env:CAMERA} ! decodebin"], 2),
        (["{env:PIPE}"], 2),
    ],
)
def test_the_command_prints_no_credential(
    words: list[str],
    status: int,
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("av", reason="streams are read with PyAV")
    monkeypatch.setenv("PIPE", f"rtspsrc user-pw={SECRET} ! decodebin")
    assert main(["watch", *words, "-b", str(tiny_bundle), "--threads", "1", "--once"]) == status
    printed = "".join(capsys.readouterr())
    assert "error: " in printed
    assert not any(part in printed for part in ("p@ss", "w/rd", "%40ss", "w%2Frd"))
