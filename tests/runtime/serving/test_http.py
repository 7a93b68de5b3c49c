"""The HTTP interface, called in the way of an ASGI server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.errors import OverloadError
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.serving import http as server_module
from blip2edge.runtime.serving.http import Server
from tests.drawing import draw_pictures

USER = b'{"messages": [{"role": "user", "content": [%s]}]}'


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


@pytest.fixture
def server(captioner: Captioner) -> Iterator[Server]:
    made = Server(captioner, max_batch=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def png() -> bytes:
    file = io.BytesIO()
    draw_pictures(1, 4)[0].save(file, "PNG")
    return file.getvalue()


class Answer:
    """What came back."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.status: int = messages[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in messages[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"]["message"])

    @property
    def events(self) -> list[Any]:
        lines = self.body.decode().split("\n\n")[:-1]
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def ask(
    server: Server, method: str, path: str, body: bytes = b"", query: str = "", leave: bool = False
) -> Answer | None:
    """One request in pieces of 1,000 bytes; with `leave` the client goes as soon as it has sent it."""
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)] or [b""]
    incoming = [
        {"type": "http.request", "body": piece, "more_body": at + 1 < len(pieces)} for at, piece in enumerate(pieces)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop(0)
        if not leave:
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode()}
    asyncio.run(asyncio.wait_for(server(scope, receive, send), 60))
    return Answer(sent) if sent else None


def got(answer: Answer | None, status: int = 200) -> Answer:
    assert answer is not None
    assert answer.status == status, answer.body
    return answer


def chat(png: bytes, text: str | None = None, **more: Any) -> bytes:
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
    if text is not None:
        content.append({"type": "text", "text": text})
    return json.dumps({"messages": [{"role": "user", "content": content}], **more}).encode()


def test_a_picture_as_the_body(server: Server, captioner: Captioner, png: bytes) -> None:
    alone = captioner.caption(PIL.Image.open(io.BytesIO(png)), prompt="a photo of")
    answer = got(ask(server, "POST", "/caption", png, "prompt=a+photo%20of"))
    assert answer.json["tokens"] == list(alone.tokens)
    assert answer.json["text"] == alone.text
    assert answer.headers["content-type"] == "application/json"


def test_the_chat_format(server: Server, captioner: Captioner, png: bytes) -> None:
    alone = captioner.caption(PIL.Image.open(io.BytesIO(png)), prompt="two", max_new_tokens=6)
    answer = got(ask(server, "POST", "/v1/chat/completions", chat(png, "two", max_tokens=6))).json
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": alone.text}
    assert answer["choices"][0]["finish_reason"] == {"eos": "stop", "length": "length"}[alone.finish_reason]
    assert answer["usage"]["completion_tokens"] == len(alone.tokens)


def test_words_as_they_come(server: Server, captioner: Captioner, png: bytes) -> None:
    alone = captioner.caption(PIL.Image.open(io.BytesIO(png)), max_new_tokens=8, min_new_tokens=8)
    body = chat(png, stream=True, max_tokens=8, min_new_tokens=8)
    answer = got(ask(server, "POST", "/v1/chat/completions", body))
    assert answer.headers["content-type"] == "text/event-stream"
    *chunks, last, done = answer.events
    assert done == "[DONE]"
    assert last["choices"][0]["finish_reason"] == "length"
    pieces = [one["choices"][0]["delta"]["content"] for one in chunks]
    assert "".join(pieces).strip() == alone.text
    assert len(pieces) > 2


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"stop": "a"}, {"temperature": 0.9, "seed": 3}])
def test_further_options(more: dict[str, Any], server: Server, captioner: Captioner, png: bytes) -> None:
    fields = {**more, "stop": (more["stop"],)} if "stop" in more else more
    alone = captioner.caption(PIL.Image.open(io.BytesIO(png)), **fields)
    for streamed in (False, True):
        server = Server(captioner)  # whose first request has the random stream of a lone picture
        answer = got(ask(server, "POST", "/v1/chat/completions", chat(png, stream=streamed, **more)))
        server.close()
        if streamed:
            texts = [one["choices"][0]["delta"].get("content", "") for one in answer.events[:-1]]
            assert "".join(texts).strip() == alone.text
        else:
            assert answer.json["choices"][0]["message"]["content"] == alone.text


def test_page_health_models_metrics(server: Server, png: bytes) -> None:
    page = got(ask(server, "GET", "/"))
    assert page.headers["content-type"].startswith("text/html")
    assert b"getUserMedia" in page.body
    assert got(ask(server, "GET", "/health")).json["status"] == "ok"
    assert got(ask(server, "GET", "/v1/models")).json["data"][0]["id"] == server.model
    got(ask(server, "POST", "/caption", png))
    got(ask(server, "POST", "/caption", b"no picture"), 400)
    lines = got(ask(server, "GET", "/metrics")).body.decode().splitlines()
    assert 'blip2edge_requests_total{outcome="done"} 1' in lines
    assert 'blip2edge_requests_total{outcome="refused"} 1' in lines
    (tokens,) = [line for line in lines if line.startswith("blip2edge_tokens_total")]
    assert int(tokens.split()[1]) > 0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "cannot be parsed"),
        (b"3", "JSON object"),
        (b"{}", "messages"),
        (b'{"messages": [{"role": "system", "content": "x"}]}', "role user"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "a picture"),
        (USER % b'{"type": "audio"}', "type text or image_url"),
        (USER % b'{"type": "text"}', "type text or image_url"),
        (USER % b'{"type": "image_url", "image_url": "http://a/b.png"}', "fetches nothing"),
        (USER % b'{"type": "image_url", "image_url": "data:image/png;base64,!!"}', "base64"),
    ],
)
def test_what_is_no_request(body: bytes, told: str, server: Server) -> None:
    assert told in got(ask(server, "POST", "/v1/chat/completions", body), 400).error


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"max_tokens": 0}, "expected max_tokens to be"),
        ({"n": 2}, "n to be 1"),
        ({"num_beams": 200}, "num_beams of at most 8"),
        ({"tools": []}, "no key 'tools'"),
        ({"stream": "yes"}, "stream"),
        ({"deadline_s": "soon"}, "deadline_s"),
        ({"deadline_s": 0}, "deadline"),
        ({"stop": 3}, "stop"),
        ({"temperature": 10**400}, "temperature to be a number from 0 to 1000"),
        ({"repetition_penalty": 1e308}, "repetition_penalty to be a number from 0.001 to 1000"),
        ({"repetition_penalty": 10**4000}, "bits"),
        ({"top_p": math.nan}, "NaN is not a JSON number"),
        ({"temperature": math.inf}, "Infinity is not a JSON number"),
        ({"max_tokens": 10**400}, "max_tokens of at most"),
        ({"num_beams": 10**400}, "num_beams of at most 8"),
        ({"seed": 10**400}, "seed of at most"),
        ({"top_k": 10**400}, "top_k of at most"),
        ({"deadline_s": 10**400}, "deadline_s to be a number above 0"),
        ({"n": 10**400}, "n to be 1"),
    ],
)
def test_options_outside_their_range(more: dict[str, Any], told: str, server: Server, png: bytes) -> None:
    error = got(ask(server, "POST", "/v1/chat/completions", chat(png, **more)), 400).error
    assert told in error
    assert "\n" not in error


def test_other_statuses(server: Server, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    got(ask(server, "GET", "/nothing"), 404)
    got(ask(server, "DELETE", "/caption"), 405)
    got(ask(server, "POST", "/caption", png, "promt=a"), 400)
    for streamed in (False, True):
        body = chat(png, stream=streamed, deadline_s=1e-6)
        assert "deadline" in got(ask(server, "POST", "/v1/chat/completions", body), 504).error
    with monkeypatch.context() as small:
        small.setattr(server_module, "MAX_BODY_BYTES", 100)
        got(ask(server, "POST", "/caption", png), 413)

    def full(*_: Any, **__: Any) -> Any:
        raise OverloadError("the queue is full: 64 pictures are waiting", "try again later")

    monkeypatch.setattr(server.scheduler, "submit", full)
    assert got(ask(server, "POST", "/caption", png), 503).headers["retry-after"] == "1"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_cancels_its_request(
    streamed: bool, captioner: Captioner, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(captioner)
    hold = threading.Event()
    encode = server.scheduler._encoder

    def held(*arguments: Any) -> Any:
        hold.wait(60)
        return encode(*arguments)

    monkeypatch.setattr(server.scheduler, "_encoder", held)
    assert ask(server, "POST", "/v1/chat/completions", chat(png, stream=streamed), leave=True) is None
    hold.set()
    monkeypatch.undo()
    assert server.counts == {"done": 0, "failed": 0, "refused": 0, "cancelled": 1}
    got(ask(server, "POST", "/caption", png))
    assert server.scheduler.load["running"] == 0
    server.close()


def test_a_deadline_is_told_when_it_comes_and_not_when_its_turn_comes(
    server: Server, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = threading.Event()
    encode = server.scheduler._encoder

    def held(*arguments: Any) -> Any:
        hold.wait(60)
        return encode(*arguments)

    monkeypatch.setattr(server.scheduler, "_encoder", held)
    try:
        body = chat(png, deadline_s=0.05)
        assert "deadline" in got(ask(server, "POST", "/v1/chat/completions", body), 504).error
    finally:
        hold.set()


def test_a_prompt_of_half_characters_harms_nobody(server: Server, png: bytes) -> None:
    body = chat(png, "half \ud800")
    assert "surrogate" in got(ask(server, "POST", "/v1/chat/completions", body), 400).error
    got(ask(server, "POST", "/caption", png))


def test_health_tells_of_a_scheduler_that_failed(server: Server, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(server.scheduler, "_encoder", mistake)
    with pytest.raises(ZeroDivisionError):
        ask(server, "POST", "/caption", png)
    assert got(ask(server, "GET", "/health"), 503).json["status"] == "failed"


def test_the_life_of_a_server(captioner: Captioner) -> None:
    server = Server(captioner)
    incoming = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def receive() -> dict[str, Any]:
        return incoming.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    asyncio.run(server({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    with pytest.raises(RuntimeError, match="closed"):
        server.scheduler.submit(draw_pictures(1)[0], captioner.options())
