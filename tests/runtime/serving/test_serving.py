"""`blip2edge serve` as a process, with requests over a socket."""

from __future__ import annotations

import http.client
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")

from blip2edge.cli import main
from tests.drawing import draw_pictures


def test_a_server_answers_and_ends(tiny_bundle: Path) -> None:
    file = io.BytesIO()
    draw_pictures(1, 4)[0].save(file, "PNG")
    command = [sys.executable, "-m", "blip2edge", "serve", str(tiny_bundle), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), address
            connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
            connection.request("GET", "/health")
            assert json.loads(connection.getresponse().read())["status"] == "ok"
            connection.request("POST", "/caption?prompt=two", file.getvalue())
            answer = json.loads(connection.getresponse().read())
            assert (answer["prompt"], bool(answer["tokens"])) == ("two", True)
            connection.close()
            port = urlsplit(address).port
            taken = subprocess.run([*command[:-4], "--port", str(port)], capture_output=True, text=True, timeout=120)
            assert taken.returncode == 1
            assert "cannot listen on" in taken.stderr
        finally:
            process.send_signal(signal.SIGTERM)
        rest, told = process.communicate(timeout=60)
        assert (process.returncode, rest) == (0, ""), told
        assert "Traceback" not in told


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "prometheus_client", "python_multipart"])
def test_a_missing_package_is_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["serve", "bundle"]) == 1
    told = capsys.readouterr().err
    assert f"serving needs {missing}, which is not installed; install it: pip install 'blip2edge[serve]'" in told
