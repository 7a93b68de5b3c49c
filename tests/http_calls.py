"""Calls of the HTTP server in the way of an ASGI server, and its requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Mapping
from typing import Any

from blip2edge.runtime.serving.http import Server
from tests.drawing import draw_pictures

CHAT = "/v1/chat/completions"


class Answer:
    """What came back."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.status: int = messages[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in messages[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"]["message"])

    @property
    def events(self) -> list[Any]:
        lines = self.body.decode().split("\n\n")[:-1]
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]

    @property
    def text(self) -> str:
        """The text of a chat, streamed or not."""
        if not self.headers["content-type"].startswith("text/event-stream"):
            return str(self.json["choices"][0]["message"]["content"])
        chunks = [event for event in self.events if event != "[DONE]" and event["choices"]]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


async def call(
    server: Server,
    method: str,
    path: str,
    body: bytes = b"",
    query: str = "",
    *,
    kind: str | None = None,
    leave: bool = False,
    headers: Mapping[str, str] = {},
) -> Answer | None:
    """One request in pieces of 1,000 bytes.

    Args:
        server: The application.
        method, path, body, query: Of the request.
        kind: Its content type.
        leave: The client closes the connection as soon as it has sent the request.
        headers: Of the request, without the content type.
    """
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)] or [b""]
    incoming = [
        {"type": "http.request", "body": piece, "more_body": at + 1 < len(pieces)} for at, piece in enumerate(pieces)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop(0)
        if not leave:
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "query_string": query.encode()}
    given = {**headers, **({} if kind is None else {"content-type": kind})}
    if given:
        scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in given.items()]
    await asyncio.wait_for(server(scope, receive, send), 60)
    return Answer(sent) if sent else None


def ask(server: Server, method: str, path: str, body: bytes = b"", query: str = "", **more: Any) -> Answer | None:
    """:func:`call` in an event loop of its own."""
    return asyncio.run(call(server, method, path, body, query, **more))


def got(answer: Answer | None, status: int = 200) -> Answer:
    assert answer is not None
    assert answer.status == status, answer.body
    return answer


def png_file() -> bytes:
    file = io.BytesIO()
    draw_pictures(1, 4)[0].save(file, "PNG")
    return file.getvalue()


def data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def picture_part(png: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png), **more}}


def chat(png: bytes, text: str | None = None, **more: Any) -> bytes:
    content = [picture_part(png)]
    if text is not None:
        content.append({"type": "text", "text": text})
    return json.dumps({"messages": [{"role": "user", "content": content}], **more}).encode()
