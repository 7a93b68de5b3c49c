"""``POST /v1/embeddings`` in OpenAI's format, and ``POST /match``: parses requests, computes and writes answers.

OpenAI's schema has texts only. A picture is an object ``{"image": "data:image/...;base64,..."}`` in the list ``input``,
as in the servers of other multimodal embeddings. The vector of a picture and the vector of a text are compared by the
cosine.

A picture of BLIP-2 has K vectors, one for each query, and its cosine with a text is the largest cosine of these K
vectors. OpenAI's ``embedding`` has a place for one vector only, so the K vectors are sent as ``embeddings``, if
``return_multivector`` is true.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.schema import IMAGE_FEATURES
from blip2edge.errors import Blip2EdgeError, PromptError, shown
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.serving.chat_keys import (
    EMBEDDING_KEYS,
    RequestError,
    check_chat_keys,
    check_seconds,
    check_type,
)
from blip2edge.runtime.serving.json_bodies import json_object, picture_bytes
from blip2edge.runtime.serving.picture_forms import MatchRequest

Value = TypeVar("Value")

MOST_INPUTS = 2048
"""Largest number of inputs in a request, as in OpenAI's API."""

MOST_PAIRS = 1024
"""Largest number of pairs of a picture and a text in a request of ``/match``: the matching head runs on each pair."""


@dataclass(frozen=True)
class EmbeddingRequest:
    """A parsed request.

    Attributes:
        inputs: Texts, and files of pictures.
        model: Name of the bundle; None for the default.
        base64: Whether vectors are sent as base64.
        multivector: Whether the answer has a list of vectors for each input (``return_multivector``).
        deadline: Seconds for the answer (``deadline_s``); None for the server's default.
    """

    inputs: tuple[str | bytes, ...]
    model: str | None = None
    base64: bool = False
    multivector: bool = False
    deadline: float | None = None


@dataclass(frozen=True)
class Embedded:
    """The result for one input of a request, a text or a picture.

    Attributes:
        vectors: Its vector, float32 ``[F]``, or K vectors ``[K, F]``.
        tokens: Its number of tokens; 0 for a picture.
    """

    vectors: NDArray[np.float32]
    tokens: int


def read_embeddings(body: bytes, limits: Limits = DEFAULT_LIMITS) -> EmbeddingRequest:
    """Parses the JSON body of a request.

    Raises:
        RequestError: The body is no JSON object, has no input, has an unknown key or a value that the server does not
            support, or exceeds a limit.
        PromptError: The texts are too long.
    """
    values = json_object(body, limits)
    check_chat_keys(values, EMBEDDING_KEYS)
    check_type("return_multivector", values.get("return_multivector"), bool, "true or false")
    check_seconds(values.get("deadline_s"))
    form = values.get("encoding_format")
    if form not in (None, "float", "base64"):
        raise RequestError(
            f"expected encoding_format to be float or base64, got {shown(form)}",
            field="encoding_format",
            code="unsupported_value",
        )
    inputs = tuple(_inputs(values.get("input")))
    pictures = sum(isinstance(one, bytes) for one in inputs)
    if pictures > limits.pictures:
        raise _wrong(f"expected at most {limits.pictures} pictures, got {pictures}", "send fewer in a request")
    check_length([one for one in inputs if isinstance(one, str)], limits)
    return EmbeddingRequest(
        inputs, values.get("model"), form == "base64", bool(values.get("return_multivector")), values.get("deadline_s")
    )


def _inputs(value: Any) -> Iterator[str | bytes]:
    if value is None:
        raise _wrong("expected an input, got none", code="missing_required_parameter")
    given = value if isinstance(value, list) else [value]
    if not 1 <= len(given) <= MOST_INPUTS:
        raise _wrong(f"expected 1 to {MOST_INPUTS} inputs, got {len(given)}")
    for index, one in enumerate(given):
        if isinstance(one, dict) and len(one) == 1:
            ((key, content),) = one.items()
            if key == "image":
                yield picture_bytes(content, "input")
                continue
            one = content if key == "text" else one
        if not isinstance(one, str):
            raise _wrong(
                f'expected input[{index}] to be a text, {{"text": TEXT}} or {{"image": "data:image/...;base64,..."}}, '
                f"got {shown(one)}",
                "token ids are not accepted: send the text" if isinstance(one, (int, list)) else None,
                code="invalid_type",
            )
        yield one


def check_length(texts: Sequence[str], limits: Limits) -> None:
    """Raises PromptError if the texts of a request have more characters than a prompt may have."""
    length = sum(map(len, texts))
    if length > limits.prompt_chars:
        raise PromptError(
            f"expected texts of at most {limits.prompt_chars} characters, got {length}", "send fewer in a request"
        )


def check_pairs(wanted: MatchRequest, limits: Limits) -> None:
    """Checks the size of a request of ``/match``.

    Raises:
        RequestError: There are too many pictures, or pairs.
        PromptError: The texts are too long.
    """
    pictures, pairs = len(wanted.pictures), len(wanted.pictures) * len(wanted.texts)
    if pictures > limits.pictures:
        raise RequestError(f"expected at most {limits.pictures} pictures, got {pictures}", "send fewer", field="image")
    if pairs > MOST_PAIRS:
        raise RequestError(
            f"expected at most {MOST_PAIRS} pairs of a picture and a text, got {pairs}", "send fewer", field="text"
        )
    check_length(wanted.texts, limits)


def embed_steps(matcher: Matcher, inputs: Sequence[str | bytes], batch_size: int) -> Iterator[list[Embedded]]:
    """Computes the vectors of texts and pictures batch by batch; yields the vectors of each batch, in order.

    A batch has only texts or only pictures. Another thread may empty ``inputs``; then no further batch is computed.

    Raises:
        ImageError, PromptError: An input cannot be read; the error names the input.
    """
    first = 0
    while batch := inputs[first : first + batch_size]:
        kind = type(batch[0])
        batch = list(takewhile(lambda one: type(one) is kind, batch))  # noqa: B023 - called at once
        yield _embed(matcher, batch, first)
        first += len(batch)


def _embed(matcher: Matcher, batch: Sequence[Any], first: int) -> list[Embedded]:
    if isinstance(batch[0], str):
        lengths = [len(_of_input(first + at, matcher.token_ids, text)) for at, text in enumerate(batch)]
        vectors = matcher.embed_texts(batch, batch_size=len(batch))
        return [Embedded(vector, tokens) for vector, tokens in zip(vectors, lengths, strict=True)]
    results = matcher.embed_images_iter(batch, batch_size=len(batch), return_exceptions=True)
    return [Embedded(_of_input(first + at, _unless_error, result), 0) for at, result in enumerate(results)]


def _unless_error(result: Value | Blip2EdgeError) -> Value:
    if isinstance(result, Blip2EdgeError):
        raise result
    return result


def _of_input(index: int, compute: Callable[[Any], Value], argument: object) -> Value:
    """Calls ``compute`` with ``argument``; if an error is raised, sets its field to ``input[index]``."""
    try:
        return compute(argument)
    except Blip2EdgeError as error:
        error.field = f"input[{index}]"
        raise


def match_steps(
    matcher: Matcher, pictures: Sequence[bytes], texts: Sequence[str], batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """Compares pictures with texts, ``batch_size`` texts at a time.

    Yields the results as objects of ``blip2edge match --json``; ``image`` is the index of the picture in the request.
    Another thread may empty ``pictures``; then no further pairs are compared.
    """
    done = 0
    for results in matcher.match_in_steps(pictures, texts, batch_size):
        yield [{**result.to_json(), "image": (done + at) // len(texts)} for at, result in enumerate(results)]
        done += len(results)


def vectors_per_image(matcher: Matcher) -> int:
    """Returns the number of vectors that the model computes for a picture: K for BLIP-2, 1 for other models."""
    (features,) = matcher.bundle.manifest.graphs[IMAGE_FEATURES].spec.outputs
    queries = features.dims[1]
    return queries if isinstance(queries, int) else queries.max


def check_vectors(model: str, wanted: EmbeddingRequest, matcher: Matcher) -> None:
    """Checks that a request with pictures sets ``return_multivector`` if the model makes several vectors for a picture.

    Args:
        model: Name of the bundle.
        wanted: The request.
        matcher: The loaded bundle.

    Raises:
        RequestError: A picture has several vectors, and ``return_multivector`` is not set.
    """
    vectors = vectors_per_image(matcher)
    if vectors > 1 and not wanted.multivector and any(isinstance(one, bytes) for one in wanted.inputs):
        raise RequestError(
            f"the model {model!r} makes {vectors} vectors for a picture, but the key embedding holds only one vector",
            "send return_multivector: true to get all of them; the largest of their cosines with a text counts",
            field="return_multivector",
            code="multivector_required",
        )


def embeddings_answer(model: str, wanted: EmbeddingRequest, results: Sequence[Embedded]) -> dict[str, Any]:
    """Makes the JSON object that answers a request of ``/v1/embeddings``."""
    data = []
    for index, result in enumerate(results):
        written = [_written(vector, wanted.base64) for vector in np.atleast_2d(result.vectors)]
        value = {"embeddings": written} if wanted.multivector else {"embedding": written[0]}
        data.append({"object": "embedding", "index": index, **value})
    tokens = sum(result.tokens for result in results)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _written(vector: NDArray[np.float32], as_base64: bool) -> list[float] | str:
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    values: list[float] = vector.tolist()
    return values


def _wrong(problem: str, fix: str | None = None, code: str = "invalid_value") -> RequestError:
    return RequestError(problem, fix, field="input", code=code)
