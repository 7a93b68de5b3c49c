"""Parses JSON bodies whose size is limited, and the pictures in them (data URLs); makes JSON objects for answers."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from blip2edge.errors import one_line, shown
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.reading import refuse_constant, unique_keys
from blip2edge.runtime.captioning.request import ABSTAINED, DIGITS, CaptionResult
from blip2edge.runtime.decoding.generated import TextToken
from blip2edge.runtime.serving.chat_keys import RequestError

_WHITE = re.compile(r"[\t\n\f\r ]+")
_STRUCTURE = re.compile(r'["\[\]{},:]')


def json_object(body: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Parses a body as a JSON object.

    Args:
        body: The body, in UTF-8 or another encoding that ``json.loads`` recognizes.
        limits: Limits of the nesting, and of the number of keys and values.

    Raises:
        RequestError: The body is no JSON object, exceeds a limit, or contains a key twice.
    """
    try:
        text = body.decode(json.detect_encoding(body))
        check_structure(text, limits.json_depth, limits.json_nodes)
        values = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise RequestError(
            f"expected a JSON object, got what cannot be parsed ({one_line(error)})", code="invalid_json"
        ) from error
    if not isinstance(values, dict):
        raise RequestError(f"expected a JSON object, got {type(values).__name__}", code="invalid_json")
    return values


def check_structure(text: str, depth: int, nodes: int) -> None:
    """Checks nesting and size of a JSON text without parsing it; ends as soon as a limit is exceeded.

    Each bracket, comma, colon, quote and escaped quote counts as one node, so that ``nodes`` also limits the time.

    Args:
        text: The JSON text, which need not be valid.
        depth: The deepest allowed nesting of lists and objects.
        nodes: The largest allowed number of nodes.

    Raises:
        RequestError: The text is nested deeper, or has more nodes.
    """
    at = level = count = 0
    while (found := _STRUCTURE.search(text, at)) is not None:
        at, sign = found.end(), found[0]
        count += 1
        if sign == '"':
            at, escaped = _string_end(text, at, nodes)
            count += escaped
        elif sign in "[{":
            level += 1
        elif sign in "]}":
            level -= 1
        if level > depth:
            raise RequestError(f"expected JSON of at most {depth} levels, got more", code="invalid_json")
        if count > nodes:
            raise RequestError(f"expected JSON of at most {nodes} keys and values, got more", code="invalid_json")


def _string_end(text: str, start: int, most: int) -> tuple[int, int]:
    """Finds the end of a JSON string that begins at ``start``; stops after ``most`` escaped quotes.

    Returns:
        The index after the closing quote (the text's length if there is none), and the number of escaped quotes.
    """
    at, escaped = start, 0
    while escaped <= most:
        quote = text.find('"', at)
        if quote < 0:
            return len(text), escaped
        before = text[at:quote]
        if (len(before) - len(before.rstrip("\\"))) % 2 == 0:
            return quote + 1, escaped
        at, escaped = quote + 1, escaped + 1
    return len(text), escaped


def picture_bytes(url: Any, field: str) -> bytes:
    """Decodes the file in a data URL (RFC 2397), as browsers do (https://fetch.spec.whatwg.org/#data-urls).

    ``data`` and ``base64`` may be in upper case. Media type and parameters are ignored, and may be missing. The data
    may be percent-encoded. Base64 may contain white space, and may lack its padding.

    Args:
        url: The URL.
        field: The request's key, for errors.

    Raises:
        RequestError: The URL is no data URL, or its base64 is broken.
    """
    text = url.strip() if isinstance(url, str) else ""
    head, comma, data = text.partition(",")
    if not comma or head[:5].lower() != "data:":
        raise RequestError(
            f"expected a picture as data:image/...;base64,..., got {shown(url)}",
            "send the picture itself; this server fetches nothing",
            field=field,
            code="invalid_image_url",
        )
    content = unquote_to_bytes(data.partition("#")[0])
    if head.rpartition(";")[2].strip().lower() != "base64":
        return content
    compact = _WHITE.sub("", content.decode("latin-1"))
    if not compact.endswith("="):
        compact += "=" * (-len(compact) % 4)
    try:
        return base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"expected base64 after {shown(head)}, got something else ({error})",
            field=field,
            code="invalid_base64",
        ) from error


def usage(result: CaptionResult) -> dict[str, int]:
    """Returns OpenAI's ``usage`` object with the numbers of tokens; visual tokens count as prompt tokens.

    The decoder's start token is not counted.
    """
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.new_tokens,
        "total_tokens": result.prompt_tokens + result.new_tokens,
    }


def about(result: CaptionResult) -> dict[str, Any]:
    """Returns the keys ``logprob``, ``confidence`` and ``abstained`` of an answer.

    ``abstained`` is true if the text is empty because its confidence is too low.
    """
    return {
        "logprob": round(result.logprob, DIGITS),
        "confidence": result.confidence,
        "abstained": result.finish_reason == ABSTAINED,
    }


def logprobs_json(tokens: Sequence[TextToken]) -> dict[str, Any]:
    """Makes OpenAI's ``logprobs`` object for the tokens of an answer."""

    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": round(logprob, DIGITS), "bytes": list(text.encode("utf-8", "replace"))}

    content = [
        {**one(token.text, token.logprob), "top_logprobs": [one(*other) for other in token.likeliest]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}
