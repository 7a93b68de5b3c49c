"""The HTTP interface, called in the way of an ASGI server."""

from __future__ import annotations

import asyncio
import io
import math
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.errors import BackendError, OverloadError
from blip2edge.limits import Limits
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.decoding.generate import Generation, GenerationBatch
from blip2edge.runtime.serving.http import Server
from tests.drawing import draw_pictures
from tests.http_calls import ask, call, chat, got, png_file
from tests.waiting import until

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
    return png_file()


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
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": alone.text, "refusal": None}
    assert answer["choices"][0]["finish_reason"] == {"eos": "stop", "length": "length"}[alone.finish_reason]
    assert answer["usage"] == {
        "prompt_tokens": alone.prompt_tokens,
        "completion_tokens": len(alone.tokens),
        "total_tokens": alone.prompt_tokens + len(alone.tokens),
    }


def test_words_as_they_come(server: Server, captioner: Captioner, png: bytes) -> None:
    alone = captioner.caption(PIL.Image.open(io.BytesIO(png)), max_new_tokens=8, min_new_tokens=8)
    body = chat(png, stream=True, max_tokens=8, min_new_tokens=8)
    answer = got(ask(server, "POST", "/v1/chat/completions", body))
    assert answer.headers["content-type"] == "text/event-stream"
    first, *chunks, last, done = answer.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert done == "[DONE]"
    assert last["choices"][0]["finish_reason"] == "length"
    pieces = [one["choices"][0]["delta"]["content"] for one in chunks]
    assert "".join(pieces) == alone.text
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
            assert "".join(texts) == alone.text
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
    assert 'blip2edge_requests_total{outcome="done"} 1.0' in lines
    assert 'blip2edge_requests_total{outcome="refused"} 1.0' in lines
    (tokens,) = [line for line in lines if line.startswith("blip2edge_tokens_total ")]
    assert float(tokens.split()[1]) > 0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "cannot be parsed"),
        (b"3", "JSON object"),
        (b"{}", "messages"),
        (b'{"messages": [{"role": "system", "content": "x"}]}', "role user"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "a picture"),
        (USER % b'{"type": "audio"}', "type text or image_url"),
        (USER % b'{"type": "text"}', "of the type text, to have a text"),
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
        ({"tools": [{"type": "function"}]}, "expected tools to be [], got"),
        ({"toolz": []}, "no key 'toolz'"),
        ({"stream": "yes"}, "stream"),
        ({"deadline_s": "soon"}, "deadline_s"),
        ({"deadline_s": 0}, "deadline"),
        ({"stop": 3}, "stop"),
        ({"temperature": 10**400}, "temperature to be a number from 0 to 1000"),
        ({"repetition_penalty": 1e308}, "repetition_penalty to be a number from 0.001 to 1000"),
        ({"repetition_penalty": 10**4000}, "bits"),
        ({"top_p": math.nan}, "expected a number, got NaN"),
        ({"temperature": math.inf}, "expected a number, got Infinity"),
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
        small.setattr(server, "limits", Limits(body_bytes=100))
        got(ask(server, "POST", "/caption", png), 413)

    def full(*_: Any, **__: Any) -> Any:
        raise OverloadError("the queue is full: 64 pictures are waiting", "try again later")

    monkeypatch.setattr(server.scheduler, "submit", full)
    assert got(ask(server, "POST", "/caption", png), 503).headers["retry-after"] == "1"


def test_paths_and_methods_that_there_are_not(server: Server, png: bytes) -> None:
    for method, path, status, allowed in (
        ("GET", "/nothing", 404, None),
        ("POST", "/caption/", 404, None),
        ("GET", "/caption", 405, {"POST"}),
        ("POST", "/health", 405, {"GET", "HEAD"}),
        ("DELETE", "/v1/models/x", 405, {"GET", "HEAD"}),
    ):
        answer = got(ask(server, method, path, png), status)
        assert answer.headers["content-type"] == "application/json"
        assert list(answer.json["error"]) == ["message", "type", "param", "code"]
        assert answer.json["error"]["code"] == {404: "not_found", 405: "method_not_allowed"}[status]
        assert (set(answer.headers["allow"].split(", ")) if "allow" in answer.headers else None) == allowed
    for path in ("/", "/health", "/metrics", "/v1/models"):
        assert got(ask(server, "HEAD", path)).headers["content-type"]
    assert server.counts == {"done": 0, "failed": 0, "refused": 0, "cancelled": 0}


def test_models_by_name(server: Server) -> None:
    (model,) = got(ask(server, "GET", "/v1/models")).json["data"]
    assert got(ask(server, "GET", f"/v1/models/{server.model}")).json == model
    assert model["created"] > 10**9
    error = got(ask(server, "GET", "/v1/models/gpt-4o/mini"), 404).json["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "image/png", "audio/wav"])
def test_a_chat_in_another_type(kind: str, server: Server, png: bytes) -> None:
    error = got(ask(server, "POST", "/v1/chat/completions", png, kind=kind), 415).json["error"]
    assert error["code"] == "unsupported_media_type"
    for right in (None, "application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded"):
        got(ask(server, "POST", "/v1/chat/completions", chat(png, max_tokens=1), kind=right))


def test_metrics_are_those_of_the_prometheus_format(server: Server, png: bytes) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="the extra serve is not installed")
    got(ask(server, "POST", "/caption", png))
    answer = got(ask(server, "GET", "/metrics"))
    families = {family.name: family for family in parser.text_string_to_metric_families(answer.body.decode())}
    names = {sample.name for family in families.values() for sample in family.samples}
    assert {name for name in names if not name.endswith(("_bucket", "_sum", "_count"))} == {
        "blip2edge_requests_total",
        "blip2edge_tokens_total",
        "blip2edge_stage_seconds_total",
        "blip2edge_load",
        "blip2edge_engine_restarts_total",
        "blip2edge_connections",
        "blip2edge_body_bytes",
    }
    for family in ("queue_seconds", "first_token_seconds", "caption_tokens"):
        values = {sample.name: sample.value for sample in families[f"blip2edge_{family}"].samples}
        assert values[f"blip2edge_{family}_count"] == 1
    (answered,) = [one for one in families["blip2edge_request_seconds"].samples if one.name.endswith("_count")]
    assert answered.labels == {"route": "/caption", "status": "200"}
    assert {one.labels["stage"] for one in families["blip2edge_batch_rows"].samples} == {"vision", "prefill", "decode"}
    seconds = {sample.labels["stage"]: sample.value for sample in families["blip2edge_stage_seconds"].samples}
    assert seconds["vision"] > 0
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_posted_captions_are_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_events", deque(maxlen=2))
    for number in range(3):
        got(ask(server, "POST", "/captions", b'{"text": "%d", "frame": null, "tokens": [1]}' % number))
    assert got(ask(server, "GET", "/captions")).json == {"data": [{"text": "1"}, {"text": "2"}]}
    for wrong in (b"[]", b"{}", b'{"text": 1}', b'{"text": "a", "source": {}}'):
        got(ask(server, "POST", "/captions", wrong), 400)
    error = got(ask(server, "POST", "/captions", b"{}"), 400).json["error"]
    assert (error["param"], error["code"]) == ("text", "missing_required_parameter")
    assert "the field text is missing" in error["message"]
    got(ask(server, "POST", "/captions", b'{"text": "' + b"a" * (64 << 10) + b'"}'), 413)


def test_usage_at_the_end_of_a_stream(server: Server, png: bytes) -> None:
    whole = got(ask(server, "POST", "/v1/chat/completions", chat(png, "two", max_tokens=5))).json
    body = chat(png, "two", max_tokens=5, stream=True, stream_options={"include_usage": True})
    *chunks, last, done = got(ask(server, "POST", "/v1/chat/completions", body)).events
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert last["timings_ms"].keys() == whole["timings_ms"].keys()
    assert all(chunk["usage"] is None for chunk in chunks)
    plain = got(ask(server, "POST", "/v1/chat/completions", chat(png, "two", max_tokens=5, stream=True)))
    assert not any("usage" in event for event in plain.events)
    assert plain.text == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"stop": "a"}, {"stop": ["o", "a"], "num_beams": 2}])
def test_a_stream_has_the_text_of_the_answer(more: dict[str, Any], server: Server, png: bytes) -> None:
    for prompt in (None, "a photo of", "two", "dog "):
        whole = got(ask(server, "POST", "/v1/chat/completions", chat(png, prompt, **more)))
        streamed = got(ask(server, "POST", "/v1/chat/completions", chat(png, prompt, stream=True, **more)))
        assert streamed.text == whole.text
        reasons = [event["choices"][0]["finish_reason"] for event in streamed.events[:-1]]
        assert reasons == [None] * (len(reasons) - 1) + [whole.json["choices"][0]["finish_reason"]]


def test_an_error_after_the_first_token_is_the_last_event(
    server: Server, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = GenerationBatch.step
    done: list[int] = []

    def failing(batch: GenerationBatch) -> list[Generation]:
        done.append(1)
        if len(done) > 3:
            raise BackendError("the decoder broke")
        return step(batch)

    monkeypatch.setattr(GenerationBatch, "step", failing)
    body = chat(png, stream=True, max_tokens=20, min_new_tokens=20)
    *chunks, last = got(ask(server, "POST", "/v1/chat/completions", body)).events
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert last == {
        "error": {"message": "the decoder broke", "type": "server_error", "param": None, "code": "internal_error"}
    }
    assert server.counts == {"done": 0, "failed": 1, "refused": 0, "cancelled": 0}


def test_the_same_seed_gives_the_same_text_beside_other_requests(server: Server, png: bytes) -> None:
    async def texts() -> list[str]:
        bodies = []
        for number in range(4):
            bodies += [chat(png, "two", temperature=1.3, seed=7, max_tokens=8), chat(png, max_tokens=9 + number)]
            bodies += [chat(png, "two", temperature=1.3, max_tokens=8)]
        answers = await asyncio.gather(*(call(server, "POST", "/v1/chat/completions", body) for body in bodies))
        return [got(answer).text for answer in answers[::3]]

    assert len(set(asyncio.run(texts()))) == 1


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


def test_a_client_that_goes_in_the_middle_of_a_stream_cancels_its_request(
    server: Server, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, hold = GenerationBatch.step, threading.Event()
    steps: list[int] = []

    def held(batch: GenerationBatch) -> list[Generation]:
        steps.append(1)
        assert len(steps) < 8 or hold.wait(60)
        return step(batch)

    monkeypatch.setattr(GenerationBatch, "step", held)
    body = chat(png, stream=True, max_tokens=20, min_new_tokens=20)
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    begun = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            begun.set()
        await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
    asyncio.run(asyncio.wait_for(server(scope, receive, send), 60))
    hold.set()
    assert server.counts == {"done": 0, "failed": 0, "refused": 0, "cancelled": 1}
    got(ask(server, "POST", "/caption", png))
    assert server.scheduler.load["running"] == 0


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


def test_an_error_of_one_request_does_not_end_the_scheduler(
    server: Server, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: Any) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(server.scheduler, "_encoder", mistake)
        with pytest.raises(ZeroDivisionError):
            ask(server, "POST", "/caption", png)
    assert got(ask(server, "GET", "/health")).json["status"] == "ok"
    got(ask(server, "POST", "/caption", png))


def test_health_reports_a_scheduler_that_failed(server: Server, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(server.scheduler, "_encoded", mistake)
    with pytest.raises(ZeroDivisionError):
        ask(server, "POST", "/caption", png)
    until(lambda: server.engine.state == "failed")  # the request fails first
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
