"""Several bundles in one server: the key ``model`` chooses, and what is counted names the bundle."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("starlette", reason="the server needs the extra serve")

from blip2edge.cli import main
from blip2edge.cli.parser import build_parser
from blip2edge.cli.serve import _bundles
from blip2edge.errors import UsageError
from blip2edge.limits import Limits
from blip2edge.runtime.backends.probe import cores
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.serving.http import Server
from blip2edge.runtime.serving.models.served import ModelSource, load_served, shared_lock
from tests.http_calls import CHAT, ask, chat, got, png_file

PNG = png_file()


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Iterator[Captioner]:
    with Captioner.load(tiny_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def matcher(blip_itm: Path) -> Iterator[Matcher]:
    with Matcher.load(blip_itm, threads=1) as loaded:
        yield loaded


@pytest.fixture
def server(captioner: Captioner, matcher: Matcher) -> Iterator[Server]:
    made = Server([ModelSource(captioner, name="one"), ModelSource(captioner, name="two"), ModelSource(matcher)])
    yield made
    made.close()


def embed(server: Server, **values: Any) -> Any:
    return ask(server, "POST", "/v1/embeddings", json.dumps({"input": "a", **values}).encode())


def metrics(server: Server) -> list[str]:
    return got(ask(server, "GET", "/metrics")).body.decode().splitlines()


def test_the_model_is_chosen(server: Server, captioner: Captioner) -> None:
    wanted = captioner.caption(PNG, prompt="two")
    for name in ("one", "two"):
        answer = got(ask(server, "POST", CHAT, chat(PNG, "two", model=name))).json
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == (name, wanted.text)
    assert got(ask(server, "POST", CHAT, chat(PNG, "two"))).json["model"] == "one"
    tokens = got(ask(server, "POST", "/caption", PNG, "prompt=two&model=two")).json["tokens"]
    assert tokens == list(wanted.tokens)
    form = json.dumps({"image": json.loads(chat(PNG))["messages"][0]["content"][0]["image_url"]["url"], "model": "two"})
    got(ask(server, "POST", "/caption", form.encode(), kind="application/json"))
    assert got(embed(server)).json["model"] == "blip-itm"  # the first that has embeddings
    assert got(embed(server, model="blip-itm")).json["model"] == "blip-itm"
    lines = metrics(server)
    assert 'blip2edge_requests_total{model="one",outcome="done"} 2.0' in lines
    assert 'blip2edge_requests_total{model="two",outcome="done"} 3.0' in lines
    assert 'blip2edge_requests_total{model="blip-itm",outcome="done"} 2.0' in lines
    assert 'blip2edge_load{model="one",where="waiting"} 0.0' in lines
    assert any(line.startswith('blip2edge_tokens_total{model="two"}') for line in lines)
    assert any(line.startswith('blip2edge_stage_latency_seconds_count{model="two",stage="vision"} 3') for line in lines)


def test_a_stream_of_a_bundle(server: Server, captioner: Captioner) -> None:
    answer = got(ask(server, "POST", CHAT, chat(PNG, "two", model="two", stream=True)))
    assert answer.text == captioner.caption(PNG, prompt="two").text
    assert {event["model"] for event in answer.events if event != "[DONE]"} == {"two"}


@pytest.mark.parametrize("path", ["/caption", "/ask", "/match", CHAT, "/v1/embeddings", "/v1/models/none"])
def test_an_unknown_model(path: str, server: Server) -> None:
    body = {CHAT: chat(PNG, model="none"), "/v1/embeddings": b'{"input": "a", "model": "none"}'}.get(path, PNG)
    method, query = ("GET", "") if path.startswith("/v1/models") else ("POST", "")
    if path in ("/caption", "/ask", "/match"):
        query = "model=none&question=a" if path == "/ask" else "model=none"
    error = got(ask(server, method, path, body, query), 404).json["error"]
    assert error == {
        "message": error["message"],
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert "this server has: one, two, blip-itm" in error["message"]


def test_a_model_of_the_other_kind(server: Server) -> None:
    assert "cannot caption them" in got(ask(server, "POST", "/caption", PNG, "model=blip-itm"), 400).error
    assert "has no embeddings" in got(embed(server, model="one"), 400).error
    lines = metrics(server)
    assert 'blip2edge_requests_total{model="",outcome="refused"} 2.0' in lines


def test_listed(server: Server) -> None:
    listed = got(ask(server, "GET", "/v1/models")).json["data"]
    assert [(one["id"], one["captions"]) for one in listed] == [("one", True), ("two", True), ("blip-itm", False)]
    assert got(ask(server, "GET", "/v1/models/two")).json == listed[1]
    health = got(ask(server, "GET", "/health")).json
    assert health["status"] == "ok"
    assert [(one["model"], one["status"]) for one in health["models"]] == [
        ("one", "ok"),
        ("two", "ok"),
        ("blip-itm", "ok"),
    ]


def test_one_broken_engine_is_in_the_health(server: Server) -> None:
    list(server.models)[1].engine.state = "restarting"
    body = got(ask(server, "GET", "/health"), 503).json
    assert (body["status"], body["models"][1]["status"]) == ("restarting", "restarting")
    assert got(ask(server, "POST", "/caption", PNG, "model=two"), 503).json["error"]["code"] == "engine_restarting"
    got(ask(server, "POST", "/caption", PNG, "model=one"))


def test_one_bundle_is_as_before(captioner: Captioner) -> None:
    server = Server(captioner)
    try:
        assert got(ask(server, "POST", CHAT, chat(PNG, model="gpt-4o"))).json["model"] == server.model
        assert set(got(ask(server, "GET", "/health")).json) == {"status", "model", "load"}
        lines = metrics(server)
        assert 'blip2edge_requests_total{outcome="done"} 1.0' in lines
        assert not [line for line in lines if "model=" in line]
        assert "this server has one: " in got(ask(server, "GET", "/v1/models/none"), 404).error
    finally:
        server.close()


def test_graphs_run_one_at_a_time_where_they_would_use_too_many_threads(
    captioner: Captioner, matcher: Matcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for threads, shared in ((1, cores() < 5), (cores(), True)):
        monkeypatch.setattr(type(captioner.graphs), "host_threads", threads)
        assert (shared_lock([captioner, captioner, matcher]) is not None) is shared
    monkeypatch.setattr(type(captioner.graphs), "host_threads", 0)  # on a GPU
    assert shared_lock([captioner, captioner]) is None
    monkeypatch.setattr(type(captioner.graphs), "host_threads", cores())
    running, most, run = [0], [0], type(captioner.encoder.images.vision).run
    guard = threading.Lock()

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        with guard:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return run(self, *arguments, **options)
        finally:
            with guard:
                running[0] -= 1

    monkeypatch.setattr(type(captioner.encoder.images.vision), "run", counted)
    server = Server([ModelSource(captioner, name="a"), ModelSource(captioner, name="b")])
    schedulers = [model.engine.scheduler for model in server.models]  # type: ignore[union-attr]
    requests = [one.submit(PNG, captioner.options(max_new_tokens=3)) for one in schedulers * 3]
    assert len({request.result(60).tokens for request in requests}) == 1
    server.close()
    assert most == [1]


def test_names_on_the_command_line(captioner: Captioner, capsys: pytest.CaptureFixture[str]) -> None:
    def named(*words: str) -> list[tuple[str, Path]]:
        return _bundles(build_parser(["serve"]).parse_args(["serve", *words]))

    assert named("x", "clip=y/z", "w") == [("", Path("x")), ("clip", Path("y/z")), ("", Path("w"))]
    assert named("-b", "x", "clip=y=z") == [("", Path("x")), ("clip", Path("y=z"))]
    assert named("a=x", "b=x/8") == [("a", Path("x")), ("b", Path("x/8"))]
    assert named("dir/a=x") == [("", Path("dir/a=x"))]
    assert main(["serve", "x/a", "y/a", "--port", "0"]) == 2
    assert "two bundles have the name 'a'" in capsys.readouterr().err
    assert main(["serve", "x", "=y", "--port", "0"]) == 2
    assert "expected NAME=BUNDLE, got '=y'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="two bundles have the name 'b'"):
        Server([ModelSource(captioner, name="b"), ModelSource(captioner, name="b")])


def test_a_bundle_is_loaded_as_what_it_is(tiny_bundle: Path, blip_itm: Path) -> None:
    for bundle, kind in ((tiny_bundle, Captioner), (blip_itm, Matcher)):
        with load_served(bundle, backend="cpu", threads=1, limits=Limits(), require_signature=None) as loaded:
            assert type(loaded) is kind
