"""``TritonPythonModel``: the class that Triton's Python backend loads to caption pictures with a bundle.

``repository.py`` lists inputs and outputs. Each row of a request is one picture: a picture file or a ``data:`` URL.

- By default ``execute`` gets the requests that Triton has batched, submits all rows to one scheduler, and answers when
  all are finished.
- In decoupled mode ``execute`` returns at once. The scheduler's thread sends each piece of the text as it is generated;
  later requests join the running batch. The last response has an empty ``text`` and the whole result as ``json``.

A broken picture is an error of its own request; other requests are not affected. If the engine is broken, the bundle is
loaded again. If this fails too often in a row, the process ends, so that Triton reports the instance as unhealthy.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.errors import Blip2EdgeError, EngineFaultError, OverloadError, python_option
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.request import CaptionResult, Request
from blip2edge.runtime.captioning.restart import Backoff, RestartingCaptioner
from blip2edge.runtime.serving.json_bodies import picture_bytes

MOST_WAITING = 1024
"""Largest number of requests that wait in decoupled mode; further requests get the error ``UNAVAILABLE``."""


class TritonPythonModel:
    """The class that Triton's Python backend loads; Triton calls ``initialize``, ``execute`` and ``finalize``.

    See https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/python_backend/README.html.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle that is beside ``model.py``.

        Args:
            args: ``model_config`` (JSON), ``model_repository`` (the model's directory) and ``model_version``.

        Raises:
            TritonModelException: The bundle cannot be loaded.
        """
        self.triton: Any = import_module("triton_python_backend_utils")  # it is in Triton's process only
        config = json.loads(args["model_config"])
        given = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self._decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled"))
        load = partial(
            Captioner.load,
            Path(args["model_repository"], args["model_version"], "bundle"),
            backend=given.get("backend", "auto"),
            threads=int(given["threads"]) if given.get("threads") else None,
        )
        try:
            self._engine = RestartingCaptioner(
                load(), load, Backoff(), max_batch=int(given.get("max_batch", "8")), max_waiting=MOST_WAITING
            )
            self._engine.gave_up = end_process
        except (Blip2EdgeError, ValueError) as error:
            raise self.triton.TritonModelException(_text(error)) from error

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Captions the pictures of the requests.

        Returns:
            A response for each request; None in decoupled mode.
        """
        if self._decoupled:
            for request in requests:
                self._stream(request, request.get_response_sender())
            return None
        submitted = [self._submitted(request) for request in requests]
        return [self._response(one) for one in submitted]

    def finalize(self) -> None:
        """Closes the scheduler and releases the graphs; Triton calls this method before it unloads the model."""
        self._engine.close()
        self._engine.captioner.close()

    def _submitted(self, request: Any) -> list[Request] | Exception:
        """Submits each row of a request to the scheduler; returns the submitted rows, or the error if one fails."""
        rows: list[Request] = []
        try:
            for image, prompt, options in self._rows(request):
                scheduler = self._engine.ready()
                rows.append(scheduler.submit(image, self._engine.captioner.options(**options), prompt=prompt))
        except Exception as error:  # noqa: BLE001 - whatever it is, the request gets it
            for row in rows:
                row.cancel()
            return error
        return rows

    def _response(self, submitted: list[Request] | Exception) -> Any:
        try:
            if isinstance(submitted, Exception):
                raise submitted
            results = [self.result(row) for row in submitted]
        except Exception as error:  # noqa: BLE001 - as above
            return self.failed(error)
        texts = [result.text for result in results]
        return self.answer(texts, [json.dumps(result.to_json()) for result in results])

    def _stream(self, request: Any, sender: Any) -> None:
        """Submits a request in decoupled mode; the scheduler's thread sends the responses."""
        stream = _Stream(self, sender)
        try:
            ((image, prompt, options),) = self._rows(request)
            generation, scheduler = self._engine.captioner.options(**options), self._engine.ready()
            stream.begin(scheduler.submit(image, generation, prompt=prompt, wait=False, on_piece=stream.send))
        except Exception as error:  # noqa: BLE001 - as above
            stream.end(self.failed(error))

    def _rows(self, request: Any) -> list[tuple[bytes, str | None, dict[str, Any]]]:
        """Returns picture, prompt and options of each row."""

        def values(name: str) -> list[Any] | None:
            tensor = self.triton.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()

        images = values("image") or []
        prompts = values("prompt") or [b""] * len(images)
        lengths = values("max_new_tokens") or [0] * len(images)
        return [
            (
                picture_bytes(image.decode(), "image") if image[:5].lower() == b"data:" else image,
                prompt.decode() or None,
                {"max_new_tokens": length} if length else {},
            )
            for image, prompt, length in zip(images, prompts, lengths, strict=True)
        ]

    def result(self, row: Request, timeout: float | None = None) -> CaptionResult:
        """Waits for a row's result, and records that the engine works; arguments as in :meth:`Request.result`."""
        result = row.result(timeout)
        self._engine.succeeded()
        return result

    def answer(self, texts: list[str], objects: list[str]) -> Any:
        """Makes a response with the outputs ``text`` and ``json``."""
        tensors = [
            self.triton.Tensor(name, np.array([[value.encode()] for value in values], dtype=np.object_))
            for name, values in (("text", texts), ("json", objects))
        ]
        return self.triton.InferenceResponse(tensors)

    def failed(self, error: BaseException) -> Any:
        """Makes a response with an error."""
        triton = self.triton.TritonError
        code = triton.INTERNAL
        if isinstance(error, (OverloadError, EngineFaultError)):
            code = triton.UNAVAILABLE
        elif isinstance(error, (Blip2EdgeError, ValueError)):
            code = triton.INVALID_ARG
        return self.triton.InferenceResponse(error=triton(_text(error), code))


class _Stream:
    """Sends the responses to one request in Triton's decoupled mode (several responses to a request)."""

    def __init__(self, model: TritonPythonModel, sender: Any) -> None:
        self._model, self._sender = model, sender
        self._begun, self._ended = threading.Event(), False

    def begin(self, caption: Request) -> None:
        """Sets the request that was submitted to the scheduler; :meth:`send` waits until this method is called."""
        self._caption = caption
        self._begun.set()

    def send(self, piece: str | None) -> None:
        """Sends a piece of the text, or, if it is None, the result; called by the threads of the scheduler."""
        self._begun.wait()
        if piece is None:
            try:
                last = self._model.answer([""], [json.dumps(self._model.result(self._caption, 0).to_json())])
            except (Exception, CancelledError) as error:  # noqa: BLE001 - the client gets it
                last = self._model.failed(error)
            self.end(last)
        elif self._sender.is_cancelled():
            self._caption.cancel()
        else:
            self._sender.send(self._model.answer([piece], [""]))

    def end(self, response: Any) -> None:
        """Sends the last response, unless it was sent already."""
        if not self._ended:
            self._ended = True
            self._sender.send(response, flags=self._model.triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def end_process() -> None:
    """Ends the process in which Triton runs this model; ``sys.exit`` would end only the calling thread."""
    os._exit(1)


def _text(error: BaseException) -> str:
    """Returns the message of an error; options have their Python names, which are the names of Triton's inputs."""
    return error.text(python_option) if isinstance(error, Blip2EdgeError) else f"{type(error).__name__}: {error}"
