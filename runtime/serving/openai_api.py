"""OpenAI's chat format for a captioner: parses requests, and writes completions and chunks.

The last user message holds one picture (or several, where the model takes several) as ``data:`` URLs and an optional
text, which is the prompt. Pictures given as ``http:`` URLs are refused, so that no client can make the server fetch an
address (server-side request forgery).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blip2edge.errors import UsageError
from blip2edge.runtime.captioning.request import CaptionResult
from blip2edge.runtime.decoding.options import shown

OPTIONS: dict[str, str] = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "top_k": "top_k",
}
"""A request's keys, and the fields of ``GenerationOptions`` that they set: OpenAI's first, then our own."""

NAMES = {**{field: key for key, field in reversed(OPTIONS.items())}, "deadline": "deadline_s"}
"""The key that an error names for each of the library's options, such as ``max_tokens`` for ``max_new_tokens``."""

ONLY: dict[str, Any] = {"n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0}
"""Keys of OpenAI's schema that are accepted with this value alone."""

MAX_REQUEST_BEAMS = 8
"""Limit of beams per request: every beam has its own KV cache."""

IGNORED = ("messages", "model", "stream", "user", "stream_options", "deadline_s")


@dataclass(frozen=True)
class ChatRequest:
    """A parsed request.

    Attributes:
        images: Files of pictures, at least one.
        prompt: The text; None for none.
        options: Fields of ``GenerationOptions``.
        stream: Whether tokens are sent as they are generated.
        deadline: Seconds for the answer (``deadline_s``); None for the server's default.
    """

    images: tuple[bytes, ...]
    prompt: str | None
    options: dict[str, Any]
    stream: bool
    deadline: float | None


def read_request(body: bytes) -> ChatRequest:
    """Reads a request's JSON.

    Raises:
        UsageError: It is no JSON object, has no picture, or has an unknown key or a wrong value.
    """
    try:
        values = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"expected a JSON object, got what cannot be parsed ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"expected a JSON object, got {type(values).__name__}")
    images, prompt = _content(values.get("messages"))
    stream, deadline = values.get("stream", False), values.get("deadline_s")
    if not isinstance(stream, bool):
        raise UsageError(f"expected stream to be true or false, got {stream!r}", field="stream")
    if deadline is not None and (isinstance(deadline, bool) or not isinstance(deadline, (int, float))):
        raise UsageError(f"expected deadline_s to be a number of seconds, got {deadline!r}", field="deadline_s")
    return ChatRequest(images, prompt, _options(values), stream, deadline)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in values.items():
        if key in IGNORED or value is None:
            continue
        if key in ONLY:
            if value != ONLY[key]:
                raise UsageError(f"expected {key} to be {ONLY[key]!r}, got {value!r}", field=key)
        elif key == "num_beams" and isinstance(value, int) and value > MAX_REQUEST_BEAMS:
            raise UsageError(f"expected num_beams of at most {MAX_REQUEST_BEAMS}, got {shown(value)}", field=key)
        elif key in OPTIONS:
            options[OPTIONS[key]] = (value,) if key == "stop" and isinstance(value, str) else value
        else:
            raise UsageError(f"there is no key {key!r}", f"keys are {', '.join((*OPTIONS, *IGNORED))}", field=key)
    return options


def _content(messages: Any) -> tuple[tuple[bytes, ...], str | None]:
    """The pictures and the text of the last user message."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise UsageError("expected messages to be a list of objects", field="messages")
    users = [one for one in messages if one.get("role") == "user"]
    if not users:
        raise UsageError("expected a message of the role user", field="messages")
    content = users[-1].get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    images: list[bytes] = []
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            images.append(_picture(url.get("url") if isinstance(url, dict) else url))
        else:
            raise UsageError("expected the content's parts to be of the type text or image_url", field="messages")
    if not images:
        raise UsageError("expected a picture, an image_url of the form data:image/...;base64,...", field="messages")
    return tuple(images), " ".join(texts) or None


def _picture(url: Any) -> bytes:
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise UsageError(
            "expected a picture as data:image/...;base64,..., got another kind of URL",
            "send the picture itself; this server fetches nothing",
            field="messages",
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"expected base64 after {head}, got something else ({error})", field="messages") from error


_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


def completion(result: CaptionResult, *, number: int, created: int, model: str) -> dict[str, Any]:
    """A complete answer; ``timings_ms`` is added to OpenAI's keys."""
    return {
        "id": f"caption-{number}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": result.text},
                "finish_reason": _REASONS[result.finish_reason],
            }
        ],
        "usage": {"completion_tokens": len(result.tokens)},
        "timings_ms": result.timings_ms,
    }


def chunk(piece: str, *, number: int, created: int, model: str, reason: str | None = None) -> dict[str, Any]:
    """A piece of an answer; the last one has a finish reason and no text."""
    return {
        "id": f"caption-{number}",
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "delta": {"content": piece} if reason is None else {},
                "finish_reason": None if reason is None else _REASONS[reason],
            }
        ],
    }
