"""The containers and the service of ``docker/``: their instructions; `make images` builds them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from blip2edge.cli.parser import build_parser
from tests.project import extras

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("Dockerfile.*"))
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "VOLUME", "WORKDIR"}
UNIT = DOCKER / "blip2edge.service"

Instruction = tuple[str, str]


def instructions(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile, without comments and with their lines joined."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for line in joined.splitlines() if line.strip() for word, _, rest in [line.partition(" ")]]


def of(path: Path, word: str) -> list[str]:
    return [rest for name, rest in instructions(path) if name == word]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_instructions(path: Path) -> None:
    assert {name for name, _ in instructions(path)} <= KNOWN
    defaults = dict(rest.split("=", 1) for rest in of(path, "ARG"))
    images = [rest.split(" AS ")[0] for rest in of(path, "FROM")]
    for image in images:
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], image))
    for rest in of(path, "COPY"):
        *sources, _ = shlex.split(rest)
        if not sources[0].startswith("--from="):
            assert all((ROOT / source).exists() for source in sources), rest
    for rest in of(path, "RUN"):
        assert subprocess.run(["bash", "-n", "-c", rest], capture_output=True).returncode == 0, rest
        for names in re.findall(r"\[([\w,-]+)\]", rest):
            assert set(names.split(",")) <= extras().keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_the_default_command_is_one_of_ours(path: Path) -> None:
    (entry,), (words,) = of(path, "ENTRYPOINT"), of(path, "CMD")
    assert json.loads(entry) == ["blip2edge"]
    options = build_parser(json.loads(words)).parse_args(json.loads(words))
    assert (options.command, str(options.bundle), options.host) == ("serve", "/bundle", "0.0.0.0")
    assert of(path, "EXPOSE") == [str(options.port)]


def test_the_context_holds_what_the_wheel_is_made_of() -> None:
    """``.dockerignore`` leaves everything out but the sources, so each folder of the wheel must be named."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    toml = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (packed,) = re.findall(r"^only-include = \[(.*?)\]", toml, re.DOTALL | re.MULTILINE)
    assert {*re.findall(r'"([^"]+)"', packed), "LICENSE", "README.md", "hatch_build.py"} <= kept


def test_the_service_is_valid(tmp_path: Path) -> None:
    text = UNIT.read_text(encoding="utf-8")
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    program, *words = shlex.split(command)
    assert program == "/opt/blip2edge/bin/blip2edge"
    assert build_parser(words).parse_args(words).command == "serve"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    there = tmp_path / UNIT.name  # the program need not be installed here
    there.write_text(text.replace(program, shutil.which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", there], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
