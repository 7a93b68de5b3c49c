"""A process that captions writes nothing below HOME, and opens no connection."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from tests.drawing import draw_pictures

GUARDED = """
import socket, sys, time

def refused(*arguments, **_):
    sys.stderr.write(f"network: {arguments}\\n")
    raise OSError("the test allows no network")

socket.getaddrinfo = socket.gethostbyname = socket.socket.connect = socket.create_connection = refused
from blip2edge.cli import main
status = main(sys.argv[1:])
time.sleep(2)  # packages that send events do so from a thread of their own
sys.exit(status)
"""


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("backend", ["cpu", "openvino"])
def test_captioning_process_is_quiet(backend: str, tiny_bundle: Path, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="pip install 'blip2edge[openvino]'")
    home = tmp_path / "home"
    home.mkdir()
    draw_pictures(1)[0].save(tmp_path / "picture.png")
    words = ["caption", str(tmp_path / "picture.png"), "-b", str(tiny_bundle), "--threads", "1", "--backend", backend]
    names = {"CI", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY"}  # they switch telemetry off
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    assert files_below(home) == []


@pytest.mark.skipif(not Path("/usr/bin/strace").exists(), reason="strace is not installed")
@pytest.mark.parametrize("backend", ["cpu", "openvino"])
def test_captioning_process_opens_no_internet_socket(backend: str, tiny_bundle: Path, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="pip install 'blip2edge[openvino]'")
    draw_pictures(1)[0].save(tmp_path / "picture.png")
    trace = tmp_path / "trace"
    words = ["caption", str(tmp_path / "picture.png"), "-b", str(tiny_bundle), "--threads", "1", "--backend", backend]
    command = [
        "/usr/bin/strace",
        "-f",
        "-qq",
        "-e",
        "trace=socket",
        "-o",
        str(trace),
        sys.executable,
        "-m",
        "blip2edge",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment, check=False)
    if "ptrace" in done.stderr:
        pytest.skip("processes cannot be traced here")
    assert done.returncode == 0, done.stderr
    assert not [line for line in trace.read_text().splitlines() if "AF_INET" in line]


def test_variable_of_the_user_is_kept() -> None:
    code = "import blip2edge, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, expected in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment | given, check=True
        )
        assert done.stdout.strip() == expected
