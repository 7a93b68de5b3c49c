"""Reads pictures in requests: data URLs, and the three body formats of ``POST /caption``, ``/ask`` and ``/match``.

- The body is a picture file; options are in the query.
- ``multipart/form-data``: files named ``file`` or ``image``; options are fields of the form, or in the query.
- ``application/json``: ``image`` is a data URL, or a list of them; options are keys.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, Headers, QueryParams, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from blip2edge.errors import shown
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.runtime.serving.chat_keys import FORM_OPTIONS, RequestError, check_seconds, check_type
from blip2edge.runtime.serving.json_bodies import check_structure, json_object, picture_bytes

JSON_TYPE, FORM_TYPE = "application/json", "multipart/form-data"
FILE_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Content types, besides ``image/*``, of a body that is a picture file; curl's ``--data-binary`` sends the last."""

PICTURES = ("file", "image")
"""Names that the files in a multipart form may have."""

TEXT_OPTIONS = ("prompt", "question", "text", "model", "draft", "stop")
"""Options whose values in a query or form are texts; the values of all other options are parsed as JSON."""

SEND = "curl --data-binary @dog.jpg URL, or curl -F file=@dog.jpg URL"

_TEXT = re.compile(rb"(?!P[1-7]\s|#define|/\* XPM)[\t\n\r -~]+")
"""Matches the beginning of a body that is a text and no picture; some picture formats are texts too."""


def media_type(headers: Headers) -> str:
    """Returns a body's content type in lower case, without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True)
class CaptionRequest:
    """A request of ``POST /caption`` or ``/ask``.

    Attributes:
        pictures: The bytes of the picture files, at least one.
        text: The prompt or the question; None if it is missing or empty.
        options: Fields of ``GenerationOptions``.
        deadline: Seconds for the answer (``deadline_s``); None for the server's default.
        model: Name of the bundle; None for the default.
    """

    pictures: tuple[bytes, ...]
    text: str | None
    options: dict[str, Any]
    deadline: float | None
    model: str | None = None


@dataclass(frozen=True)
class MatchRequest:
    """A request of ``POST /match``.

    Attributes:
        pictures: The bytes of the picture files, at least one.
        texts: Texts to compare with the pictures, at least one.
        deadline: Seconds for the answer (``deadline_s``); None for the server's default.
        model: Name of the bundle; None for the default.
    """

    pictures: tuple[bytes, ...]
    texts: tuple[str, ...]
    deadline: float | None
    model: str | None


def read_caption_request(
    body: bytes, headers: Headers, query: QueryParams, text: str, limits: Limits = DEFAULT_LIMITS
) -> CaptionRequest:
    """Reads a request in one of the three body formats; call it in a thread that runs no event loop.

    Args:
        body: The body.
        headers: Headers of the request.
        query: Query of the URL.
        text: Name of the key for the text: ``prompt`` or ``question``.
        limits: Limits of a JSON body.

    Raises:
        RequestError: The content type is not supported, there is no picture, or an option is unknown or given twice.
    """
    pictures, options = _read(body, headers, query, (text, *FORM_OPTIONS, "deadline_s", "model"), "stop", limits)
    prompt, deadline, model = (options.pop(name, None) for name in (text, "deadline_s", "model"))
    check_type(text, prompt, str, "a text")
    return CaptionRequest(pictures, prompt or None, options, deadline, model)


def read_match_request(
    body: bytes, headers: Headers, query: QueryParams, limits: Limits = DEFAULT_LIMITS
) -> MatchRequest:
    """Reads a request of ``/match`` in one of the three body formats; the option ``text`` may be given several times.

    Raises:
        RequestError: As in :func:`read_caption_request`; or there is no text.
    """
    pictures, options = _read(body, headers, query, ("text", "deadline_s", "model"), "text", limits)
    texts: list[Any] = options.get("text", [])
    if not texts:
        raise RequestError(
            "expected a text, got none", "send one or several", field="text", code="missing_required_parameter"
        )
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(
                f"expected text to be a text or a list of texts, got {shown(text)}", field="text", code="invalid_type"
            )
    return MatchRequest(pictures, tuple(texts), options.get("deadline_s"), options.get("model"))


def _read(
    body: bytes, headers: Headers, query: QueryParams, known: tuple[str, ...], several: str, limits: Limits
) -> tuple[tuple[bytes, ...], dict[str, Any]]:
    """Returns the pictures and the options of a request.

    ``known``: names of the allowed options; ``several``: the option that may be given several times.
    """
    kind = media_type(headers)
    given = [(name, _value(name, value)) for name, value in query.multi_items()]
    pictures: list[bytes] = []
    if kind == FORM_TYPE:
        asyncio.run(_read_form(body, headers, pictures, given))
    elif kind == JSON_TYPE:
        values = json_object(body, limits)
        urls = values.pop("image", None)
        pictures += [picture_bytes(url, "image") for url in (urls if isinstance(urls, list) else [urls])]
        given += values.items()
    elif kind in FILE_TYPES or kind.startswith("image/"):
        if _TEXT.fullmatch(body[:256]):
            raise RequestError(
                "expected a picture file, got a text",
                f"send a picture: {SEND}; a form needs the type {FORM_TYPE}, and JSON {JSON_TYPE}",
                code="invalid_image",
            )
        pictures += [body] if body else []
    else:
        raise RequestError(
            f"expected a body of the type image/*, {FORM_TYPE} or {JSON_TYPE}, got {shown(kind)}",
            f"send a picture: {SEND}",
            code="unsupported_media_type",
            status=415,
        )
    options = _unique(given, known, several)
    if not pictures:
        raise RequestError(
            "expected a picture, got none",
            f"send one: {SEND}",
            code="missing_picture",
        )
    check_type("model", options.get("model"), str, "a text")
    check_seconds(options.get("deadline_s"))
    return tuple(pictures), options


class _FormParser(MultiPartParser):
    """Parses a multipart form in memory; raises an error if the end of the form is missing."""

    spool_max_size = 1 << 40  # never to a file
    ended = False

    def on_end(self) -> None:
        self.ended = True

    async def parse(self) -> FormData:
        try:
            form = await super().parse()
            if not self.ended:
                raise MultiPartException("the last boundary is missing")
        except BaseException:  # starlette closes the files after its own errors only
            for file in self._files_to_close_on_error:
                file.close()
            raise
        return form


async def _read_form(body: bytes, headers: Headers, pictures: list[bytes], given: list[tuple[str, Any]]) -> None:
    """Reads a multipart form: adds its files to ``pictures`` and its fields to ``given``."""

    async def content() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await _FormParser(headers, content()).parse()
    except MultiPartException as error:
        raise RequestError(
            f"the body is no form of the type {FORM_TYPE} ({error.message})",
            "send the picture as a file of a form: curl -F file=@dog.jpg URL",
            code="invalid_form",
        ) from error
    try:
        for name, value in form.multi_items():
            if name in PICTURES:
                pictures.append(await value.read() if isinstance(value, UploadFile) else _written_picture(value, name))
            elif isinstance(value, UploadFile):
                raise RequestError(
                    f"expected files of the name {' or '.join(PICTURES)} in the form, got a file {shown(name)}",
                    "send the picture as: curl -F file=@dog.jpg URL",
                    field=name,
                )
            else:
                given.append((name, _value(name, value)))
    finally:
        await form.close()


def _written_picture(text: str, name: str) -> bytes:
    """Decodes a picture that a form sends as text instead of a file; the text must be a data URL."""
    if text.lstrip()[:5].lower() != "data:":
        raise RequestError(
            f"expected {name} to be a file or a data URL, got the text {shown(text)}",
            f"send a file, with an @: curl -F {name}=@dog.jpg URL",
            field=name,
        )
    return picture_bytes(text, name)


def _value(name: str, text: str) -> Any:
    """Converts the text of an option in a query or form to its value: JSON is parsed, other text stays text.

    Empty text becomes None.
    """
    if not text:
        return None
    if name in TEXT_OPTIONS:
        return text
    try:
        check_structure(text, depth=2, nodes=200)
        return json.loads(text)
    except (ValueError, RequestError):
        return text


def _unique(given: list[tuple[str, Any]], known: tuple[str, ...], several: str) -> dict[str, Any]:
    """Checks the options; returns their values by name, and a list of all values for the option ``several``."""
    options: dict[str, Any] = {}
    for name, value in given:
        if name not in known:
            raise RequestError(
                f"there is no parameter {shown(name)}",
                f"parameters are {', '.join(known)}",
                field=name,
                code="unknown_parameter",
            )
        if value is None:
            continue
        if name == several:
            options.setdefault(name, []).extend(value if isinstance(value, list) else [value])
        elif name in options:
            raise RequestError(f"expected {name} once, got it twice", "give it once", field=name)
        else:
            options[name] = value
    return options
