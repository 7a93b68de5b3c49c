"""JSON bodies: nesting and size are bounded before any object is built."""

from __future__ import annotations

import json
import re
from typing import Any

from blip2edge.errors import one_line
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.reading import refuse_constant, unique_keys
from blip2edge.runtime.serving.chat_keys import RequestError

_STRUCTURE = re.compile(r'["\[\]{},:]')


def json_object(body: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """A body's JSON object.

    Args:
        body: UTF-8, or another encoding that ``json.loads`` recognizes.
        limits: The deepest nesting, and the largest number of keys and values.

    Raises:
        RequestError: It is none, exceeds a limit, or a key is in it twice.
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
    """Checks nesting and size of a JSON text without parsing it, in one pass that ends at the first excess.

    Each bracket, comma, colon and escaped quote counts as one node. So the time is bounded by ``nodes`` and by the
    search for quotes in long strings, which runs in C.

    Args:
        text: The JSON text; other texts pass, or are refused as well.
        depth: The deepest nesting of lists and objects.
        nodes: The largest number of nodes.

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
    """The index after a string's closing quote, or of the text's end, and how many escaped quotes come before it."""
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
