"""A broken engine is loaded again; a request that fails on its own does not stop the server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("starlette", reason="the server needs the extra serve")

from blip2edge.errors import EngineFaultError
from blip2edge.runtime.captioning import restart
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import Encoder
from blip2edge.runtime.captioning.pipeline import TextGenerator
from blip2edge.runtime.captioning.restart import Backoff
from blip2edge.runtime.serving.http import Server
from tests.http_calls import CHAT, ask, chat, got, png_file

PNG = png_file()


class Faults:
    """Makes the engine of a captioner fail: in the encoder, or in the decoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
        self.place, self.loads, self.load_fails = "", 0, False
        self._bundle = bundle
        self.loadable, self.runnable = threading.Event(), threading.Event()  # loading and encoding wait for them
        self.loadable.set()
        self.runnable.set()
        vision, prefill = Encoder.run_vision, TextGenerator.prefill

        def run_vision(*arguments: Any) -> Any:
            assert self.runnable.wait(60)
            if self.place == "encoder":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return vision(*arguments)

        def run_prefill(*arguments: Any) -> Any:
            if self.place == "decoder":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return prefill(*arguments)

        monkeypatch.setattr(Encoder, "run_vision", run_vision)
        monkeypatch.setattr(TextGenerator, "prefill", run_prefill)

    def load(self) -> Captioner:
        """Loads the bundle; counts the calls."""
        assert self.loadable.wait(60)
        self.loads += 1
        if self.load_fails:
            raise OSError("the device is gone")
        return Captioner.load(self._bundle, threads=1)

    def server(self, attempts: int = 3, wait_s: float = 0.01) -> Server:
        """A server that restarts quickly."""
        return Server(self.load(), load=self.load, backoff=Backoff(wait_s, wait_s, attempts))


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> Faults:
    return Faults(monkeypatch, tiny_bundle)


def until(server: Server, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, (server.engine.state, server.engine.problem)
        time.sleep(0.005)


@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_a_broken_engine_is_loaded_again(place: str, faults: Faults) -> None:
    server = faults.server(attempts=100)
    try:
        before = got(ask(server, "POST", "/caption", PNG)).json["text"]
        faults.place = place
        for streamed in (False, True):
            answer = got(ask(server, "POST", CHAT, chat(PNG, stream=streamed)), 503)
            assert answer.json["error"]["code"] == "engine_restarting"
            assert answer.headers["retry-after"] == "1"
        until(server, lambda: server.engine.state == "restarting")
        health = got(ask(server, "GET", "/health"), 503)
        assert (health.json["status"], health.headers["retry-after"]) == ("restarting", "1")
        faults.place = ""
        until(server, lambda: server.engine.state == "ok")
        assert got(ask(server, "POST", "/caption", PNG)).json["text"] == before
        assert got(ask(server, "GET", "/health")).json["status"] == "ok"
        metrics = got(ask(server, "GET", "/metrics")).body.decode()
        assert "blip2edge_engine_restarts_total 1.0" in metrics
        assert "illegal memory access" in server.engine.problem
    finally:
        server.close()


def test_a_request_that_fails_alone_restarts_nothing(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = Encoder.prepare

    def poisoned(self: Encoder, images: Any, texts: Any, clock: Any, queries: Any = None) -> Any:
        if "poison" in texts:
            raise MemoryError
        return prepare(self, images, texts, clock)

    monkeypatch.setattr(Encoder, "prepare", poisoned)
    server = faults.server()
    try:
        for _ in range(5):
            with pytest.raises(MemoryError):
                ask(server, "POST", "/caption", PNG, "prompt=poison")
            got(ask(server, "POST", "/caption", PNG, "prompt=two"))
        assert (server.engine.state, server.engine.restarts, faults.loads) == ("ok", 0, 1)
    finally:
        server.close()


def test_a_server_whose_engine_stays_broken_gives_up(faults: Faults) -> None:
    server, gave_up = faults.server(attempts=3), threading.Event()
    server.engine.gave_up = gave_up.set
    try:
        faults.place, faults.load_fails = "encoder", True
        got(ask(server, "POST", "/caption", PNG), 503)
        assert gave_up.wait(30)
        assert (faults.loads, server.engine.restarts) == (1 + 3, 0)
        assert server.engine.problem == "OSError: the device is gone"
        assert got(ask(server, "GET", "/health"), 503).json["status"] == "failed"
        got(ask(server, "POST", "/caption", PNG), 503)
    finally:
        server.close()


@pytest.mark.parametrize("place", ["the loaded engine", "the broken engine"])
def test_an_engine_that_hangs_is_given_up(place: str, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    server, gave_up, entered, freed = faults.server(), threading.Event(), threading.Event(), threading.Event()
    server.engine.gave_up = gave_up.set
    monkeypatch.setattr(restart, "CHECK_S", 0.05)
    prefill = TextGenerator.prefill

    def hanging(*arguments: Any) -> Any:
        entered.set()
        assert freed.wait(60)
        return prefill(*arguments)

    try:
        monkeypatch.setattr(TextGenerator, "prefill", hanging)
        if place == "the loaded engine":
            faults.place = "encoder"
            faults.loadable.clear()
            got(ask(server, "POST", "/caption", PNG), 503)
            faults.place = ""
            faults.loadable.set()
        else:
            request = server.scheduler.submit(PNG, server.captioner.options())
            assert entered.wait(30)
            server.scheduler._end(EngineFaultError())
            with pytest.raises(EngineFaultError):
                request.result(30)
        assert gave_up.wait(30)
        assert server.engine.state == "failed"
        assert "within 0.05 s" in server.engine.problem
        assert faults.loads == (2 if place == "the loaded engine" else 1)
        got(ask(server, "POST", "/caption", PNG), 503)
    finally:
        freed.set()
        server.close()


def test_faults_in_a_row_count_across_restarts(faults: Faults) -> None:
    server = faults.server(attempts=2, wait_s=0.01)
    try:
        for restarts in (1, 2):
            faults.loadable.clear()
            faults.place = "encoder"
            got(ask(server, "POST", "/caption", PNG), 503)
            faults.place = ""
            faults.loadable.set()
            until(server, lambda: server.engine.restarts == restarts and server.engine.state == "ok")  # noqa: B023
        faults.place = "encoder"  # a third fault, and no caption since the first
        got(ask(server, "POST", "/caption", PNG), 503)
        until(server, lambda: server.engine.state == "failed")
    finally:
        server.close()


def test_waiting_requests_fail_with_the_engine(faults: Faults) -> None:
    server = faults.server(attempts=100)
    try:
        faults.place = "encoder"
        faults.loadable.clear()
        faults.runnable.clear()
        options = server.captioner.options()
        requests = [server.scheduler.submit(PNG, options) for _ in range(6)]
        faults.runnable.set()
        for request in requests:
            with pytest.raises(EngineFaultError):
                request.result(30)
        with pytest.raises(EngineFaultError):
            server.scheduler.submit(PNG, options)
    finally:
        faults.loadable.set()
        server.close()


def test_a_scheduler_fails_once(faults: Faults) -> None:
    reported: list[BaseException] = []
    captioner = faults.load()
    with captioner, captioner.scheduler(on_failure=reported.append) as scheduler:
        for _ in range(2):
            scheduler._end(EngineFaultError())
    assert len(reported) == 1


def test_back_off() -> None:
    assert [Backoff().seconds(attempt) for attempt in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


DEEP = 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"[" * DEEP + b"]" * DEEP,
        b'{"messages":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
        b'{"messages":[' + b"0," * 3_000_000 + b"0]}",
        b'{"messages":"' + b'\\"' * 1_000_000 + b'"}',
        ("[" * DEEP).encode("utf-16"),
        ("\u2222" + "[" * DEEP).encode("utf-16"),
        b"[" * 31 + b'"' + b"\\\\" * 1_000_000 + b'"' + b"[" * DEEP,
    ],
)
def test_deep_and_wide_json(body: bytes, faults: Faults) -> None:
    server = faults.server()
    try:
        for path, kind in ((CHAT, None), ("/caption", "application/json")):
            answer = got(ask(server, "POST", path, body, kind=kind), 400)
            assert answer.json["error"]["code"] == "invalid_json"
        query = "[" * 5000
        got(ask(server, "POST", "/caption", PNG, f"max_new_tokens={query}"), 400)
    finally:
        server.close()


def test_a_large_picture_in_json_is_no_deep_json(faults: Faults) -> None:
    url = "data:image/png;base64," + "A" * 3_000_000
    body = json.dumps({"image": url, "prompt": 'a "photo" of'}).encode()
    server = faults.server()
    try:
        error = got(ask(server, "POST", "/caption", body, kind="application/json"), 400).json["error"]
        assert error["code"] == "invalid_image"
    finally:
        server.close()
