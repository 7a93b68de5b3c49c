"""Lists the routes of the server, and makes the OpenAPI 3.1 document from the list.

The document is made from :data:`ENDPOINTS`, the keys of a chat (``chat_keys.KEYS``), the options of ``/caption``
(``chat_keys.FORM_OPTIONS``), and the fields of a caption's result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blip2edge.bundle.schema import DRAFTS
from blip2edge.limits import Limits
from blip2edge.runtime.captioning.encoder import STAGES
from blip2edge.runtime.captioning.request import ABSTAINED, LONGEST_DEADLINE
from blip2edge.runtime.decoding.options import MAX_SEED, MAX_STOPS, MAX_TEMPERATURE, MAX_TOP_LOGPROBS, PENALTIES
from blip2edge.runtime.serving.access import OPEN
from blip2edge.runtime.serving.chat_keys import ANY_TEXT, EMBEDDING_KEYS, FORM_OPTIONS, KEYS, MIN_SEED, ChatKey
from blip2edge.runtime.serving.models.embeddings_api import MOST_INPUTS
from blip2edge.runtime.serving.picture_forms import FORM_TYPE, JSON_TYPE, PICTURES, TEXT_OPTIONS
from blip2edge.version import __version__

Schema = dict[str, Any]

CHAT, EMBEDDINGS, MATCH = "/v1/chat/completions", "/v1/embeddings", "/match"
TEXT, HTML, EVENTS = "text/plain", "text/html", "text/event-stream"
OPEN_METRICS = "application/openmetrics-text"


@dataclass(frozen=True)
class Endpoint:
    """A route of the server.

    Attributes:
        method: ``GET`` (then ``HEAD`` as well) or ``POST``.
        path: Path of the route in the OpenAPI document.
        name: The ``operationId`` in the document. The method of ``Server`` that answers has this name after a ``_``.
        summary: What the route does.
        answers: For each content type of a successful answer, the name of its schema (empty for any text).
        errors: HTTP statuses of errors, besides :data:`COMMON_ERRORS`.
        body: Kind of the body: ``chat``, ``embeddings`` or ``event``; for a request with pictures, the key of its text
            (``prompt``, ``question`` or ``text``); empty if the request has no body.
    """

    method: str
    path: str
    name: str
    summary: str
    answers: tuple[tuple[str, str], ...] = ((JSON_TYPE, "Object"),)
    errors: tuple[int, ...] = ()
    body: str = ""

    @property
    def route(self) -> str:
        """Returns the path in Starlette's notation."""
        return self.path.replace("{name}", "{name:path}")


BODY_ERRORS = (404, 413, 415, 500, 504)

ENDPOINTS = (
    Endpoint("GET", "/", "page", "A page that captions the pictures of a camera or a file", ((HTML, ""),)),
    Endpoint("GET", "/health", "health", "State and load; 503 while the engine does not work"),
    Endpoint("GET", "/metrics", "metrics", "Metrics for Prometheus", ((TEXT, ""), (OPEN_METRICS, ""))),
    Endpoint("GET", "/openapi.json", "openapi", "This document"),
    Endpoint("GET", "/v1/models", "models", "The bundle, in OpenAI's format", ((JSON_TYPE, "Models"),)),
    Endpoint("GET", "/v1/models/{name}", "model", "The bundle by its name", ((JSON_TYPE, "Model"),), (404,)),
    Endpoint(
        "POST",
        CHAT,
        "chat",
        "OpenAI's chat format, with the picture as a data: URL",
        ((JSON_TYPE, "Completion"), (EVENTS, "")),
        BODY_ERRORS,
        "chat",
    ),
    Endpoint(
        "POST", "/caption", "caption", "The caption of a picture", ((JSON_TYPE, "Caption"),), BODY_ERRORS, "prompt"
    ),
    Endpoint(
        "POST",
        "/ask",
        "ask",
        "The answer to a question about a picture",
        ((JSON_TYPE, "Caption"),),
        BODY_ERRORS,
        "question",
    ),
    Endpoint("GET", "/captions", "recent", "The last captions that were posted", ((JSON_TYPE, "Events"),)),
    Endpoint("POST", "/captions", "post", "Adds a caption of `watch --post`", ((JSON_TYPE, "Event"),), (413,), "event"),
    Endpoint(
        "POST",
        EMBEDDINGS,
        "embeddings",
        "Vectors of texts and pictures, in OpenAI's format",
        ((JSON_TYPE, "Embeddings"),),
        BODY_ERRORS,
        "embeddings",
    ),
    Endpoint(
        "POST", MATCH, "match", "How well pictures and texts match", ((JSON_TYPE, "Matches"),), BODY_ERRORS, "text"
    ),
)

EVENT_KEYS = ("time", "source", "frame", "text")
"""Keys of a caption from ``watch --post`` that the server stores; other keys are ignored."""

ERRORS = {
    400: "The request is wrong; `param` is the key",
    401: "The API key is missing or wrong",
    403: "Pages of this origin may not use the server",
    404: "There is no such path or model",
    405: "The path has no such method",
    408: "The header or the body came too slowly",
    413: "The body is too large",
    415: "The body has another type",
    421: "The server does not have this host name",
    500: "The server failed",
    503: "The queue or the connections are full, or the engine does not work; try again after `Retry-After` seconds",
    504: "The deadline has passed",
}
COMMON_ERRORS = (400, 401, 403, 405, 408, 421, 503)
"""HTTP statuses of errors that every route can return."""

_PATHS = {endpoint.path for endpoint in ENDPOINTS}
_METHODS = {"GET", "HEAD", "POST", "OPTIONS"}


def route_name(method: str, path: str) -> str:
    """Returns the name of a request's route in the metrics: a path of :data:`ENDPOINTS`, or ``other``."""
    if method not in _METHODS:
        return "other"
    if path in _PATHS:
        return path
    return "/v1/models/{name}" if path.startswith("/v1/models/") else "other"


def option_schemas(limits: Limits) -> dict[str, Schema]:
    """Returns the schema of each generation option; the ranges are those of ``GenerationOptions``."""
    penalty: Schema = {"type": "number", "minimum": PENALTIES[0], "maximum": PENALTIES[1]}
    return {
        "max_new_tokens": {"type": "integer", "minimum": 1, "maximum": limits.new_tokens},
        "min_new_tokens": {"type": "integer", "minimum": 0, "maximum": limits.new_tokens},
        "num_beams": {"type": "integer", "minimum": 1, "maximum": limits.beams},
        "length_penalty": {"type": "number", "minimum": -10, "maximum": 10},
        "repetition_penalty": penalty,
        "temperature": {"type": "number", "minimum": 0, "maximum": MAX_TEMPERATURE},
        "top_p": {"type": "number", "minimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
        "stop": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
        "draft": {"enum": list(DRAFTS)},
        "abstain_below": {"type": "number", "minimum": 0, "maximum": 1},
        "queries": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
        "deadline_s": {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_DEADLINE},
        "prompt": {"type": "string", "maxLength": limits.prompt_chars},
        "question": {"type": "string", "minLength": 1, "maxLength": limits.prompt_chars},
        "text": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        "model": {"type": "string"},
    }


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mNoaGgAAAMEAYF1LgG8AAAAAElFTkSuQmCC"
"""A picture of one grey pixel, for the examples."""

EXAMPLE_URL = f"data:image/png;base64,{PNG}"

DATA_URL: Schema = {
    "type": "string",
    "pattern": "^data:[^,]*,",
    "description": "a picture (RFC 2397)",
    "examples": [EXAMPLE_URL],
}


def _embeddings_keys(limits: Limits) -> Schema:
    text: Schema = {"type": "string", "minLength": 1, "maxLength": limits.prompt_chars}
    one = {"anyOf": [text, _object({"text": text}, ["text"]), _object({"image": DATA_URL}, ["image"])]}
    read: dict[str, Schema] = {
        "input": {"anyOf": [text, {"type": "array", "items": one, "minItems": 1, "maxItems": MOST_INPUTS}]},
        "encoding_format": {"enum": ["float", "base64", None]},
        "dimensions": {"type": "null"},
        "return_multivector": _nullable({"type": "boolean"}),
        "deadline_s": _nullable(option_schemas(limits)["deadline_s"]),
    }
    named: Schema = _nullable({"type": "string"})
    properties = {key.name: {**read.get(key.name, named), "description": key.meaning} for key in EMBEDDING_KEYS}
    return _object(properties, ["input"])


def _chat_key(key: ChatKey, options: Mapping[str, Schema]) -> Schema:
    read: dict[str, Schema] = {
        "model": options["model"],
        "messages": {"type": "array", "items": {"$ref": "#/components/schemas/Message"}, "minItems": 1},
        "stream": {"type": "boolean"},
        "ask": {"type": "boolean"},
        "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
        "deadline_s": options["deadline_s"],
        "stream_options": {
            "type": "object",
            "properties": {
                "include_usage": _nullable({"type": "boolean"}),
                "include_obfuscation": {"enum": [False, None]},
            },
            "additionalProperties": False,
        },
    }
    texts: Schema = {"type": "string", "minLength": 1}
    special: dict[str, Schema] = {
        "stop": {"anyOf": [texts, options["stop"]]},
        "seed": {**options["seed"], "minimum": MIN_SEED},
    }
    if key.name in read:
        schema = read[key.name]
    elif key.option:
        schema = special.get(key.name, options[key.option])
    elif ANY_TEXT in key.values:
        schema = {"type": "string"}
    else:
        return {"enum": [*key.values, None], "description": key.meaning}
    return {**(schema if key.name == "messages" else _nullable(schema)), "description": key.meaning}


def _object(properties: Mapping[str, Schema], required: Sequence[str], *, more: bool = False) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": more,
    }


def _message_schemas() -> dict[str, Schema]:
    text = _object({"type": {"const": "text"}, "text": {"type": "string"}}, ["type", "text"])
    address: Schema = {"anyOf": [DATA_URL, _object({"url": DATA_URL, "detail": {}}, ["url"])]}
    image = _object({"type": {"const": "image_url"}, "image_url": address}, ["type", "image_url"])
    parts: Schema = {"type": "array", "items": {"anyOf": [text, image]}, "minItems": 1}
    content: Schema = {"anyOf": [{"type": "string"}, parts]}
    roles: Schema = {"enum": ["system", "developer", "user", "assistant"]}
    return {"Message": _object({"role": roles, "content": content}, ["role", "content"], more=True)}


def _answer_schemas() -> dict[str, Schema]:
    number, text, whole = ({"type": kind} for kind in ("number", "string", "integer"))
    times = _object(dict.fromkeys((*STAGES, "total"), number), [*STAGES, "total"])
    result: dict[str, Schema] = {
        "image": {"type": ["null", "string", "array"]},
        "prompt": _nullable(text),
        "text": text,
        "tokens": {"type": "array", "items": whole},
        "finish_reason": {"enum": ["eos", "length", "stop", ABSTAINED]},
        "timings_ms": times,
        "tokens_per_s": number,
        "logprob": number,
        "confidence": _nullable(number),
        "queries": _nullable(whole),
        "token_logprobs": {"type": "array", "items": number},
    }
    kept = list(result)
    model: dict[str, Schema] = {"id": text, "object": {"const": "model"}, "created": whole, "owned_by": text}
    model["captions"] = {"type": "boolean"}
    reference = {"$ref": "#/components/schemas/Model"}
    completion: dict[str, Schema] = {
        "id": text,
        "object": {"const": "chat.completion"},
        "created": whole,
        "model": text,
        "choices": {"type": "array", "items": {"type": "object"}},
        "usage": {"type": "object"},
        "timings_ms": times,
        "logprob": number,
        "confidence": _nullable(number),
        "abstained": {"type": "boolean"},
    }
    error: dict[str, Schema] = {"message": text, "type": text, "param": _nullable(text), "code": _nullable(text)}
    return {
        "Object": {"type": "object"},
        "Caption": _object({name: result[name] for name in kept}, kept),
        "Model": _object(model, list(model)),
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": reference}}, ["data"]),
        "Completion": _object(completion, list(completion)),
        "Event": _object(dict.fromkeys(EVENT_KEYS, text), ["text"]),
        "Events": _object({"data": {"type": "array", "items": {"$ref": "#/components/schemas/Event"}}}, ["data"]),
        "Embeddings": _list_schema({"type": "object", "required": ["object", "index"]}, {"usage": {"type": "object"}}),
        "Matches": _list_schema(
            _object(
                {"image": whole, "text": text, "probability": _nullable(number), "cosine": number},
                ["image", "text", "probability", "cosine"],
            ),
            {},
        ),
        "Error": _object({"error": _object(error, list(error))}, ["error"]),
    }


def _list_schema(item: Schema, more: Mapping[str, Schema]) -> Schema:
    """Makes the schema of an answer that is a list in OpenAI's format and also has the key ``model``."""
    kind: Schema = {"const": "list"}
    properties = {"object": kind, "data": {"type": "array", "items": item}, "model": {"type": "string"}, **more}
    return _object(properties, list(properties))


def _form_names(endpoint: Endpoint) -> tuple[str, ...]:
    """Returns the names of the options that a request with pictures may have."""
    return (endpoint.body, *(FORM_OPTIONS if endpoint.body != "text" else ()), "deadline_s", "model")


def _parameters(endpoint: Endpoint, options: Mapping[str, Schema]) -> list[Schema]:
    if "{name}" in endpoint.path:
        return [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if endpoint.body in ("", "chat", "embeddings", "event"):
        return []
    names = _form_names(endpoint)
    return [{"name": name, "in": "query", "required": False, "schema": options[name]} for name in names]


def _body(endpoint: Endpoint, options: Mapping[str, Schema]) -> Schema:
    """Returns the schema of the request's body for each media type that the route accepts."""
    if endpoint.body == "chat":
        parts = [{"type": "image_url", "image_url": {"url": EXAMPLE_URL}}, {"type": "text", "text": "a photo of"}]
        example = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8}
        return {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/ChatRequest"}, "example": example}}
    if endpoint.body == "event":
        return {
            JSON_TYPE: {
                "schema": _object(
                    {**{key: {"type": ["string", "null"]} for key in EVENT_KEYS}, "text": {"type": "string"}},
                    ["text"],
                    more=True,
                )
            }
        }
    if endpoint.body == "embeddings":
        example = {"input": ["a dog", {"image": EXAMPLE_URL}], "return_multivector": True}
        return {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/EmbeddingsRequest"}, "example": example}}
    names = _form_names(endpoint)
    picture = {"anyOf": [DATA_URL, {"type": "array", "items": DATA_URL, "minItems": 1}]}
    values = {name: _nullable(options[name]) for name in names}
    file: Schema = {"type": "string", "contentMediaType": "application/octet-stream"}
    fields = {name: options[name] for name in names if name in TEXT_OPTIONS and name != "stop"}
    return {
        "image/*": {"schema": {}},
        "application/octet-stream": {"schema": {}},
        FORM_TYPE: {"schema": _object({**dict.fromkeys(PICTURES, file), **fields}, [], more=True)},
        JSON_TYPE: {
            "schema": _object({"image": picture, **values}, ["image"]),
            "example": {"image": EXAMPLE_URL, endpoint.body: ["a dog"] if endpoint.body == "text" else "what is this"},
        },
    }


def _operation(endpoint: Endpoint, options: Mapping[str, Schema]) -> Schema:
    answers = {
        kind: {"schema": {"$ref": f"#/components/schemas/{name}"} if name else {"type": "string"}}
        for kind, name in endpoint.answers
    }
    responses: Schema = {"200": {"description": endpoint.summary, "content": answers}}
    for status in sorted({*COMMON_ERRORS, *endpoint.errors}):
        name = "Object" if (endpoint.path, status) == ("/health", 503) else "Error"
        content = {JSON_TYPE: {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        responses[str(status)] = {"description": ERRORS[status], "content": content}
    made: Schema = {"operationId": endpoint.name, "summary": endpoint.summary, "responses": responses}
    if endpoint.path in OPEN:
        made["security"] = []
    if parameters := _parameters(endpoint, options):
        made["parameters"] = parameters
    if endpoint.body:
        made["requestBody"] = {"required": True, "content": _body(endpoint, options)}
    return made


def document(limits: Limits, *, needs_key: bool = False) -> Schema:
    """Makes the OpenAPI 3.1 document of a server; ``needs_key``: whether the server needs an API key."""
    options = option_schemas(limits)
    paths: dict[str, Schema] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, options)
    chat = _object({key.name: _chat_key(key, options) for key in KEYS}, ["messages"])
    return {
        "openapi": "3.1.0",
        "info": {"title": "blip2edge", "version": __version__, "description": "Captions of pictures over HTTP."},
        "security": [{"key": []}] if needs_key else [{}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "ChatRequest": chat,
                "EmbeddingsRequest": _embeddings_keys(limits),
                **_message_schemas(),
                **_answer_schemas(),
            },
        },
    }
