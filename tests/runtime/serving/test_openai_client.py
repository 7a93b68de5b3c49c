"""The real ``openai`` client over a socket, with its strict validation of answers: 60 forms of a request."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

import openai
import uvicorn

from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.serving.http import Server
from tests.drawing import draw_pictures
from tests.http_calls import ask, chat, got, picture_part, png_file

PNG = png_file()
IMAGE = picture_part(PNG)
CODE = base64.b64encode(PNG).decode()
SHORT = {"max_tokens": 6}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


ASKED = user(IMAGE, text("a photo of"))


def url(written: str) -> dict[str, Any]:
    return {"messages": [user({"type": "image_url", "image_url": {"url": written}}, text("a photo of"))]}


SAME: list[dict[str, Any]] = [
    {},
    {"messages": [user(text("a photo of"), IMAGE)]},
    {"messages": [user(text("a photo"), IMAGE, text("of"))]},
    {"messages": [{"role": "system", "content": ""}, ASKED]},
    {"messages": [user(picture_part(PNG, detail="low"), text("a photo of"))]},
    {"messages": [user(picture_part(PNG, detail="high"), text("a photo of"))]},
    {"messages": [user(picture_part(PNG, detail="auto"), text("a photo of"))]},
    url(f"data:image/jpeg;base64,{CODE}"),
    url(f"data:;base64,{CODE}"),
    url(f"DATA:image/png;BASE64,{CODE.rstrip('=')}"),
    url(f"data:image/png;charset=utf-8;base64,{CODE[:60]}\n{CODE[60:]}"),
    {"n": 1},
    {"logprobs": False},
    {"top_logprobs": 0},
    {"logit_bias": {}},
    {"frequency_penalty": 0.0, "presence_penalty": 0.0},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
    {"functions": [], "function_call": "none"},
    {"tool_choice": "auto"},
    {"reasoning_effort": "none", "verbosity": "medium"},
    {"store": False, "metadata": {}},
    {"user": "someone", "safety_identifier": "a", "prompt_cache_key": "b"},
    {"service_tier": "auto"},
    {"prompt_cache_retention": "in_memory"},
    {"temperature": 0, "top_p": 1, "seed": 7},
    {"top_p": 1.0},
    {"stop": []},
    {"stop": None, "seed": None, "temperature": None, "stream": None},
    {"max_completion_tokens": 6},
    {"max_tokens": 400, "extra_body": {"max_new_tokens": 400}},
    {"extra_body": {"repetition_penalty": 1.0, "num_beams": 1, "draft": "none", "deadline_s": 30}},
    {"stream_options": {"include_usage": False}},
]
"""Requests with the text of the first one."""

CAPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.9, "seed": 3}, {"temperature": 0.9, "seed": 3}),
    ({"temperature": 1.3, "top_p": 0.8, "seed": -1}, {"temperature": 1.3, "top_p": 0.8, "seed": 2**64 - 1}),
    ({"stop": "a"}, {"stop": ("a",)}),
    ({"stop": ["x", "o"]}, {"stop": ("x", "o")}),
    ({"extra_body": {"num_beams": 3, "length_penalty": 0.5}}, {"num_beams": 3, "length_penalty": 0.5}),
    (
        {"extra_body": {"min_new_tokens": 6, "repetition_penalty": 1.5}},
        {"min_new_tokens": 6, "repetition_penalty": 1.5},
    ),
    ({"extra_body": {"top_k": 4}, "seed": 0, "temperature": 2}, {"top_k": 4, "seed": 0, "temperature": 2}),
    ({"messages": [user(IMAGE)]}, {"prompt": None}),
]
"""Requests, and the options of the caption that has the same text."""

ERRORS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [{"role": "system", "content": "x"}, ASKED]}, "messages", "unsupported_value"),
    ({"messages": [ASKED, {"role": "assistant", "content": "x"}, user(text("why?"))]}, "messages", "unsupported_value"),
    ({"messages": [user(text("no picture"))]}, "messages", "missing_picture"),
    ({"messages": [user(IMAGE, {"type": "input_audio", "input_audio": {}})]}, "messages", "unsupported_value"),
    ({"messages": [{**ASKED, "name": "anna"}]}, "messages", "unsupported_parameter"),
    (url("https://example.org/a.png"), "messages", "invalid_image_url"),
    (url("data:image/png;base64,AAAA"), "messages", "invalid_image"),
    ({"messages": [user(IMAGE, text("two </s> cats"))]}, "messages", "invalid_prompt"),
    ({"n": 2}, "n", "unsupported_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_value"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"top_p": 1.5}, "top_p", "invalid_value"),
    ({"extra_body": {"best_of": 2}}, "best_of", "unknown_parameter"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "unsupported_value"),
]
"""Requests that are refused, and ``param`` and ``code`` of the error."""


def test_there_are_sixty_forms() -> None:
    assert len(SAME) + len(CAPTIONS) + len(ERRORS) == 60


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def client(captioner: Captioner) -> Iterator[Any]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    config = uvicorn.Config(Server(captioner, max_batch=2), log_level="warning", lifespan="on", ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    port = listening.getsockname()[1]
    with openai.OpenAI(
        api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, _strict_response_validation=True
    ) as opened:
        yield opened
    running.should_exit = True
    thread.join(60)
    listening.close()


@pytest.fixture(scope="module")
def create(client: Any) -> Callable[..., Any]:
    def call(**more: Any) -> Any:
        given: dict[str, Any] = {"model": "any", "messages": [ASKED], **more}
        if not any("max" in key for key in {**given, **given.get("extra_body", {})}):
            given |= SHORT
        return client.chat.completions.create(**given)

    return call


def joined(chunks: Any) -> tuple[str, list[Any]]:
    """The text of a stream, and its chunks."""
    listed = list(chunks)
    return "".join(chunk.choices[0].delta.content or "" for chunk in listed if chunk.choices), listed


@pytest.mark.parametrize("more", SAME, ids=[str(list(row))[:50] for row in SAME])
def test_forms_that_change_nothing(more: dict[str, Any], create: Callable[..., Any], captioner: Captioner) -> None:
    length = 400 if "extra_body" in more and more.get("max_tokens") == 400 else 6
    alone = captioner.caption(draw_pictures(1, 4)[0], prompt="a photo of", max_new_tokens=length)
    answer = create(**more)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == {"eos": "stop", "length": "length"}[alone.finish_reason]
    assert answer.usage.prompt_tokens == captioner.prompts("a photo of").length
    assert answer.usage.completion_tokens == len(alone.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert abs(answer.created - time.time()) < 600
    if "stream" not in more:
        assert joined(create(**more, stream=True))[0] == alone.text


@pytest.mark.parametrize(("more", "options"), CAPTIONS, ids=[str(list(row[0])) for row in CAPTIONS])
def test_options(
    more: dict[str, Any], options: dict[str, Any], create: Callable[..., Any], captioner: Captioner
) -> None:
    given = {"prompt": "a photo of", "max_new_tokens": 6, **options}
    alone = captioner.caption(draw_pictures(1, 4)[0], **given)
    assert create(**more).choices[0].message.content == alone.text
    words, chunks = joined(create(**more, stream=True, stream_options={"include_usage": True}))
    assert words == alone.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], len(alone.tokens))
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


@pytest.mark.parametrize(("more", "param", "code"), ERRORS, ids=[f"{row[1]}-{row[2]}" for row in ERRORS])
def test_errors(more: dict[str, Any], param: str, code: str, create: Callable[..., Any]) -> None:
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            create(**more, stream=streamed)
        error = caught.value
        assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")


def test_models(client: Any, captioner: Captioner) -> None:
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id) == listed
    assert (listed.id, listed.owned_by) == (captioner.bundle.path.name, "blip2edge")
    assert listed.created == int((captioner.bundle.path / "bundle.json").stat().st_mtime)
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_questions(create: Callable[..., Any], captioner: Captioner) -> None:
    alone = captioner.ask(draw_pictures(1, 4)[0], "what is it?", max_new_tokens=6)
    asked = create(messages=[user(IMAGE, text("what is it?"))], extra_body={"ask": True})
    assert asked.choices[0].message.content == alone.text


@pytest.mark.parametrize(
    ("more", "options"),
    [({}, {}), ({"stop": "o"}, {"stop": ("o",)}), ({"extra_body": {"draft": "lookup"}}, {"draft": "lookup"})],
    ids=str,
)
def test_log_probabilities_are_those_of_the_caption(
    create: Callable[..., Any], captioner: Captioner, more: dict[str, Any], options: dict[str, Any]
) -> None:
    """Their tokens, joined, are the text; in a stream they come with the pieces that they complete."""
    whole = create(logprobs=True, top_logprobs=3, **more)
    (choice,) = whole.choices
    content = choice.logprobs.content
    assert "".join(token.token for token in content) == choice.message.content
    assert all(token.bytes == list(token.token.encode()) for token in content)
    given = {"prompt": "a photo of", "max_new_tokens": 6, "top_logprobs": 3, **options}
    caption = captioner.caption(draw_pictures(1, 4)[0], **given)
    assert [token.logprob for token in content] == pytest.approx(caption.token_logprobs[: len(content)], abs=1e-4)
    for token, likeliest in zip(content, caption.likeliest, strict=False):
        assert [one.logprob for one in token.top_logprobs] == pytest.approx([value for _, value in likeliest], abs=1e-4)
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4)  # greedy: the likeliest one
    assert whole.logprob == pytest.approx(caption.logprob, abs=1e-4)
    assert (whole.confidence, whole.abstained) == (None, False)
    chunks = list(create(logprobs=True, stream=True, **more))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [token for one in parts if one is not None for token in one.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in content], abs=1e-4)
    assert chunks[0].choices[0].logprobs is None
    assert chunks[-1].logprob == pytest.approx(whole.logprob, abs=1e-4)


def test_beam_search_gives_its_log_probabilities_at_the_end(create: Callable[..., Any]) -> None:
    search = {"num_beams": 2}
    content = create(logprobs=True, extra_body=search).choices[0].logprobs.content
    chunks = list(create(logprobs=True, stream=True, extra_body=search))
    assert [token.token for token in chunks[-1].choices[0].logprobs.content] == [token.token for token in content]
    with pytest.raises(openai.BadRequestError) as refused:
        create(logprobs=True, top_logprobs=2, extra_body=search)
    assert refused.value.param == "top_logprobs"


def test_abstaining_without_a_confidence_is_refused(create: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="calibrate BUNDLE -o OUT --references FILE") as refused:
        create(extra_body={"abstain_below": 0.5})
    assert refused.value.param == "abstain_below"


def test_an_answer_that_is_not_sure(confident_bundle: Path) -> None:
    """The chat API has a legal finish reason; what is below it has our own."""
    with Captioner.load(confident_bundle, threads=1) as captioner:
        server = Server(captioner, max_batch=2)
        limits: dict[str, Any] = {"abstain_below": 1.0, "max_tokens": 6}
        answer = got(ask(server, "POST", "/v1/chat/completions", chat(PNG, **limits, logprobs=True))).json
        (choice,) = answer["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")
        assert choice["logprobs"] == {"content": [], "refusal": None}
        assert answer["abstained"] is True
        assert 0 < answer["confidence"] < 1
        sure = got(ask(server, "POST", "/v1/chat/completions", chat(PNG, abstain_below=0.0, max_tokens=6))).json
        assert (sure["abstained"], sure["confidence"]) == (False, pytest.approx(answer["confidence"], abs=0.02))
        streamed = got(ask(server, "POST", "/v1/chat/completions", chat(PNG, **limits, stream=True)))
        last = streamed.events[-2]
        assert (last["choices"][0]["finish_reason"], last["abstained"]) == ("stop", True)
        own = got(ask(server, "POST", "/caption", PNG, "abstain_below=1&max_new_tokens=6", kind="image/png")).json
        assert (own["finish_reason"], own["text"]) == ("abstained", "")
        server.close()
