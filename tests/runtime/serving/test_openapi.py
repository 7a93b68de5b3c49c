"""The OpenAPI document: valid, complete, and requests that are made from it succeed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("starlette", reason="the server needs the extra serve")

from starlette.routing import Route

from blip2edge.limits import Limits
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.serving.chat_keys import ERRORS as CLASSES
from blip2edge.runtime.serving.chat_keys import FORM_OPTIONS, KEYS
from blip2edge.runtime.serving.http import Server
from blip2edge.runtime.serving.models.served import ModelSource
from blip2edge.runtime.serving.openapi import CHAT, ENDPOINTS, ERRORS, document, option_schemas, route_name
from tests.http_calls import ask, chat, got, png_file
from tests.live_server import live

CONFIG = Path(__file__).parent.parent.parent.parent / "benchmarks" / "configs" / "schemathesis.toml"


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


def test_every_route_and_key_is_in_the_document(captioner: Captioner) -> None:
    server = Server(captioner, limits=Limits(beams=3))
    try:
        read = got(ask(server, "GET", "/openapi.json")).json
        routes = server._app._app._app.routes  # type: ignore[attr-defined]
    finally:
        server.close()
    assert read == json.loads(json.dumps(document(Limits(beams=3))))
    there = {(route.path, method) for route in routes if isinstance(route, Route) for method in route.methods or ()}
    described = {
        (path.replace("{name}", "{name:path}"), method.upper())
        for path in read["paths"]
        for method in read["paths"][path]
    }
    assert there == described | {(path, "HEAD") for path, method in described if method == "GET"}
    assert set(read["components"]["schemas"]["ChatRequest"]["properties"]) == {key.name for key in KEYS}
    parameters = {one["name"] for one in read["paths"]["/ask"]["post"]["parameters"]}
    assert parameters == {"question", *FORM_OPTIONS, "deadline_s", "model"}
    assert set(option_schemas(Limits())) >= {*FORM_OPTIONS}
    assert {status for _, status, _, _ in CLASSES} <= set(map(int, read["paths"][CHAT]["post"]["responses"]))
    assert {status for endpoint in ENDPOINTS for status in endpoint.errors} <= set(ERRORS)
    assert read["components"]["schemas"]["ChatRequest"]["properties"]["num_beams"]["anyOf"][0]["maximum"] == 3


def test_the_document_is_valid() -> None:
    schemas = pytest.importorskip("jsonschema_rs", reason="the extra dev is not installed")
    made = document(Limits())
    assert made["openapi"] == "3.1.0"
    assert {"title", "version"} <= set(made["info"])
    for schema in made["components"]["schemas"].values():
        schemas.Draft202012Validator({**schema, "components": made["components"]})
    for operations in made["paths"].values():
        for operation in operations.values():
            assert operation["operationId"]
            assert {"400", "408", "503"} <= set(operation["responses"])  # from the limits of connections
            assert all(response["description"] for response in operation["responses"].values())


def test_answers_fit_the_document(captioner: Captioner) -> None:
    schemas = pytest.importorskip("jsonschema_rs", reason="the extra dev is not installed")
    components = document(Limits())["components"]
    png, server = png_file(), Server(captioner)

    def fits(name: str, value: object) -> bool:
        reference = {"$ref": f"#/components/schemas/{name}", "components": components}
        return bool(schemas.Draft202012Validator(reference).is_valid(value))

    try:
        assert fits("Caption", got(ask(server, "POST", "/caption", png)).json)
        assert fits("Completion", got(ask(server, "POST", CHAT, chat(png))).json)
        assert fits("Models", got(ask(server, "GET", "/v1/models")).json)
        assert fits("Error", got(ask(server, "POST", "/caption", b"x"), 400).json)
        assert not fits("Error", {})
        for endpoint in ENDPOINTS:
            content = document(Limits())["paths"][endpoint.path][endpoint.method.lower()].get("requestBody", {})
            for kind, form in content.get("content", {}).items():
                if "example" in form and endpoint.name not in ("embeddings", "match"):  # test_embeddings.py
                    got(ask(server, "POST", endpoint.path, json.dumps(form["example"]).encode(), kind=kind))
        assert fits("ChatRequest", json.loads(chat(png, "two", num_beams=2, stop=["a"], stream=False)))
        assert not fits("ChatRequest", {"messages": [], "toolz": 1})
    finally:
        server.close()


def test_route_names() -> None:
    assert route_name("GET", "/v1/models/a/b") == "/v1/models/{name}"
    assert [route_name(*one) for one in (("GET", "/x"), ("BREW", "/ask"), ("POST", "/ask"))] == [
        "other",
        "other",
        "/ask",
    ]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_requests_made_from_the_document(captioner: Captioner, blip_itm: Path) -> None:
    both = [ModelSource(captioner), ModelSource(Matcher.load(blip_itm, threads=1))]
    with live(both) as (_, port):
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
        options = ["--seed", "1", "--max-examples", "3", "--phases", "examples,coverage,fuzzing", "--no-color"]
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{port}/openapi.json", *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=1500,
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
