"""Captions pictures through a real Triton Inference Server, and compares the answers with those of `Captioner`.

The server comes from the package nvidia-pytriton. Install this package with --no-deps in a virtual environment of its
own, with onnxruntime, pillow, tokenizers, and numpy below 2 (Triton's stub for Python requires it). Run this script
with the Python of that environment.

    python benchmarks/triton_server.py BUNDLE --pytriton VENV/lib/python3.11/site-packages/pytriton --write FILE
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blip2edge import Captioner
from blip2edge.cli import run_script
from blip2edge.runtime.serving.triton.repository import TritonModel, write_model

READY_S = 300


def backends(pytriton: Path, folder: Path) -> Path:
    """Makes a folder with Triton's Python backend and the stub for this Python, as pytriton does; returns its path."""
    shutil.copytree(pytriton / "tritonserver" / "backends", folder)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = pytriton / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, folder / "python")
    return folder


def add_path(model: Path) -> None:
    """Adds the packages of this Python to a model's ``sys.path``; Triton's stub does not read PYTHONPATH."""
    file = model / "1" / "model.py"
    paths = [path for path in sys.path if path]
    file.write_text(f"import sys\n\nsys.path[:0] = {paths}\n{file.read_text(encoding='utf-8')}", encoding="utf-8")


def free_port() -> int:
    """Returns a TCP port that is free now."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


class Client:
    """Sends requests to Triton's HTTP interface."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}/v2"

    def call(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """Sends a GET request, or a POST request with JSON; returns the status and the body."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self._address + path, data), timeout=300) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def infer(self, model: str, files: list[bytes], prompt: str, length: int) -> tuple[int, Any]:
        """Captions pictures in one request; returns the status and the answer."""
        rows = len(files)
        urls = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]
        inputs = [
            {"name": "image", "datatype": "BYTES", "shape": [rows, 1], "data": urls},
            {"name": "prompt", "datatype": "BYTES", "shape": [rows, 1], "data": [prompt] * rows},
            {"name": "max_new_tokens", "datatype": "INT32", "shape": [rows, 1], "data": [length] * rows},
        ]
        status, body = self.call(f"/models/{model}/infer", {"inputs": inputs})
        return status, json.loads(body)


def wait_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> float:
    """Waits until the server is ready; returns the seconds that this took."""
    start = time.monotonic()
    while time.monotonic() - start < READY_S:
        if process.poll() is not None:
            raise SystemExit(
                f"tritonserver ended with {process.returncode}:\n{log.read_text(errors='replace')[-4000:]}"
            )
        try:
            if client.call("/health/ready")[0] == 200:
                return time.monotonic() - start
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"tritonserver is not ready after {READY_S} s:\n{log.read_text(errors='replace')[-4000:]}")


def measured(client: Client, captioner: Captioner, pictures: list[bytes], count: int) -> dict[str, Any]:
    """Sends all kinds of requests; counts the answers that equal the captioner's captions."""
    files = [pictures[at % len(pictures)] for at in range(count)]
    wanted = [captioner.caption(file, prompt="a", max_new_tokens=12) for file in files]

    def one(at: int) -> bool:
        status, answer = client.infer("plain", [files[at]], "a", 12)
        outputs = {output["name"]: output["data"] for output in answer.get("outputs", [])}
        same = status == 200 and outputs["text"] == [wanted[at].text]
        return same and tuple(json.loads(outputs["json"][0])["tokens"]) == wanted[at].tokens

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        equal = sum(pool.map(one, range(count)))
    seconds = time.perf_counter() - start
    _, together = client.infer("plain", files[:3], "a", 12)
    rows = next(output["data"] for output in together["outputs"] if output["name"] == "text")
    broken = client.infer("plain", [b"no picture"], "a", 12)
    stats = json.loads(client.call("/models/plain/stats")[1])["model_stats"][0]
    url = f"data:image/png;base64,{base64.b64encode(files[0]).decode()}"
    inputs = {"image": url, "prompt": "a", "max_new_tokens": 12}
    events = [
        json.loads(line[6:])
        for line in client.call("/models/streamed/generate_stream", inputs)[1].decode().splitlines()
        if line.startswith("data: ")
    ]
    bare = json.loads(client.call("/models/plain/generate", {"image": url})[1])
    return {
        "requests": count,
        "equal": equal,
        "different texts": len({one.text for one in wanted}),
        "seconds": round(seconds, 3),
        "executions": stats["execution_count"],
        "rows of one request equal": rows == [one.text for one in wanted[:3]],
        "without optional inputs equal": bare["text"] == captioner.caption(files[0]).text,
        "broken picture": {"status": broken[0], "error": broken[1]["error"]},
        "stream": {
            "events": len(events),
            "joined equal": "".join(event["text"] for event in events) == wanted[0].text,
            "last tokens equal": tuple(json.loads(events[-1]["json"])["tokens"]) == wanted[0].tokens,
        },
    }


def main() -> None:
    """Starts the server, sends the requests, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pytriton", type=Path, required=True, help="folder of the installed package pytriton")
    parser.add_argument("--images", type=Path, default=Path("examples/pictures"), help="folder of PNG files")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    pictures = [file.read_bytes() for file in sorted(options.images.glob("*.png"))]
    with tempfile.TemporaryDirectory() as folder:
        repository, log = Path(folder, "models"), Path(folder, "log")
        add_path(write_model(options.bundle, repository, TritonModel("plain", threads=1, delay_us=20_000)))
        add_path(write_model(options.bundle, repository, TritonModel("streamed", threads=1, stream=True, link=True)))
        port = free_port()
        command = [
            str(options.pytriton / "tritonserver" / "bin" / "tritonserver"),
            *("--model-repository", str(repository), "--backend-directory", f"{folder}/backends"),
            *("--http-port", str(port), "--http-address", "127.0.0.1", "--allow-grpc", "false"),
            *("--allow-metrics", "false", "--exit-timeout-secs", "10"),
        ]
        backends(options.pytriton, Path(folder, "backends"))
        libraries = f"{options.pytriton.parent / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
        with log.open("wb") as out, Captioner.load(options.bundle, threads=1) as captioner:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
            try:
                client = Client(port)
                ready = wait_ready(client, process, log)
                found = measured(client, captioner, pictures, options.requests)
                server = json.loads(client.call("")[1])
            finally:
                process.terminate()
                process.wait(60)
        report = {"triton": server["version"], "ready_s": round(ready, 1), "exit": process.returncode, **found}
    text = json.dumps(report, indent=2)
    print(text)
    if options.write is not None:
        options.write.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
