"""OpenAI's chat format for a captioner: parses requests, and writes completions and chunks.

The keys of a request are in ``chat_keys.py``. A user message contains a picture as a ``data:`` URL (or several, if the
model takes several), and an optional text, which is the prompt. A system message and earlier turns are accepted if the
bundle's prompt has a place for them (``PromptSpec.turns``), else refused. Pictures given as ``http:`` URLs are refused,
so that no client can make the server fetch an address (server-side request forgery).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blip2edge.bundle.prompt_spec import INTERLEAVED, MARKERS, PromptSpec
from blip2edge.errors import shown
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.runtime.captioning.request import ABSTAINED, CaptionResult
from blip2edge.runtime.decoding.generate import Generation
from blip2edge.runtime.decoding.generated import TextTokens
from blip2edge.runtime.serving.chat_keys import (
    RequestError,
    check_chat_keys,
    check_seconds,
    check_type,
    generation_options,
    is_same,
)
from blip2edge.runtime.serving.json_bodies import about, json_object, logprobs_json, picture_bytes, usage
from blip2edge.runtime.text.prompt import Dialog
from blip2edge.runtime.text.tokenizer import Tokenizer

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages that are accepted, each with the role for which the bundle's prompt has a place."""

MESSAGE_KEYS: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "annotations": ([],),
}
"""Keys of a message besides ``role`` and ``content``, each with the values that are accepted because they change
nothing; ``null`` is always accepted."""

DETAILS = (None, "auto", "low", "high", "original")
"""Accepted values of ``detail``; they have no effect: every picture is resized for the vision encoder."""


@dataclass(frozen=True)
class ChatRequest:
    """A parsed request for a chat completion.

    Attributes:
        images: The bytes of the picture files, at least one.
        prompt: The text, or the texts of a conversation; None without text.
        options: Fields of ``GenerationOptions``.
        stream: Whether tokens are sent as they are generated.
        deadline: Seconds for the answer (``deadline_s``); None for the server's default.
        include_usage: Whether the last event of a stream has the numbers of tokens (``usage``).
        ask: Whether the prompt is a question, which is put into the bundle's template for questions.
        names: For each option, the key of the request that set it; for error messages.
        model: Name of the bundle; None for the default.
        logprobs: Whether the answer has the log-probabilities of its tokens.
    """

    images: tuple[bytes, ...]
    prompt: str | Dialog | None
    options: dict[str, Any]
    stream: bool
    deadline: float | None
    include_usage: bool
    ask: bool
    names: dict[str, str]
    model: str | None = None
    logprobs: bool = False


@dataclass(frozen=True)
class Message:
    """A chat message: its role in the prompt, and its pictures (bytes) and texts in their order."""

    role: str
    parts: tuple[str | bytes, ...]

    @property
    def texts(self) -> list[str]:
        """Returns the message's texts that are not empty."""
        return [part for part in self.parts if isinstance(part, str) and part]

    @property
    def text(self) -> str:
        """Returns the message's texts, joined by spaces."""
        return " ".join(self.texts)

    @property
    def pictures(self) -> list[bytes]:
        """Returns the message's pictures."""
        return [part for part in self.parts if isinstance(part, bytes)]


SpecOf = Callable[[str | None], PromptSpec | None]
"""Type of a function that returns a bundle's prompt template, given the value of the key ``model``."""


def read_request(body: bytes, spec: PromptSpec | SpecOf | None = None, limits: Limits = DEFAULT_LIMITS) -> ChatRequest:
    """Parses the JSON body of a request.

    Args:
        body: The request's body.
        spec: The bundle's prompt template, or a function that returns the template for the name of a bundle. None for
            a template that has a place for one user message only.
        limits: Limits of the JSON.

    Raises:
        RequestError: The body is no JSON object, has no picture, or has an unknown key or a value that the server does
            not support.
    """
    values = json_object(body, limits)
    check_chat_keys(values)
    options, names = generation_options(values)
    for name in ("stream", "ask", "logprobs"):
        check_type(name, values.get(name), bool, "true or false")
    if values.get("top_logprobs"):
        if not values.get("logprobs"):
            raise RequestError(
                "expected logprobs to be true with top_logprobs",
                "send both",
                field="top_logprobs",
                code="unsupported_value",
            )
        options["top_logprobs"] = values["top_logprobs"]
    check_seconds(values.get("deadline_s"))
    include_usage = _stream_options(values.get("stream_options"))
    model = values.get("model")
    chosen = spec if spec is None or isinstance(spec, PromptSpec) else spec(model)
    images, prompt = _arranged(_messages(values.get("messages")), chosen)
    ask = bool(values.get("ask"))
    if ask and not (isinstance(prompt, str) and prompt):
        raise RequestError("expected one text (the question) if ask is true", field="messages")
    return ChatRequest(
        images=images,
        prompt=prompt,
        options=options,
        stream=bool(values.get("stream")),
        deadline=values.get("deadline_s"),
        include_usage=include_usage,
        ask=ask,
        names=names,
        model=model,
        logprobs=bool(values.get("logprobs")),
    )


def _stream_options(value: Any) -> bool:
    """Checks the value of ``stream_options``; returns whether a stream ends with the numbers of tokens."""
    check_type("stream_options", value, dict, "an object")
    for name, wanted in sorted((value or {}).items()):
        if name not in ("include_usage", "include_obfuscation"):
            raise RequestError(
                f"there is no key {shown(name)} in stream_options",
                "keys are include_usage and include_obfuscation",
                field=f"stream_options.{name}",
                code="unknown_parameter",
            )
        check_type(f"stream_options.{name}", wanted, bool, "true or false")
        if name == "include_obfuscation" and wanted:
            raise RequestError(
                "stream_options.include_obfuscation is not supported",
                "leave it out",
                field=f"stream_options.{name}",
                code="unsupported_value",
            )
    return bool((value or {}).get("include_usage"))


def _messages(values: Any) -> list[Message]:
    """Reads the messages; leaves out system messages that are empty."""
    if values is None:
        raise _wrong("expected messages, got none", code="missing_required_parameter")
    if not isinstance(values, list) or not all(isinstance(one, dict) for one in values):
        raise _wrong("expected messages to be a list of objects", code="invalid_type")
    read = [_message(one, f"messages[{index}]") for index, one in enumerate(values)]
    return [message for message in read if message.role != "system" or message.text.strip()]


def _message(values: Mapping[str, Any], place: str) -> Message:
    role = values.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"expected {place}.role to be {', '.join(ROLES)}, got {shown(role)}", code="unsupported_value")
    for name in sorted(values.keys() - {"role", "content"}):
        value = values[name]
        if name not in MESSAGE_KEYS:
            raise _wrong(f"there is no key {shown(name)} in {place}", code="unknown_parameter")
        if value is not None and not any(is_same(value, accepted) for accepted in MESSAGE_KEYS[name]):
            raise _wrong(
                f"{place}.{name} is not supported: the prompt has no place for it", code="unsupported_parameter"
            )
    content = values.get("content")
    if isinstance(content, str):
        return Message(ROLES[role], (content,))
    if not isinstance(content, list):
        raise _wrong(f"expected {place}.content to be a text or a list of parts, got {shown(content)}")
    if not content:
        raise _wrong(f"expected {place}.content to have at least one part, got none")
    parts = [_part(part, ROLES[role], f"{place}.content[{index}]") for index, part in enumerate(content)]
    return Message(ROLES[role], tuple(parts))


def _part(part: Any, role: str, place: str) -> str | bytes:
    kind = part.get("type") if isinstance(part, dict) else None
    kinds = ("text", "image_url") if role == "user" else ("text",)
    if not isinstance(kind, str) or kind not in kinds:
        raise _wrong(
            f"expected {place} to be of the type {' or '.join(kinds)}, got {shown(kind)}", code="unsupported_value"
        )
    _only(part, ("type", kind), place)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise _wrong(f"expected {place}, of the type text, to have a text, got {shown(part.get('text'))}")
        return str(part["text"])
    image = part.get("image_url")
    if not isinstance(image, dict):
        return picture_bytes(image, "messages")
    _only(image, ("url", "detail"), f"{place}.image_url")
    if image.get("detail") not in DETAILS:
        raise _wrong(f"expected detail to be {', '.join(map(str, DETAILS[1:]))}, got {shown(image['detail'])}")
    return picture_bytes(image.get("url"), "messages")


def _only(values: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    """Raises RequestError if an object has an unknown key whose value is not null."""
    for name in sorted(values.keys() - set(known)):
        if values[name] is not None:
            raise _wrong(f"{place}.{name} is not supported", "leave it out", code="unsupported_parameter")


def _wrong(problem: str, fix: str | None = None, code: str = "invalid_value") -> RequestError:
    return RequestError(problem, fix, field="messages", code=code)


def _arranged(messages: list[Message], spec: PromptSpec | None) -> tuple[tuple[bytes, ...], str | Dialog | None]:
    """Returns the pictures and the prompt of a request.

    Raises RequestError if there is no picture, or if the bundle's prompt template has no place for the messages.
    """
    roles = [message.role for message in messages]
    if "user" not in roles:
        raise _wrong("expected a message of the role user, got none")
    if roles[-1] != "user":
        raise _wrong(
            f"expected the last message to be of the role user, got {roles[-1]}",
            "end with a message of the role user: the model cannot continue an answer",
            code="unsupported_value",
        )
    pictures = tuple(picture for message in messages for picture in message.pictures)
    if not pictures:
        raise _wrong("expected a picture, an image_url of the form data:image/...;base64,...", code="missing_picture")
    if len(messages) == 1:
        return pictures, _in_order(messages[0], spec) or None
    turns = {} if spec is None else spec.turns
    _check_places(roles, turns)
    if len(pictures) > 1:
        raise _wrong(f"expected one picture in a conversation, got {len(pictures)}", code="unsupported_value")
    pieces = ["picture" if message.pictures else message.role for message in messages]
    return pictures, Dialog(tuple(zip(pieces, (message.text for message in messages), strict=True)))


def _check_places(roles: list[str], turns: Mapping[str, str]) -> None:
    """Raises RequestError if the bundle's prompt template (``turns``) has no place for one of the messages."""
    if "system" in roles and "system" not in turns:
        raise _wrong(
            "this bundle's prompt has no place for a message of the role system or developer",
            "write its text into the user's message, beside the picture",
            code="unsupported_value",
        )
    if len(roles) - roles.count("system") > 1 and "assistant" not in turns:
        raise _wrong(
            f"this bundle's prompt has a place for one message of the role user, got {', '.join(roles)}",
            "write one text, beside the picture",
            code="unsupported_value",
        )
    first = roles.count("system") if roles[0] == "system" else 0
    expected = ["system"] * min(first, 1) + [("user", "assistant")[at % 2] for at in range(len(roles) - first)]
    if roles != expected:
        raise _wrong(
            f"expected at most one system message, and then user and assistant in turn, got {', '.join(roles)}",
            code="unsupported_value",
        )


def _in_order(message: Message, spec: PromptSpec | None) -> str:
    """Returns the prompt from a request with a single message.

    If the bundle's prompt is interleaved, a marker stands for each picture, so that texts keep their places.
    """
    texts = message.texts
    marked = any(marker in text for marker in MARKERS for text in texts)
    if spec is None or spec.kind != INTERLEAVED or len(texts) < 2 or marked:
        return message.text
    written = ""
    for part in message.parts:
        if isinstance(part, bytes):
            written += MARKERS[1]
        else:
            written += part if not written or written.endswith(MARKERS[1]) else f" {part}"
    return written


_REASONS = {"eos": "stop", "stop": "stop", "length": "length", ABSTAINED: "stop"}


@dataclass(frozen=True)
class Answer:
    """Makes the JSON objects of an answer: a complete answer, or the chunks of a stream.

    Attributes:
        id: Id of the answer.
        created: Unix time in seconds.
        model: Name of the bundle.
        include_usage: Whether chunks have the key ``usage``: the numbers of tokens in the last chunk, null in others.
        tokens: Finds the tokens of each piece of text; None if the request asks for no log-probabilities.
    """

    id: str
    created: int
    model: str
    include_usage: bool = False
    tokens: TextTokens | None = None

    def completion(self, result: CaptionResult) -> dict[str, Any]:
        """Makes a complete answer: OpenAI's keys, ``timings_ms`` and the keys of :func:`about`."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": self._logprobs(result, result.text),
            "finish_reason": _REASONS[result.finish_reason],
        }
        return {
            **self._object("chat.completion", [choice]),
            "usage": usage(result),
            "timings_ms": result.timings_ms,
            **about(result),
        }

    @classmethod
    def to(cls, wanted: ChatRequest, model: str, tokenizer: Tokenizer) -> Answer:
        """Returns a new :class:`Answer` for a request to the bundle ``model``."""
        tokens = TextTokens(tokenizer) if wanted.logprobs else None
        return cls(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model, wanted.include_usage, tokens)

    def chunk(self, piece: str, row: Generation | None = None, *, role: bool = False) -> dict[str, Any]:
        """Makes a chunk with a piece of the answer.

        Args:
            piece: The text.
            row: The text while it is generated, with its tokens; None if tokens are sent only at the end.
            role: Whether this is the first chunk, which has the role and no text.
        """
        logprobs = None
        if self.tokens is not None and not role:
            known = ([], [], []) if row is None else (row.generated, row.token_logprobs, row.likeliest)
            logprobs = logprobs_json(self.tokens.take(*known, piece))
        delta = {**({"role": "assistant"} if role else {}), "content": piece}
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._chunk([choice], None)

    def last_chunk(self, result: CaptionResult) -> dict[str, Any]:
        """Makes the chunk after all text: finish reason, keys of :func:`about`, and ``logprobs`` of the last tokens."""
        reason = _REASONS[result.finish_reason]
        choice = {"index": 0, "delta": {}, "logprobs": self._logprobs(result, ""), "finish_reason": reason}
        return {**self._chunk([choice], None), **about(result)}

    def _logprobs(self, result: CaptionResult, piece: str) -> dict[str, Any] | None:
        """Returns the ``logprobs`` object of the last piece; None if the request asks for no log-probabilities."""
        if self.tokens is None:
            return None
        ids = result.tokens[len(result.tokens) - result.new_tokens :]
        return logprobs_json(self.tokens.rest(ids, result.token_logprobs, result.likeliest, piece))

    def usage_chunk(self, result: CaptionResult) -> dict[str, Any]:
        """Makes the chunk with the numbers of tokens and ``timings_ms``, which comes after all other chunks."""
        return {**self._chunk([], usage(result)), "timings_ms": result.timings_ms}

    def _chunk(self, choices: list[dict[str, Any]], counts: dict[str, int] | None) -> dict[str, Any]:
        whole = self._object("chat.completion.chunk", choices)
        return {**whole, "usage": counts} if self.include_usage else whole

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
