"""Embeddings and match over HTTP: equal to the matcher's, in OpenAI's format, refused with a sentence."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("starlette", reason="the server needs the extra serve")

from blip2edge.errors import EngineFaultError, UsageError
from blip2edge.limits import Limits
from blip2edge.runtime.captioning import restart
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.captioning.restart import Backoff
from blip2edge.runtime.serving.access import Access
from blip2edge.runtime.serving.chat_keys import EMBEDDING_KEYS
from blip2edge.runtime.serving.http import Server
from blip2edge.runtime.serving.models import embeddings_api
from blip2edge.runtime.serving.models.embeddings_api import MOST_INPUTS, embed_steps, match_steps, vectors_per_image
from blip2edge.runtime.serving.models.match_queue import MatchQueue
from blip2edge.runtime.serving.models.served import load_served
from blip2edge.runtime.serving.openapi import document
from tests.http_calls import Answer, ask, data_url, got, png_file

PNG = png_file()
PICTURE = {"image": data_url(PNG)}
TEXTS = ["a red dog", "two cats on a table"]


@pytest.fixture(scope="module")
def matcher(blip_itm: Path) -> Iterator[Matcher]:
    with Matcher.load(blip_itm, threads=1) as loaded:
        yield loaded


@pytest.fixture
def server(matcher: Matcher) -> Iterator[Server]:
    made = Server(matcher)
    yield made
    made.close()


def embed(server: Server, *, status: int = 200, **values: Any) -> Answer:
    return got(ask(server, "POST", "/v1/embeddings", json.dumps(values).encode(), kind="application/json"), status)


def match(server: Server, *, status: int = 200, **values: Any) -> Answer:
    return got(ask(server, "POST", "/match", json.dumps(values).encode(), kind="application/json"), status)


def test_vectors_equal_those_of_the_matcher(server: Server, matcher: Matcher) -> None:
    answer = embed(server, input=[TEXTS[0], {"text": TEXTS[1]}, PICTURE, TEXTS[0]], model="any").json
    assert (answer["object"], answer["model"]) == ("list", "blip-itm")
    assert [(one["object"], one["index"]) for one in answer["data"]] == [("embedding", at) for at in range(4)]
    texts, picture = matcher.embed_texts(TEXTS), matcher.embed_image(PNG)
    wanted = [texts[0], texts[1], picture, texts[0]]
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], wanted, atol=1e-6)
    length = sum(len(matcher.token_ids(text)) for text in (*TEXTS, TEXTS[0]))
    assert answer["usage"] == {"prompt_tokens": length, "total_tokens": length}
    lone = embed(server, input=TEXTS[0]).json["data"]
    assert lone[0]["embedding"] == matcher.embed_text(TEXTS[0]).tolist()  # the very numbers that `embed` prints


def test_base64_is_the_same_vector(server: Server, matcher: Matcher) -> None:
    (one,) = embed(server, input=[PICTURE], encoding_format="base64").json["data"]
    read = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
    np.testing.assert_array_equal(read, matcher.embed_image(PNG))


def test_the_openai_client_reads_the_answer(server: Server, matcher: Matcher) -> None:
    """Its default form is base64."""
    openai = pytest.importorskip("openai", reason="openai is not installed")
    httpx = importlib.import_module("httpx2" if find_spec("httpx2") else "httpx")  # openai changed to httpx2

    async def created(**values: Any) -> Any:
        transport = httpx.ASGITransport(app=server)
        async with httpx.AsyncClient(transport=transport, base_url="http://board") as http:
            client = openai.AsyncOpenAI(api_key="k", base_url="http://board/v1", http_client=http, max_retries=0)
            return await client.embeddings.create(model="blip-itm", **values)

    wanted = matcher.embed_text(TEXTS[0])
    for form in ({}, {"encoding_format": "float"}):
        made = asyncio.run(created(input=TEXTS[0], **form))
        assert made.data[0].embedding == pytest.approx(wanted.tolist(), abs=0)
        assert made.usage.total_tokens == len(matcher.token_ids(TEXTS[0]))
    made = asyncio.run(created(input=["a", PICTURE]))
    np.testing.assert_array_equal(np.array(made.data[1].embedding, np.float32), matcher.embed_image(PNG))
    with pytest.raises(openai.BadRequestError) as refused:
        asyncio.run(created(input="a", dimensions=3))
    assert (refused.value.param, refused.value.code) == ("dimensions", "unsupported_parameter")


def test_pictures_of_several_vectors(server: Server, matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of BLIP-2 has a vector for each query."""
    assert vectors_per_image(matcher) == 1  # this one is of BLIP
    wanted = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    monkeypatch.setattr(embeddings_api, "vectors_per_image", lambda matcher: 3)
    refused = embed(server, input=[PICTURE], status=400).json["error"]  # before any vector is computed
    assert (refused["param"], refused["code"]) == ("return_multivector", "multivector_required")
    assert "3 vectors" in refused["message"]
    assert {name: count for name, count in next(iter(server.models)).metrics.counts.items() if count} == {"refused": 1}
    monkeypatch.setattr(Matcher, "embed_images_iter", lambda self, batch, **_: iter([wanted] * len(batch)))
    picture, text = embed(server, input=[PICTURE, "a"], return_multivector=True).json["data"]
    assert set(picture) == {"object", "index", "embeddings"}
    np.testing.assert_array_equal(np.array(picture["embeddings"], np.float32), wanted)
    assert len(text["embeddings"]) == 1
    assert "embedding" in embed(server, input="a").json["data"][0]


FORMS: dict[str, Callable[[Server], Answer | None]] = {
    "json": lambda server: match(server, image=[data_url(PNG)], text=TEXTS),
    "query": lambda server: ask(server, "POST", "/match", PNG, "text=a+red+dog&text=two+cats+on+a+table"),
}


@pytest.mark.parametrize("form", FORMS)
def test_match_gives_what_the_command_gives(form: str, server: Server, matcher: Matcher) -> None:
    answer = got(FORMS[form](server)).json
    assert (answer["object"], answer["model"]) == ("list", "blip-itm")
    wanted = [{**result.to_json(), "image": 0} for result in matcher.match_many([PNG], TEXTS)]
    assert answer["data"] == wanted
    assert set(answer["data"][0]) == {"image", "text", "probability", "cosine"}


def test_pairs_of_several_pictures(server: Server) -> None:
    pairs = match(server, image=[data_url(PNG)] * 2, text=TEXTS[0]).json["data"]
    assert [pair["image"] for pair in pairs] == [0, 1]
    assert pairs[0]["cosine"] == pairs[1]["cosine"]


def test_many_texts_are_compared_in_steps(matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps, the graphs of other bundles may run."""
    texts, graphs, run = ["a", "b", "c", "d", "e"], [0], type(matcher.texts).run

    def counting(*arguments: Any, **options: Any) -> Any:
        graphs[0] += 1
        return run(*arguments, **options)

    monkeypatch.setattr(type(matcher.texts), "run", counting)
    longest, pairs = 0, []
    for step in match_steps(matcher, (PNG, PNG), texts, batch_size=2):
        longest, graphs[0] = max(longest, graphs[0]), 0
        pairs += step
    assert longest == 2  # a picture, or two texts
    wanted = [result.to_json() for result in matcher.match_many([PNG, PNG], texts)]
    assert pairs == [{**result, "image": at // 5} for at, result in enumerate(wanted)]


REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "input", "missing_required_parameter", "expected an input"),
    ({"input": []}, "input", "invalid_value", "expected 1 to"),
    ({"input": ["a"] * (MOST_INPUTS + 1)}, "input", "invalid_value", "expected 1 to"),
    ({"input": [[1, 2]]}, "input", "invalid_type", "token ids are not accepted"),
    ({"input": [5]}, "input", "invalid_type", "input[0]"),
    ({"input": [{"picture": "x"}]}, "input", "invalid_type", "input[0]"),
    ({"input": [{"image": "http://a/b.png"}]}, "input", "invalid_image_url", "fetches nothing"),
    ({"input": ["a", PICTURE, {"image": "data:,x"}]}, "input[2]", "invalid_image", "picture"),
    ({"input": ["a", ""]}, "input[1]", "invalid_prompt", "empty"),
    ({"input": ["a", "[SEP]"]}, "input[1]", "invalid_prompt", "[SEP]"),
    ({"input": [PICTURE] * 4}, "input", "invalid_value", "at most 3 pictures"),
    ({"input": "a", "dimensions": 4}, "dimensions", "unsupported_parameter", "dimensions is not supported"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "unsupported_value", "float or base64"),
    ({"input": "a", "model": 3}, "model", "invalid_type", "model"),
    ({"input": "a", "user": 3}, "user", "invalid_type", "user"),
    ({"input": "a", "return_multivector": 1}, "return_multivector", "invalid_type", "true or false"),
    ({"input": "a", "deadline_s": 0}, "deadline_s", "invalid_value", "deadline_s"),
    ({"input": "a", "inputs": 1}, "inputs", "unknown_parameter", "no key 'inputs'"),
]


@pytest.mark.parametrize(("values", "param", "code", "message"), REFUSED)
def test_refused(values: dict[str, Any], param: str, code: str, message: str, matcher: Matcher) -> None:
    server = Server(matcher, limits=Limits(pictures=3))
    try:
        error = embed(server, status=400, **values).json["error"]
    finally:
        server.close()
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({"text": "a"}, "image", "expected a picture"),
        ({"image": data_url(PNG)}, "text", "expected a text"),
        ({"image": data_url(PNG), "text": 3}, "text", "to be a text or a list"),
        ({"image": data_url(PNG), "text": [" "]}, "text", "empty"),
        ({"image": data_url(PNG), "text": ["a"] * 1025}, "text", "at most 1024 pairs"),
        ({"image": "data:,x", "text": "a"}, "image", "picture"),
        ({"image": data_url(PNG), "text": "a", "num_beams": 2}, "num_beams", "no parameter 'num_beams'"),
    ],
)
def test_no_match(values: dict[str, Any], param: str, message: str, server: Server) -> None:
    error = match(server, status=400, **values).json["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_the_guards_of_the_other_routes(matcher: Matcher) -> None:
    server = Server(matcher, access=Access(api_key="k"), limits=Limits(body_bytes=500, json_depth=3, prompt_chars=20))
    key = {"authorization": "Bearer k"}

    def status(path: str, body: bytes, **headers: str) -> int:
        answer = ask(server, "POST", path, body, kind="application/json", headers=headers)
        assert answer is not None
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}
        return answer.status

    try:
        for path in ("/v1/embeddings", "/match"):
            assert status(path, b"{}") == 401
            assert status(path, b" " * 501, **key) == 413
            assert status(path, b'{"input": [[[[1]]]]}', **key) == 400
            assert ask(server, "GET", path, headers=key).status == 405  # type: ignore[union-attr]
        assert status("/v1/embeddings", b'{"input": ["%s"]}' % (b"a" * 21), **key) == 400
        assert got(ask(server, "POST", "/v1/embeddings", PNG, kind="image/png", headers=key), 415)
    finally:
        server.close()


def test_a_captioner_answers_with_a_sentence(tiny_bundle: Path, server: Server) -> None:
    with Captioner.load(tiny_bundle, threads=1) as captioner:
        captions = Server(captioner)
        try:
            for answer in (embed(captions, input="a", status=400), match(captions, status=400)):
                assert answer.json["error"]["code"] == "unsupported_model"
                assert "captions pictures" in answer.error
        finally:
            captions.close()
    refused = got(ask(server, "POST", "/caption", PNG), 400)
    assert "cannot caption them" in refused.error
    assert got(ask(server, "GET", "/health")).json == {
        "status": "ok",
        "model": "blip-itm",
        "load": {"waiting": 0, "running": 0},
    }


def test_counted_and_documented(server: Server) -> None:
    schemas = pytest.importorskip("jsonschema_rs", reason="the extra dev is not installed")
    made = document(Limits())
    for path in ("/v1/embeddings", "/match"):
        operation = made["paths"][path]["post"]
        example = operation["requestBody"]["content"]["application/json"]["example"]
        answer = got(ask(server, "POST", path, json.dumps(example).encode(), kind="application/json")).json
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        schemas.Draft202012Validator({**schema, "components": made["components"]}).validate(answer)
    assert set(made["components"]["schemas"]["EmbeddingsRequest"]["properties"]) == {key.name for key in EMBEDDING_KEYS}
    got(ask(server, "POST", "/match", b"x", "text=a"), 400)
    lines = got(ask(server, "GET", "/metrics")).body.decode().splitlines()
    assert 'blip2edge_requests_total{outcome="done"} 2.0' in lines
    assert 'blip2edge_requests_total{outcome="refused"} 1.0' in lines
    assert any('route="/v1/embeddings",status="200"' in line for line in lines)


def test_a_full_queue_and_a_deadline(matcher: Matcher) -> None:
    queue, entered, go = MatchQueue(matcher, max_waiting=1), threading.Event(), threading.Event()
    ended: list[str | None] = []

    def held(_: Matcher) -> Iterator[list[int]]:
        entered.set()
        go.wait(30)
        yield [1]

    first = queue.submit(held, [], deadline=None, on_piece=ended.append)
    assert entered.wait(30)
    second = queue.submit(lambda _: iter([[2], [3]]), [], deadline=None, on_piece=ended.append)
    with pytest.raises(Exception, match="the queue is full: 1 requests"):
        queue.submit(held, [], deadline=None, on_piece=ended.append)
    second.cancel()
    third = queue.submit(held, [], deadline=1e-6, on_piece=ended.append)  # the canceled call does not count
    assert queue.load == {"waiting": 1, "running": 1}
    go.set()
    assert first.result(30) == [1]
    with pytest.raises(Exception, match="before its deadline"):
        third.result(30)
    queue.close()
    assert ended.count(None) >= 3


def test_steps_end_when_the_inputs_are_emptied(matcher: Matcher) -> None:
    cases: list[tuple[Any, list[Any]]] = [
        (embed_steps, [PNG, PNG, "a"]),
        (partial(match_steps, texts=["a", "b"]), [PNG, PNG]),
    ]
    for steps, inputs in cases:
        made: Iterator[list[Any]] = steps(matcher, inputs, batch_size=1)
        next(made)
        next(made)
        inputs.clear()
        assert len(list(made)) <= 2  # those of the picture that was taken


def test_a_canceled_call_frees_its_pictures_and_leaves_the_queue(matcher: Matcher) -> None:
    queue, entered, go = MatchQueue(matcher), threading.Event(), threading.Event()

    def held(_: Matcher) -> Iterator[list[int]]:
        entered.set()
        go.wait(30)
        yield [1]

    class Steps:
        def __call__(self, _: Matcher) -> Iterator[list[int]]:
            return iter([[2]])

    try:
        first = queue.submit(held, [], deadline=None, on_piece=lambda _: None)
        assert entered.wait(30)
        steps = Steps()
        freed, call = weakref.ref(steps), queue.submit(steps, [], deadline=None, on_piece=lambda _: None)
        del steps
        assert (freed() is not None, queue.load["waiting"]) == (True, 1)
        call.cancel()
        assert (freed(), queue.load["waiting"]) == (None, 0)
        go.set()
        assert first.result(30) == [1]
        entered.clear()
        go.clear()
        pictures: list[bytes] = [PNG] * 3
        running = queue.submit(held, pictures, deadline=None, on_piece=lambda _: None)
        assert entered.wait(30)
        running.cancel()
        assert not pictures  # though the step has not ended
    finally:
        go.set()
        queue.close()


def until_loaded(queue: MatchQueue) -> None:
    """Waits for the end of a restart."""
    for _ in range(3000):
        if queue.state != "restarting":
            break
        time.sleep(0.01)


def broken_queue(bundle: Path, load: Callable[[], Matcher], attempts: int = 3) -> tuple[MatchQueue, threading.Event]:
    """A queue whose matcher is broken, and an event for its end."""
    loaded, gave_up = Matcher.load(bundle, threads=1), threading.Event()
    loaded.texts.close()
    loaded.texts = None  # type: ignore[assignment]
    queue = MatchQueue(loaded, load, Backoff(0.001, 0.001, attempts))
    queue.gave_up = gave_up.set
    broken = queue.submit(lambda one: iter([[one.embed_text("a")]]), [], deadline=None, on_piece=lambda _: None)
    with pytest.raises(EngineFaultError):
        broken.result(30)
    return queue, gave_up


@pytest.mark.parametrize("error", [MemoryError, ValueError])
def test_a_load_that_fails_in_any_way_is_tried_again_and_then_given_up(blip_itm: Path, error: type[Exception]) -> None:
    loads = []

    def fails() -> Matcher:
        loads.append(1)
        raise error("no")

    queue, gave_up = broken_queue(blip_itm, fails)
    assert gave_up.wait(30)
    assert (queue.state, queue.problem, len(loads)) == ("failed", f"{error.__name__}: no", 3)
    with pytest.raises(EngineFaultError):
        queue.ready()
    queue.close()


def test_a_matcher_that_hangs_is_given_up(blip_itm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    class Hanging(Matcher):
        def embed_text(self, text: str) -> Any:
            go.wait(30)

    monkeypatch.setattr(restart, "CHECK_S", 0.05)
    queue, gave_up = broken_queue(blip_itm, lambda: Hanging.load(blip_itm, threads=1))
    assert gave_up.wait(30)
    assert (queue.state, queue.problem) == ("failed", "the engine gave no answer within 0.05 s")
    go.set()
    queue.close()


def test_a_broken_engine_is_loaded_again(blip_itm: Path) -> None:
    loads = []

    def load() -> Matcher:
        loads.append(Matcher.load(blip_itm, threads=1))
        return loads[-1]

    queue = MatchQueue(load(), load, Backoff(0.001, 0.001, 3))

    def fails(_: Matcher) -> Iterator[list[int]]:
        raise ZeroDivisionError("one call")

    with pytest.raises(ZeroDivisionError):  # the engine works: only the call fails
        queue.submit(fails, [], deadline=None, on_piece=lambda _: None).result(30)
    loads[0].texts.close()
    loads[0].texts = None  # type: ignore[assignment]
    broken = queue.submit(lambda one: iter([[one.embed_text("a")]]), [], deadline=None, on_piece=lambda _: None)
    with pytest.raises(Exception, match="being loaded again"):
        broken.result(30)
    until_loaded(queue)
    assert (queue.state, queue.restarts, len(loads)) == ("ok", 1, 2)
    assert (
        len(queue.submit(lambda one: iter([[one.embed_text("a")]]), [], deadline=None, on_piece=print).result(30)) == 1
    )
    queue.close()


def test_queries_are_refused_for_a_matcher(blip_itm: Path) -> None:
    with pytest.raises(UsageError, match="does not take queries: it compares pictures with texts"):
        load_served(blip_itm, backend="cpu", threads=1, limits=Limits(), require_signature=None, queries=4)
