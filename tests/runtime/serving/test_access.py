"""Who may use the server: API key, host names, pages of other origins, TLS."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("starlette", reason="the server needs the extra serve")

from blip2edge.cli import main
from blip2edge.errors import UsageError
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.serving.access import LOOPBACK, Access, content_security_policy, host_name
from blip2edge.runtime.serving.http import PAGE, Server
from tests.http_calls import CHAT, ask, chat, got, png_file

Make = Callable[..., Server]


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


@pytest.fixture
def make(captioner: Captioner) -> Iterator[Make]:
    """Makes a server with rules of access."""
    made: list[Server] = []

    def make(**rules: Any) -> Server:
        made.append(Server(captioner, access=Access(**rules)))
        return made[-1]

    yield make
    for server in made:
        server.close()


def test_api_key(make: Make) -> None:
    server, png = make(api_key="s3cret"), png_file()
    for path in ("/", "/health"):
        got(ask(server, "GET", path))
    for method, path, body in (("POST", "/caption", png), ("POST", CHAT, chat(png)), ("GET", "/v1/models", b"")):
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            answer = got(ask(server, method, path, body, headers=given), 401)
            assert answer.json["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        got(ask(server, method, path, body, headers={"Authorization": "Bearer s3cret"}))
    got(ask(server, "GET", "/metrics"), 401)
    got(ask(server, "GET", "/nowhere"), 401)  # nothing is told without the key


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("evil.example:port", 421),
        ("LOCALHOST", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("board.local", 200),
    ],
)
def test_host_names(make: Make, host: str, status: int) -> None:
    server = make(hosts=(*LOOPBACK, "board.local"))
    got(ask(server, "GET", "/health", headers={"Host": host}), status)
    got(ask(make(), "GET", "/health", headers={"Host": host}))  # without the rule, any name


@pytest.mark.parametrize(
    "rules",
    [
        *({"origins": (origin,)} for origin in ("x", "example.org", "https://", "https://a.org/", "https://A.org")),
        *({"origins": (origin,)} for origin in ("https://*.org", "https://a.org:port", "https://user@a.org", "")),
        *({"hosts": (host,)} for host in ("a.org:80", "http://a.org", "a.org/b", "A.org", "")),
    ],
)
def test_rules_that_no_request_meets_are_refused(rules: dict[str, Any]) -> None:
    (value,) = next(iter(rules.values()))
    with pytest.raises(UsageError, match=f"expected (cors|allowed_host) .*got {re.escape(repr(value))}"):
        Access(**rules)
    for origin in ("*", "null", "https://example.org", "http://localhost:8000", "http://[::1]:80", "app://x.y-z"):
        Access(origins=(origin,))
    Access(hosts=("localhost", "::1", "127.0.0.1", "example.org"))


def test_a_wrong_origin_is_refused_before_a_bundle_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path / "absent"), "--port", "0", "--cors", "x"]) == 2
    assert "expected --cors to be an origin, SCHEME://HOST[:PORT] in small letters, or *, got 'x'" in (
        capsys.readouterr().err
    )


def test_host_name() -> None:
    assert [host_name(host) for host in ("a.b:80", "[::1]:80", "[fe80::1]", "A", "", "[")] == [
        "a.b", "::1", "fe80::1", "a", "", "["
    ]  # fmt: skip


def test_pages_of_other_origins_are_refused(make: Make) -> None:
    server, png = make(), png_file()
    own = {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}
    got(ask(server, "POST", "/caption", png, headers=own))
    for origin in ("https://evil.example", "http://127.0.0.1:9000", "null"):
        answer = got(ask(server, "POST", "/caption", png, headers={**own, "Origin": origin}), 403)
        assert answer.json["error"]["code"] == "origin_not_allowed"
    got(ask(server, "OPTIONS", CHAT, headers={"Origin": "https://evil.example"}), 403)


@pytest.mark.parametrize("origins", [("https://app.example",), ("*",)])
def test_cors(make: Make, origins: tuple[str, ...]) -> None:
    server, png = make(origins=origins, api_key="k"), png_file()
    preflight = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = got(ask(server, "OPTIONS", CHAT, headers=preflight))  # a browser sends no key with it
    assert answer.headers["access-control-allow-origin"] in ("https://app.example", "*")
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    sent = {"Origin": "https://app.example", "Authorization": "Bearer k"}
    answer = got(ask(server, "POST", "/caption", png, headers=sent))
    assert answer.headers["access-control-allow-origin"] in ("https://app.example", "*")
    got(ask(server, "POST", "/caption", png, headers={"Origin": "https://app.example"}), 401)
    if origins != ("*",):
        other = got(ask(server, "POST", "/caption", png, headers={**sent, "Origin": "https://evil.example"}), 403)
        assert "access-control-allow-origin" not in other.headers


def test_methods_of_a_path(make: Make) -> None:
    server = make()
    answer = got(ask(server, "OPTIONS", CHAT), 204)
    assert answer.headers["allow"] == "POST, OPTIONS"
    assert set(got(ask(server, "OPTIONS", "/health"), 204).headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    got(ask(server, "OPTIONS", "/nowhere"), 404)


def test_headers_for_browsers(make: Make) -> None:
    server = make()
    for path, status in (("/", 200), ("/health", 200), ("/nowhere", 404)):
        answer = got(ask(server, "GET", path), status)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_policy_allows_the_script_of_the_page_only() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<script>") == page.count("<script") == 1
    policy = content_security_policy(page)
    assert policy.count("'sha256-") == 1
    assert policy != content_security_policy(page.replace("const canvas", "const  canvas"))
    assert " onclick=" not in page  # attributes with code would not run
    assert "script-src 'none'" in content_security_policy("<p>no script</p>")


# The command


def serving(bundle: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "blip2edge", "serve", str(bundle), "--port", "0", "--threads", "1", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_and_a_key_of_the_environment(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key)]
    subprocess.run([*make, "-out", str(certificate), *subject], check=True, capture_output=True)
    with serving(
        tiny_bundle, "--tls-cert", str(certificate), "--tls-key", str(key), BLIP2EDGE_API_KEY="s3cret"
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=str(certificate))

        def post(**headers: str) -> tuple[int, bytes]:
            request = urllib.request.Request(f"{address}/caption", png_file(), headers, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=60, context=trust) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read()

        assert post(Authorization="Bearer s3cret")[0] == 200
        assert post()[0] == 401
        assert post(Authorization="Bearer s3cret", Host="evil.example")[0] == 421
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_tls_files_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    (tmp_path / "text").write_text("no certificate")
    for words, told, status in (
        (["--tls-cert", "x"], "expected --tls-cert and --tls-key, got one of them", 2),
        (["--tls-cert", str(tmp_path / "text"), "--tls-key", str(tmp_path / "text")], "in PEM format", 1),
        (["--tls-cert", "nowhere", "--tls-key", "nowhere"], "No such file", 1),
    ):
        assert main(["serve", "bundle", *words]) == status
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--api-key", "environment"])
def test_an_empty_api_key_is_refused(
    given: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script whose variable is not set must not open the server."""
    monkeypatch.delenv("BLIP2EDGE_API_KEY", raising=False)
    words = ["serve", str(tiny_bundle), "--port", "0"]
    if given == "environment":
        monkeypatch.setenv("BLIP2EDGE_API_KEY", " ")
    else:
        words += ["--api-key", ""]
    assert main(words) == 2
    assert "the API key (--api-key or BLIP2EDGE_API_KEY) is empty" in capsys.readouterr().err
