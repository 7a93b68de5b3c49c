"""A typed special token is refused by every interface: Python, the command line, HTTP and watch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.cli import main
from blip2edge.errors import PromptError
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.serving.http import Server
from blip2edge.runtime.serving.streams.sources import Frame
from blip2edge.runtime.serving.watch import watch
from tests.drawing import draw_pictures
from tests.http_calls import ask, chat, got, png_file

TYPED = ("<image>", "</s>", "<pad>", "<unk>")
PICTURE = draw_pictures(1)[0]


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Iterator[Captioner]:
    with Captioner.load(tiny_bundle, threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("token", TYPED)
def test_in_python(token: str, captioner: Captioner) -> None:
    text = f"two {token} cats"
    calls: tuple[Any, ...] = (
        lambda: captioner.caption(PICTURE, prompt=text),
        lambda: captioner.ask(PICTURE, text),
        lambda: list(captioner.caption_many([PICTURE, PICTURE], prompts=["a photo", text])),
        lambda: list(watch(captioner, iter([Frame("0", PICTURE)]), every=True, prompt=text)),
    )
    for call in calls:
        with pytest.raises(PromptError, match=f"contains {token}"):
            call()


@pytest.mark.parametrize("token", TYPED)
def test_over_http(token: str, captioner: Captioner) -> None:
    text, png = f"two {token} cats", png_file()
    server = Server(captioner, max_batch=2)
    body = json.loads(chat(png, text))
    system = {"messages": [{"role": "system", "content": token}, *body["messages"]]}
    try:
        for path, sent in (("/v1/chat/completions", chat(png, text)), ("/v1/chat/completions", json.dumps(system))):
            answer = got(ask(server, "POST", path, sent if isinstance(sent, bytes) else sent.encode()), 400)
            assert token in answer.error or "system" in answer.error
        for path, key in (("/caption", "prompt"), ("/ask", "question")):
            answer = got(ask(server, "POST", path, png, f"{key}={text.replace(' ', '%20')}"), 400)
            assert f"contains {token}" in answer.error
    finally:
        server.close()


@pytest.mark.parametrize("token", TYPED)
def test_on_the_command_line(token: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PICTURE.save(tmp_path / "a.png")
    text = f"two {token} cats"
    picture, bundle = str(tmp_path / "a.png"), ["-b", str(tiny_bundle), "--threads", "1"]
    for command in (
        ["caption", picture, "--prompt", text],
        ["ask", picture, text],
        ["watch", str(tmp_path), "--once", "--prompt", text],
    ):
        assert main([*command, *bundle]) != 0, command
        assert f"contains {token}" in capsys.readouterr().err, command
