"""Lists the JSON keys of a chat request, and the HTTP status of each error.

If the server cannot do what a value asks for, the request is refused with the name of the key; a value that changes
nothing is accepted. ``null`` is the default of every key. The keys of OpenAI's schema are those of
``openai.types.chat.CompletionCreateParams``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blip2edge.errors import (
    Blip2EdgeError,
    DeadlineError,
    EngineFaultError,
    ImageError,
    OverloadError,
    PromptError,
    UsageError,
    python_option,
    shown,
)
from blip2edge.runtime.decoding.options import GenerationOptions


class RequestError(UsageError):
    """A request that is refused.

    Args:
        problem: What was expected and what was found.
        fix: What the client can do; None if unknown.
        field: The wrong key of the request; None if no key is wrong.
        code: ``error.code`` of the answer.
        status: HTTP status of the answer.
    """

    def __init__(
        self,
        problem: str,
        fix: str | None = None,
        *,
        field: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
    ) -> None:
        super().__init__(problem, fix, field=field)
        self.code, self.status = code, status


ERRORS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (EngineFaultError, 503, "server_error", "engine_restarting"),
    (OverloadError, 503, "server_error", "overloaded"),
    (DeadlineError, 504, "server_error", "deadline_exceeded"),
    (UsageError, 400, "invalid_request_error", "invalid_value"),
    (ImageError, 400, "invalid_request_error", "invalid_image"),
    (PromptError, 400, "invalid_request_error", "invalid_prompt"),
    (Exception, 500, "server_error", "internal_error"),
)
"""For each class of errors, HTTP status, ``type`` and ``code`` of the answer. The first class that matches counts;
a :class:`RequestError` has its own status and code."""


def classified(error: Exception) -> tuple[int, str, str]:
    """Returns HTTP status, ``type`` and ``code`` of an error."""
    status, kind, code = next(row[1:] for row in ERRORS if isinstance(error, row[0]))
    if isinstance(error, RequestError):
        return error.status, "server_error" if error.status >= 500 else kind, error.code
    return status, kind, code


def error_json(error: Blip2EdgeError, names: Mapping[str, str] = {}) -> dict[str, Any]:
    """Makes the JSON object of an error.

    Args:
        error: The error; its text names options by their Python names.
        names: The request's keys by the Python names of the options, where both differ.
    """
    _, kind, code = classified(error)
    return {
        "error": {
            "message": error.text(lambda name, on: python_option(names.get(name, name), on)),
            "type": kind,
            "param": names.get(error.field or "", error.field),
            "code": code,
        }
    }


ANY_TEXT = object()
"""Placeholder in :attr:`ChatKey.values` that means: any text is accepted."""


@dataclass(frozen=True)
class ChatKey:
    """A key of a chat request.

    Attributes:
        name: The key.
        meaning: Description for the table in ``docs/serving.md``.
        option: The field of ``GenerationOptions`` that the key sets; empty if it sets no field.
        values: The values that are accepted because they change nothing, or :data:`ANY_TEXT`. Empty for a key whose
            value the server uses (``option`` is set, or ``is_read``), and for a key that is always refused.
        is_read: Whether the server uses the value in another way than as a generation option.
        own: Whether the key is not in OpenAI's schema.
    """

    name: str
    meaning: str
    option: str = ""
    values: tuple[Any, ...] = field(default=())
    is_read: bool = False
    own: bool = False

    @property
    def effect(self) -> str:
        """Returns what the server does with the key, for the docs: ``honored``, ``accepted: VALUES`` or ``refused``."""
        if self.option or self.is_read:
            return "honored"
        if ANY_TEXT in self.values:
            return "accepted: any text"
        return f"accepted: {', '.join(f'`{json.dumps(value)}`' for value in self.values)}" if self.values else "refused"


KEYS: tuple[ChatKey, ...] = (
    ChatKey("messages", "the picture and the texts, see below", is_read=True),
    ChatKey("model", "the bundle that answers; a server of one bundle accepts any text", is_read=True),
    ChatKey("max_completion_tokens", "length of the answer in tokens, the end token included", "max_new_tokens"),
    ChatKey(
        "max_tokens", "older name of `max_completion_tokens`; if both are sent, they must be equal", "max_new_tokens"
    ),
    ChatKey("temperature", "from 0 (greedy) to 1000; the default is greedy decoding, not 1", "temperature"),
    ChatKey("top_p", "from 0 to 1; 1 keeps all tokens and changes nothing", "top_p"),
    ChatKey("seed", "the same request with the same seed gets the same text; may be negative", "seed"),
    ChatKey("stop", "a text or up to 64 texts that end the answer, besides those of the bundle's template", "stop"),
    ChatKey("stream", "server-sent events; beam search sends its text at the end, in one piece", is_read=True),
    ChatKey(
        "stream_options",
        "`include_usage`: a last chunk with `usage`; `include_obfuscation` may be false",
        is_read=True,
    ),
    ChatKey("n", "one answer", values=(1,)),
    ChatKey("logprobs", "log-probability of each token of the answer, before penalties and temperature", is_read=True),
    ChatKey(
        "top_logprobs", "with `logprobs`: the 0 to 20 likeliest tokens at each position; no beam search", is_read=True
    ),
    ChatKey("logit_bias", "", values=({},)),
    ChatKey("frequency_penalty", "use `repetition_penalty`", values=(0,)),
    ChatKey("presence_penalty", "use `repetition_penalty`", values=(0,)),
    ChatKey("response_format", "plain text", values=({"type": "text"},)),
    ChatKey("modalities", "plain text", values=(["text"],)),
    ChatKey("tools", "", values=([],)),
    ChatKey("tool_choice", "without tools nothing is called", values=("none", "auto")),
    ChatKey("parallel_tool_calls", "without tools nothing is called", values=(True, False)),
    ChatKey("functions", "", values=([],)),
    ChatKey("function_call", "without functions nothing is called", values=("none", "auto")),
    ChatKey("reasoning_effort", "", values=("none",)),
    ChatKey("verbosity", "", values=("medium",)),
    ChatKey("store", "nothing is stored", values=(False,)),
    ChatKey("metadata", "nothing is stored", values=({},)),
    ChatKey("service_tier", "", values=("auto", "default")),
    ChatKey("user", "not used", values=(ANY_TEXT,)),
    ChatKey("safety_identifier", "not used", values=(ANY_TEXT,)),
    ChatKey("prompt_cache_key", "not used", values=(ANY_TEXT,)),
    ChatKey("prompt_cache_retention", "", values=("in_memory",)),
    ChatKey(
        "prompt_cache_options",
        "",
        values=({}, {"mode": "implicit"}, {"ttl": "30m"}, {"mode": "implicit", "ttl": "30m"}),
    ),
    ChatKey("audio", ""),
    ChatKey("moderation", ""),
    ChatKey("prediction", ""),
    ChatKey("web_search_options", ""),
    ChatKey("max_new_tokens", "the same as `max_completion_tokens`", "max_new_tokens", own=True),
    ChatKey("min_new_tokens", "no end token before this many tokens", "min_new_tokens", own=True),
    ChatKey("num_beams", "beam search with 1 to 8 beams", "num_beams", own=True),
    ChatKey("length_penalty", "beam scores are divided by length to this power", "length_penalty", own=True),
    ChatKey("repetition_penalty", "above 1: fewer repetitions", "repetition_penalty", own=True),
    ChatKey("top_k", "sample from this many tokens; 0: from all", "top_k", own=True),
    ChatKey(
        "abstain_below",
        "no text if its confidence is lower (0 to 1; 0: never); the bundle needs a confidence",
        "abstain_below",
        own=True,
    ),
    ChatKey("draft", "draft model of speculative decoding; the text stays the same", "draft", own=True),
    ChatKey("queries", "visual tokens per picture, for an elastic bundle; default: all", "queries", own=True),
    ChatKey("ask", "true: the text is a question for the bundle's question template", is_read=True, own=True),
    ChatKey("deadline_s", "time limit in seconds; a later answer is an error with status 504", is_read=True, own=True),
)
"""All keys: first those of OpenAI's schema, then those that only this server has."""

NAMES = {**{key.option: key.name for key in reversed(KEYS) if key.option}, "deadline": "deadline_s"}
"""For each option of the library, the key of the request that an error message names."""

MIN_SEED = -(2**63)
"""OpenAI's smallest seed. A negative seed is taken modulo 2^64, because the library's seeds begin at 0."""


def is_same(value: Any, other: Any) -> bool:
    """Returns whether two JSON values are equal; a boolean never equals a number."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


EMBEDDING_KEYS: tuple[ChatKey, ...] = (
    ChatKey(
        "input",
        'a text, or a list of texts and of objects `{"text": TEXT}` and `{"image": DATA_URL}`; no token ids',
        is_read=True,
    ),
    ChatKey("model", "the bundle that answers; a server of one bundle accepts any text", is_read=True),
    ChatKey("encoding_format", "`float`, or `base64` of float32 values, little-endian", is_read=True),
    ChatKey("dimensions", "the vectors have the size that the model gives"),
    ChatKey("user", "not used", values=(ANY_TEXT,)),
    ChatKey(
        "return_multivector",
        "true: `embeddings`, a list of vectors, in place of `embedding`; required for pictures of BLIP-2, which have "
        "one vector for each query",
        is_read=True,
        own=True,
    ),
    ChatKey("deadline_s", "time limit in seconds; a later answer is an error with status 504", is_read=True, own=True),
)
"""The keys of ``POST /v1/embeddings``; OpenAI's keys are the fields of ``openai.types.EmbeddingCreateParams``."""


def check_chat_keys(values: Mapping[str, Any], keys: Sequence[ChatKey] = KEYS) -> None:
    """Checks that all keys of a request are known, and that values which the server does not use change nothing.

    Args:
        values: The request, a JSON object.
        keys: The keys of the route.

    Raises:
        RequestError: A key is unknown, a value asks for something that the server cannot do, or ``model`` is no text.
    """
    by_name = {key.name: key for key in keys}
    check_type("model", values.get("model"), str, "a text")
    for name in sorted(values):
        key, value = by_name.get(name), values[name]
        if key is None:
            known = ", ".join(key.name for key in keys if key.option or key.is_read)
            raise RequestError(
                f"there is no key {shown(name)}", f"keys are {known}", field=name, code="unknown_parameter"
            )
        if value is None or key.option or key.is_read:
            continue
        if ANY_TEXT in key.values:
            check_type(name, value, str, "a text")
        elif not any(is_same(value, accepted) for accepted in key.values):
            if not key.values:
                raise RequestError(f"{name} is not supported", "leave it out", field=name, code="unsupported_parameter")
            accepted = " or ".join(map(json.dumps, key.values))
            raise RequestError(
                f"expected {name} to be {accepted}, got {shown(value)}",
                "leave it out: nothing else is supported",
                field=name,
                code="unsupported_value",
            )


def check_type(name: str, value: Any, kind: type, expected: str) -> None:
    """Raises RequestError unless a value is None or has the type ``kind``."""
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"expected {name} to be {expected}, got {shown(value)}", field=name, code="invalid_type")


def check_seconds(value: Any) -> None:
    """Raises RequestError unless ``deadline_s`` is None or a number; the scheduler checks the range."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise RequestError(
            f"expected deadline_s to be a number of seconds, got {shown(value)}",
            field="deadline_s",
            code="invalid_type",
        )


def generation_options(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the generation options that a request sets.

    Returns:
        Fields of ``GenerationOptions``, whose ranges are not checked yet; and for each field the request's key.

    Raises:
        RequestError: Two keys set an option to different values.
    """
    options: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key in KEYS:
        value = values.get(key.name)
        if not key.option or value is None or (key.option == "top_p" and is_same(value, 1)):
            continue
        first = names.setdefault(key.option, key.name)
        if not is_same(options.setdefault(key.option, value), value):
            raise RequestError(
                f"expected {first} and {key.name} to be equal, got {shown(values[first])} and {shown(value)}",
                "give one of the two",
                field=key.name,
            )
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    seed = options.get("seed")
    if isinstance(seed, int) and not isinstance(seed, bool) and MIN_SEED <= seed < 0:
        options["seed"] = seed % 2**64
    return options, {**NAMES, **names}


FORM_OPTIONS = tuple(
    name for name in GenerationOptions.__dataclass_fields__ if name in {key.option for key in KEYS if key.option}
)
"""Generation options that ``POST /caption`` and ``/ask`` accept, by their Python names."""


def key_table(keys: Sequence[ChatKey] = KEYS) -> str:
    """Makes the Markdown table of the JSON keys of a request, for ``docs/serving.md``."""
    rows = ["| key | | meaning |", "|---|---|---|"]
    rows += [f"| `{key.name}`{' (own)' if key.own else ''} | {key.effect} | {key.meaning} |" for key in keys]
    return "\n".join(rows) + "\n"
