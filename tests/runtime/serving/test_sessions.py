"""Sessions of clients over TLS with an API key: curl and Chromium, against ``serve --self-signed``."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")
pytest.importorskip("cryptography", reason="the certificate needs the extra tls")

from blip2edge.cli import main
from blip2edge.cli.certificate import machine_names, self_signed
from tests.browser import Page
from tests.http_calls import CHAT, chat, png_file

KEY = "s3cret"


class Service(NamedTuple):
    """A running command: its address, its certificate, its log of requests."""

    address: str
    certificate: Path
    log: Path


@pytest.fixture(scope="module")
def service(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    log = folder / "requests.jsonl"
    command = [sys.executable, "-m", "blip2edge", "serve", str(tiny_bundle), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        [*command, "--self-signed", "--api-key", KEY, "--access-log", str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(folder)},
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("XDG_CACHE_HOME", str(folder))
            made = self_signed()
        assert address.startswith("https://127.0.0.1:")
        yield Service(address, made.certificate, log)
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0
    assert told.count("\n") == 1
    assert f"SHA-256 {made.fingerprint}" in told


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_session_of_curl(service: Service, tmp_path: Path) -> None:
    picture, body = tmp_path / "dog.png", tmp_path / "chat.json"
    picture.write_bytes(png_file())
    body.write_bytes(chat(png_file(), "secret words", stream=True, max_tokens=4))

    def curl(path: str, *words: str, key: str = KEY) -> tuple[int, str]:
        called = ["curl", "-sS", "--cacert", str(service.certificate), "-H", f"Authorization: Bearer {key}"]
        answer = subprocess.run(
            [*called, "-w", "\n%{http_code}", *words, service.address + path],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        text, _, status = answer.stdout.rpartition("\n")
        return int(status), text

    status, text = curl("/caption?prompt=two", "--data-binary", f"@{picture}", "-H", "X-Request-ID: mine.1")
    assert (status, json.loads(text)["prompt"]) == (200, "two")
    assert curl("/ask", "-F", f"file=@{picture}", "-F", "question=what?")[0] == 200
    status, text = curl(CHAT, "-H", "Content-Type: application/json", "--data-binary", f"@{body}")
    assert (status, text.endswith("data: [DONE]\n\n")) == (200, True)
    assert curl("/caption", "--data-binary", f"@{picture}", key="wrong")[0] == 401
    assert curl("/health", key="wrong")[0] == 200
    assert "blip2edge_request_seconds_bucket" in curl("/metrics")[1]
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(100 << 20)
    assert curl("/caption", "--data-binary", f"@{large}")[0] == 413

    log = service.log.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    first = next(line for line in lines if line["id"] == "mine.1")
    assert list(first) == ["time", "client", "method", "path", "status", "bytes", "ms", "id"]
    assert (first["method"], first["path"], first["status"]) == ("POST", "/caption", 200)
    assert {line["status"] for line in lines} >= {200, 401, 413}
    assert all(secret not in log for secret in (KEY, "secret words", "two", "iVBOR"))


def test_a_session_of_chromium(service: Service, page: Page, tmp_path: Path) -> None:
    picture = tmp_path / "dog.png"
    picture.write_bytes(png_file())
    page.open(service.address, "!document.getElementById('login').hidden")
    page.value("$('key').value = 'wrong'; document.querySelector('#login button').click()")
    page.until("!$('login').hidden && $('refused').textContent")
    page.value(f"$('key').value = '{KEY}'; document.querySelector('#login button').click()")
    assert page.until("$('model').textContent").startswith("· ")
    assert page.value("$('login').hidden")

    page.choose("#file", [picture])
    assert "ms" in page.until("$('times').textContent")
    assert page.value("$('caption').textContent")
    assert page.value("isSecureContext && !$('camera').disabled")

    page.open(f"{service.address}/?again#key={KEY}", "document.getElementById('model').textContent")
    assert page.value("location.hash") == ""
    page.open(f"{service.address}/metrics", "document.body.innerText.includes('invalid_api_key')")


def test_a_certificate_is_kept_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = self_signed("0.0.0.0")
    assert self_signed().fingerprint == first.fingerprint
    assert set(first.names) >= {"localhost", "127.0.0.1", "::1", *machine_names()}
    assert stat.S_IMODE(first.key.stat().st_mode) == 0o600
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(first.certificate, first.key)
    other = self_signed("board.example")
    assert other.fingerprint != first.fingerprint
    assert "board.example" in other.names
    other.key.write_text("broken")
    assert self_signed("board.example").fingerprint != other.fingerprint
    assert sorted(path.name for path in first.key.parent.iterdir()) == ["certificate.pem", "key.pem"]


def test_a_missing_package_for_certificates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert main(["serve", "bundle", "--self-signed"]) == 1
    assert "needs cryptography, which is not installed; install it: pip install 'blip2edge[tls]'" in (
        capsys.readouterr().err
    )


def test_two_certificates_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "bundle", "--self-signed", "--tls-cert", "a", "--tls-key", "b"]) == 2
    assert "--self-signed and --tls-cert cannot be combined" in capsys.readouterr().err


def test_a_log_that_cannot_be_written(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tiny_bundle), "--port", "0", "--access-log", "/nowhere/log"]) == 1
    assert "the request log cannot be written (No such file or directory)" in capsys.readouterr().err
