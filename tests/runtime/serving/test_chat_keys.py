"""The keys of a chat request: OpenAI's schema, what is accepted, and what is refused by its name. No model runs."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import quote

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")

from blip2edge.bundle.prompt_spec import INTERLEAVED, PromptSpec
from blip2edge.limits import limit_table
from blip2edge.runtime.serving.chat_keys import KEYS, RequestError, key_table
from blip2edge.runtime.serving.json_bodies import picture_bytes
from blip2edge.runtime.serving.openai_api import MESSAGE_KEYS, ChatRequest, read_request
from blip2edge.runtime.text.prompt import Dialog

DOCS = Path(__file__).resolve().parents[3] / "docs" / "serving.md"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USER = {"role": "user", "content": [IMAGE, {"type": "text", "text": "a photo of"}]}


def read(*messages: dict[str, Any], spec: PromptSpec | None = None, **more: Any) -> ChatRequest:
    return read_request(json.dumps({"messages": list(messages or [USER]), **more}).encode(), spec)


def refused(*messages: dict[str, Any], spec: PromptSpec | None = None, **more: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(*messages, spec=spec, **more)
    return caught.value


def test_every_key_of_openais_schema_is_in_the_table_and_no_other() -> None:
    types = pytest.importorskip("openai.types.chat.completion_create_params", reason="openai is not installed")
    schema = set(get_type_hints(types.CompletionCreateParamsNonStreaming))
    assert {key.name for key in KEYS if not key.own} == schema
    assert not {key.name for key in KEYS if key.own} & schema
    assert len({key.name for key in KEYS}) == len(KEYS)


def test_every_key_of_openais_messages_is_read_or_refused() -> None:
    chat = pytest.importorskip("openai.types.chat", reason="openai is not installed")
    kinds = [*get_args(chat.ChatCompletionMessageParam), chat.ChatCompletionMessage]
    keys = {key for kind in kinds for key in kind.__annotations__}
    assert keys - {"tool_call_id"} == {"role", "content", *MESSAGE_KEYS}  # that one is of the role tool, refused


NO_OPS = [
    *((key.name, value) for key in KEYS for value in key.values if isinstance(value, (str, int, list, dict))),
    *((key.name, None) for key in KEYS if key.name != "messages"),
    ("n", 1.0),
    ("frequency_penalty", 0.0),
    ("presence_penalty", -0.0),
    ("top_p", 1),
    ("top_p", 1.0),
    ("stream", False),
    ("stream_options", {}),
    ("stream_options", {"include_usage": False, "include_obfuscation": False}),
    ("stream_options", {"include_usage": None}),
    ("ask", False),
    ("user", "someone"),
    ("safety_identifier", ""),
    ("prompt_cache_key", "k"),
]


@pytest.mark.parametrize(("name", "value"), NO_OPS, ids=lambda value: json.dumps(value)[:40])
def test_what_changes_nothing_is_accepted(name: str, value: Any) -> None:
    assert read(**{name: value}) == read()


REFUSED = [
    ("n", 2, "expected n to be 1, got 2"),
    ("n", True, "expected n to be 1"),
    ("n", 0, "expected n to be 1"),
    ("logprobs", 0, "expected logprobs to be true or false"),
    ("top_logprobs", 3, "expected logprobs to be true with top_logprobs"),
    ("logit_bias", {"50256": -100}, "expected logit_bias to be {}"),
    ("frequency_penalty", 0.5, "expected frequency_penalty to be 0"),
    ("presence_penalty", False, "expected presence_penalty to be 0"),
    ("response_format", {"type": "json_object"}, 'expected response_format to be {"type": "text"}'),
    ("response_format", {"type": "json_schema", "json_schema": {}}, "expected response_format to be"),
    ("modalities", ["text", "audio"], 'expected modalities to be ["text"]'),
    ("modalities", [], "expected modalities to be"),
    ("tools", [{"type": "function", "function": {"name": "f"}}], "expected tools to be []"),
    ("tools", {}, "expected tools to be []"),
    ("tool_choice", "required", 'expected tool_choice to be "none" or "auto"'),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "expected tool_choice to be"),
    ("parallel_tool_calls", "yes", "expected parallel_tool_calls to be true or false"),
    ("functions", [{"name": "f"}], "expected functions to be []"),
    ("function_call", {"name": "f"}, "expected function_call to be"),
    ("reasoning_effort", "high", 'expected reasoning_effort to be "none"'),
    ("verbosity", "low", 'expected verbosity to be "medium"'),
    ("store", True, "expected store to be false"),
    ("metadata", {"a": "b"}, "expected metadata to be {}"),
    ("service_tier", "flex", "expected service_tier to be"),
    ("prompt_cache_retention", "24h", "expected prompt_cache_retention to be"),
    ("prompt_cache_options", {"mode": "explicit"}, "expected prompt_cache_options to be"),
    ("audio", {"voice": "alloy", "format": "wav"}, "audio is not supported"),
    ("prediction", {"type": "content", "content": "x"}, "prediction is not supported"),
    ("moderation", {"model": "omni-moderation-latest"}, "moderation is not supported"),
    ("web_search_options", {}, "web_search_options is not supported"),
    ("user", 3, "expected user to be a text, got 3"),
    ("model", ["a"], "expected model to be a text"),
    ("stream", "yes", "expected stream to be true or false"),
    ("stream", 1, "expected stream to be true or false"),
    ("stream_options", True, "expected stream_options to be an object"),
    ("stream_options", {"include_usage": "yes"}, "expected stream_options.include_usage to be true or false"),
    ("stream_options", {"include_obfuscation": True}, "include_obfuscation is not supported"),
    ("stream_options", {"usage": True}, "no key 'usage' in stream_options"),
    ("ask", "what", "expected ask to be true or false"),
    ("deadline_s", True, "expected deadline_s to be a number"),
    ("max_token", 3, "there is no key 'max_token'"),
    ("logit-bias", None, "there is no key 'logit-bias'"),
]


@pytest.mark.parametrize(("name", "value", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honored_is_refused_by_its_name(name: str, value: Any, told: str) -> None:
    error = refused(**{name: value})
    assert told in str(error)
    assert error.field is not None
    assert (error.field.partition(".")[0], error.status) == (name, 400)
    assert error.code in ("unsupported_value", "unsupported_parameter", "unknown_parameter", "invalid_type")


def test_the_order_of_keys_never_matters() -> None:
    """Right requests are read alike, and wrong ones refused for the same key."""
    right = {"max_tokens": 5, "max_completion_tokens": 5, "temperature": 0.5, "top_k": 3, "stop": "a", "stream": True}
    wrong = {"max_tokens": 5, "max_completion_tokens": 6, "n": 2, "zebra": 1, "aardvark": 1, "store": True}
    draw = random.Random(0)
    answers, errors = set(), set()
    for _ in range(20):
        for values in (right, wrong):
            items = [("messages", [USER]), *values.items()]
            draw.shuffle(items)
            body = json.dumps(dict(items)).encode()
            if values is right:
                answers.add(repr(read_request(body)))
                continue
            with pytest.raises(RequestError) as caught:
                read_request(body)
            errors.add(str(caught.value))
    assert (len(answers), len(errors)) == (1, 1)
    with pytest.raises(RequestError, match="the key 'n' is given twice"):
        read_request(b'{"messages": [], "n": 2, "n": 1}')


def test_names_of_one_option_must_agree() -> None:
    assert read(max_tokens=5, max_completion_tokens=5).options == {"max_new_tokens": 5}
    assert read(max_completion_tokens=5).names["max_new_tokens"] == "max_completion_tokens"
    assert read(max_tokens=None, max_new_tokens=5).options == {"max_new_tokens": 5}
    error = refused(max_tokens=5, max_completion_tokens=6)
    assert str(error).startswith("expected max_completion_tokens and max_tokens to be equal, got 6 and 5")


def test_values_of_options() -> None:
    assert read(stop="a").options == read(stop=["a"]).options == {"stop": ["a"]}
    assert read(seed=-1).options == {"seed": 2**64 - 1}
    assert read(seed=-(2**63)).options == {"seed": 2**63}
    assert read(temperature=1, top_p=1).options == {"temperature": 1}
    assert read(top_p=0.5).options == {"top_p": 0.5}
    assert read(stream=True, stream_options={"include_usage": True}).include_usage


# Messages


def text(words: Any) -> dict[str, Any]:
    return {"type": "text", "text": words}


ACCEPTED = [
    ([USER], "a photo of"),
    ([{"role": "user", "content": [text("a photo of"), IMAGE]}], "a photo of"),
    ([{"role": "user", "content": [IMAGE]}], None),
    ([{"role": "user", "content": [IMAGE, text("")]}], None),
    ([{"role": "user", "content": [text("a"), IMAGE, text("photo of")]}], "a photo of"),
    ([{"role": "system", "content": ""}, USER], "a photo of"),
    ([{"role": "developer", "content": [text(" ")]}, USER], "a photo of"),
    ([{**USER, "name": None}], "a photo of"),
    *(
        ([{"role": "user", "content": [{**IMAGE, "image_url": {**IMAGE["image_url"], "detail": detail}}]}], None)  # type: ignore[dict-item]
        for detail in (None, "auto", "low", "high", "original")
    ),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]}], None),
]


@pytest.mark.parametrize(("messages", "prompt"), ACCEPTED)
def test_messages_that_are_read(messages: list[dict[str, Any]], prompt: str | None) -> None:
    request = read(*messages)
    assert (request.images, request.prompt) == ((b"\0\0\0",), prompt)


NO_PLACE = [
    ([{"role": "system", "content": "MARK"}, USER], "no place for a message of the role system"),
    ([{"role": "developer", "content": [text("MARK")]}, USER], "no place for a message of the role system"),
    ([{"role": "user", "content": "MARK"}, {"role": "user", "content": [IMAGE]}], "got user, user"),
    ([USER, {"role": "assistant", "content": "x"}, USER], "got user, assistant, user"),
    ([USER, {"role": "assistant", "content": "MARK"}], "the last message to be of the role user, got assistant"),
    ([USER, {"role": "system", "content": "MARK"}], "the last message to be of the role user, got system"),
    ([{"role": "tool", "content": "MARK", "tool_call_id": "1"}, USER], "messages[0].role to be system, developer"),
    ([{"role": "function", "content": "MARK", "name": "f"}, USER], "messages[0].role to be"),
    ([{"role": "User", "content": [IMAGE]}], "messages[0].role to be"),
    ([{"content": [IMAGE]}], "messages[0].role to be"),
    ([{**USER, "name": "anna"}], "messages[0].name is not supported"),
    ([USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "messages[1].tool_calls is not"),
    ([{**USER, "colour": "red"}], "no key 'colour' in messages[0]"),
    ([{"role": "user", "content": [IMAGE, {"type": "input_audio", "input_audio": {}}]}], "got 'input_audio'"),
    ([{"role": "user", "content": [IMAGE, {"type": "file", "file": {}}]}], "messages[0].content[1] to be of the type"),
    ([{"role": "user", "content": [IMAGE, {"type": "refusal", "refusal": "no"}]}], "type text or image_url"),
    ([{"role": "system", "content": [IMAGE]}, USER], "messages[0].content[0] to be of the type text, got 'image_url'"),
    ([{"role": "user", "content": [IMAGE, "words"]}], "type text or image_url"),
    ([{"role": "user", "content": [IMAGE, text(3)]}], "to have a text, got 3"),
    ([{"role": "user", "content": [{**IMAGE, "alt": "a dog"}]}], "messages[0].content[0].alt is not supported"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,", "size": 3}}]}], ".size is not"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"detail": "ultra"}}]}], "detail to be auto"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "expected a picture as data:"),
    ([{"role": "user", "content": None}], "messages[0].content to be a text or a list of parts, got None"),
    ([{"role": "user", "content": []}], "at least one part"),
    ([{"role": "user", "content": "no picture"}], "expected a picture"),
    ([], "expected a message of the role user"),
]


@pytest.mark.parametrize(("messages", "told"), NO_PLACE)
def test_messages_without_a_place_are_refused(messages: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_request(json.dumps({"messages": messages}).encode())
    assert told in str(caught.value)
    assert caught.value.field == "messages"


TURNS = {
    "head": "",
    "system": "{prompt} ",
    "picture": "USER: {image}\n{prompt} ",
    "user": "USER: {prompt} ",
    "assistant": "ASSISTANT: {prompt}</s>",
    "start": "ASSISTANT:",
}
CHATTY = PromptSpec("USER: {image}\n{prompt} ASSISTANT:", "{question}", 4, 1, turns=TURNS)


def test_a_conversation_goes_into_a_prompt_that_has_places_for_it() -> None:
    system, answer = {"role": "developer", "content": "Be brief."}, {"role": "assistant", "content": [text("a dog")]}
    again = {"role": "user", "content": [text("its"), text("colour?")]}
    prompt = read(system, USER, answer, again, spec=CHATTY).prompt
    assert isinstance(prompt, Dialog)
    assert prompt.parts(TURNS) == [
        "Be brief. USER: ",
        "\na photo of ASSISTANT: a dog</s>USER: its colour? ASSISTANT:",
    ]
    later = read({"role": "user", "content": "hello"}, answer, USER, spec=CHATTY).prompt
    assert isinstance(later, Dialog)
    assert later.parts(TURNS) == ["USER: hello ASSISTANT: a dog</s>USER: ", "\na photo of ASSISTANT:"]
    echoed = {**answer, "refusal": None, "annotations": [], "tool_calls": None, "audio": None, "function_call": None}
    assert read(USER, echoed, again, spec=CHATTY) == read(USER, answer, again, spec=CHATTY)
    assert read(USER, spec=CHATTY).prompt == "a photo of"

    silent = PromptSpec(**{**vars(CHATTY), "turns": {kind: TURNS[kind] for kind in TURNS if kind != "system"}})
    assert "no place for a message of the role system" in str(refused(system, USER, answer, again, spec=silent))
    assert "user and assistant in turn, got user, user" in str(refused(again, USER, spec=CHATTY))
    assert "one picture in a conversation, got 2" in str(refused(USER, answer, USER, spec=CHATTY))
    assert "at most one system message" in str(refused(system, system, USER, spec=CHATTY))
    assert "at most one system message" in str(refused(USER, system, USER, spec=CHATTY))


def test_texts_between_pictures_keep_their_places_where_the_prompt_has_them() -> None:
    spec = PromptSpec("{image}{prompt}", "", 0, 1, picture_token="<image>", kind=INTERLEAVED)
    several = {"role": "user", "content": [IMAGE, text("A cat."), IMAGE, text("A"), text("dog"), IMAGE]}
    assert read(several, spec=spec).prompt == "<image>A cat.<image>A dog<image>"
    assert read(several).prompt == "A cat. A dog"
    assert read({"role": "user", "content": [text("A"), IMAGE]}, spec=spec).prompt == "A"
    marked = {"role": "user", "content": [IMAGE, IMAGE, text("<image>A cat."), text("<image>A")]}
    assert read(marked, spec=spec).prompt == "<image>A cat. <image>A"


def test_a_question_is_one_text() -> None:
    assert read(ask=True).ask
    assert "one text (the question)" in str(refused({"role": "user", "content": [IMAGE]}, ask=True))


# Data URLs

CONTENT = bytes(range(256)) + b"\xff"
CODE = base64.b64encode(CONTENT).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{CODE}",
        f"DATA:Image/PNG;BASE64,{CODE}",
        f"data:;base64,{CODE}",
        f"data:image/png;charset=utf-8;base64,{CODE}",
        f'data:image/png;name="a.png";base64,{CODE}',
        f"data:application/octet-stream;base64,{CODE}",
        f"data:image/png ; base64 ,{CODE}",
        f"  data:image/png;base64,{CODE}\n",
        f"data:image/png;base64,{CODE.rstrip('=')}",
        f"data:image/png;base64,{quote(CODE, safe='')}",
        f"data:image/png;base64,{CODE[:40]}\r\n{CODE[40:]}",
        f"data:image/png;base64,{CODE[:40]}%0A%20{CODE[40:]}",
        f"data:image/png;base64,{CODE}#fragment",
        f"data:image/png,{quote(CONTENT, safe='')}",
        f"data:,{quote(CONTENT)}",
    ],
)
def test_every_legal_form_of_a_data_url(url: str) -> None:
    assert picture_bytes(url, "messages") == CONTENT


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://a/b.png", "fetches nothing"),
        ("https://a/data:image/png;base64,AAAA", "fetches nothing"),
        ("file:///etc/passwd", "fetches nothing"),
        ("AAAA", "fetches nothing"),
        ("data:image/png;base64", "expected a picture as data:"),
        ("data:image/png;base64,A", "expected base64"),
        ("data:image/png;base64,AA=A", "expected base64"),
        ("data:image/png;base64,AAA!", "expected base64"),
        ("data:image/png;base64,AA\u00e9A", "expected base64"),
        (None, "expected a picture as data:"),
        (3, "expected a picture as data:"),
        ({"url": 3}, "expected a picture as data:"),
    ],
)
def test_what_is_no_data_url(url: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        picture_bytes(url, "messages")


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert key_table() in page, "run: make docs"
    assert limit_table() in page, "run: make docs"
