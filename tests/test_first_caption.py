"""The commands at the beginning of README.md, against a local hub with a tiny model under the published name."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the checkpoint is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from huggingface_hub import constants

from blip2edge import Bundle, CheckpointError
from blip2edge.cli import main
from blip2edge.model.checkpoint.stored.files import find_checkpoint
from tests.drawing import draw_pictures
from tests.families import drawing_blip
from tests.hub_server import HubServer, plug_in

ROOT = Path(__file__).resolve().parent.parent
NAME = "Salesforce/blip-image-captioning-base"


def first_commands() -> list[list[str]]:
    """The first block of commands of README.md that begins with the program's name."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    block = next(block for block in blocks if block.startswith("blip2edge "))
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("blip") / "checkpoint"
    drawing_blip.save_blip(directory, "caption", 0)
    return directory


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    repository = server.add(NAME, checkpoint)
    repository.commit(
        {**repository.files(), "pytorch_model.bin": b"not needed", "README.md": b"---\nlicense: mit\n---\n"}
    )
    with server.running():
        plug_in(monkeypatch, server, tmp_path / "hub")
        yield server


def test_first_commands(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(draw_pictures(3, 4)):
        picture.save(f"pictures/{number}.png")
    draw_pictures(1, 5)[0].save("dog.jpg")
    commands = first_commands()
    assert [words[1] for words in commands] == ["export", "caption", "calibrate", "caption"]
    assert NAME in commands[0]
    measured = json.loads((ROOT / "benchmarks" / "results" / "first_caption.json").read_text(encoding="utf-8"))
    assert commands[2][commands[2].index("--count") + 1] == str(measured["pictures"])  # the table has its seconds
    for words in commands:
        assert main([*words[1:], *(["--no-optimize"] if words[1] != "caption" else [])]) == 0, words
    assert not [line for line in hub.requests if "pytorch_model.bin" in line]
    manifest = Bundle.open("blip-int8").manifest
    assert manifest.calibration
    # The card of a bundle names the checkpoint, which was found by its name.
    assert main(["push", "blip-int8", "org/blip", "--card"]) == 0
    printed = capsys.readouterr()  # type: ignore[attr-defined]
    assert f"downloading {NAME}, MB: " in printed.err
    card = printed.out.split("# blip\n")[0]
    assert f'base_model: "{NAME}"' in card
    assert 'pipeline_tag: "image-to-text"' in card
    assert "int8" in card


def test_export_by_name_in_a_process_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    """HF_ENDPOINT, as a user sets it."""
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    code = f"from blip2edge.model.checkpoint.stored.files import find_checkpoint as f; print(f({NAME!r}))"
    environment = {**os.environ, **variables, "TRANSFORMERS_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "config.json").is_file()
    assert NAME.replace("/", "--") in done.stdout


def test_errors_of_an_export_by_name(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (
        ("nobody/nothing", "there is no repository nobody/nothing on the hub, or it is private; check the name"),
        (f"{NAME}@v7", f"{NAME} has no revision v7; give a branch, a tag or a commit"),
    ):
        with pytest.raises(CheckpointError, match=f"{name} is no local directory .* from the hub: {words}"):
            find_checkpoint(name)
    hub.repositories[NAME].gated = True
    with pytest.raises(CheckpointError, match=r"is gated, and this account has no access; ask for access on its page"):
        find_checkpoint(NAME)
    hub.repositories[NAME].gated = False
    assert find_checkpoint(f"hub:{NAME}@main") == find_checkpoint(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint(NAME).is_dir()
    with pytest.raises(CheckpointError, match=r"nobody/nothing is not in the hub's cache, and HF_HUB_OFFLINE is set"):
        find_checkpoint("nobody/nothing")
