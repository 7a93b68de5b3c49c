"""``POST /caption`` and ``/ask``: the three forms of a request, and the error for any other form."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import PIL.Image
import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("starlette", reason="the extra serve is not installed")

from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.serving.http import Server
from tests.http_calls import Answer, ask, data_url, got, png_file

PNG = png_file()
EDGE = "----edge"
FORM = f"multipart/form-data; boundary={EDGE}"
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 5, "seed": 3}


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def server(captioner: Captioner) -> Iterator[Server]:
    made = Server(captioner)
    yield made
    made.close()


def form(fields: Mapping[str, Any], files: Mapping[str, bytes] = {"file": PNG}) -> bytes:
    """A body of the type :data:`FORM`."""
    lines: list[bytes] = []
    for name, value in fields.items():
        lines += [f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()]
    for name, content in files.items():
        head = f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n'
        lines += [f"{head}Content-Type: image/png\r\n\r\n".encode(), content, b"\r\n"]
    return b"".join([*lines, f"--{EDGE}--\r\n".encode()])


def same(answer: Answer, captioner: Captioner, **options: Any) -> bool:
    alone = captioner.caption(PIL.Image.open(io.BytesIO(PNG)), **options).to_json()
    timed = ("timings_ms", "tokens_per_s")
    rounded = ("logprob",)  # of a batch or a row alone
    assert answer.json["logprob"] == pytest.approx(alone["logprob"], abs=1e-3)
    return list(answer.json) == list(alone) and all(
        answer.json[key] == alone[key] for key in alone if key not in (*timed, *rounded)
    )


def test_all_forms_and_options_of_caption_json(server: Server, captioner: Captioner) -> None:
    values = {"prompt": "a photo of", **OPTIONS}
    picture = {"image": data_url(PNG)}
    for body, kind, query in (
        (PNG, "image/png", urlencode(values)),
        (PNG, "application/x-www-form-urlencoded", urlencode(values)),
        (PNG, None, urlencode({**values, "min_new_tokens": "", "deadline_s": 30})),
        (form(values), FORM, ""),
        (form(values, {"image": PNG}), FORM, ""),
        (form({"prompt": "a photo of", **picture}, {}), FORM, urlencode(OPTIONS)),
        (json.dumps({**picture, **values}).encode(), "application/json; charset=utf-8", ""),
        (json.dumps({"image": [data_url(PNG)], **OPTIONS}).encode(), "application/json", "prompt=a+photo+of"),
    ):
        answer = got(ask(server, "POST", "/caption", body, query, kind=kind))
        assert same(answer, captioner, **values), kind
    answer = got(
        ask(server, "POST", "/caption", form({"num_beams": 2, "length_penalty": 0.5, "draft": "none"}), kind=FORM)
    )
    assert same(answer, captioner, num_beams=2, length_penalty=0.5)
    answer = got(ask(server, "POST", "/caption", PNG, "stop=a&stop=o&repetition_penalty=1.5&min_new_tokens=3"))
    assert same(answer, captioner, stop=("a", "o"), repetition_penalty=1.5, min_new_tokens=3)
    assert same(got(ask(server, "POST", "/caption", form({"prompt": ""}), kind=FORM)), captioner)


def test_questions_go_into_the_bundles_template(server: Server, captioner: Captioner) -> None:
    prompt = captioner.prompts.question("what is red?")
    for body, kind, query in (
        (PNG, None, "question=what+is+red%3F"),
        (form({"question": "what is red?"}), FORM, ""),
        (json.dumps({"image": data_url(PNG), "question": "what is red?"}).encode(), "application/json", ""),
    ):
        assert same(got(ask(server, "POST", "/ask", body, query, kind=kind)), captioner, prompt=prompt)
    error = got(ask(server, "POST", "/ask", PNG), 400).json["error"]
    assert (error["param"], error["code"]) == ("question", "missing_required_parameter")
    assert "no parameter 'prompt'" in got(ask(server, "POST", "/ask", PNG, "prompt=a"), 400).error


WRONG: list[tuple[bytes, str | None, str, int, str]] = [
    (b"", None, "", 400, "expected a picture, got none; send one: curl --data-binary @dog.jpg"),
    (b"", "image/png", "", 400, "expected a picture, got none"),
    (form({}, {}), FORM, "", 400, "expected a picture, got none"),
    (b"prompt=two&file=dog.jpg", "application/x-www-form-urlencoded", "", 400, "expected a picture file, got a text"),
    (data_url(PNG).encode(), "application/x-www-form-urlencoded", "", 400, "a form needs the type multipart/form-data"),
    (b'{"image": "data:,a"}', None, "", 400, "and JSON application/json"),
    (form({"a": 1})[:60], FORM, "", 400, "the body is no form"),
    (form({}), "multipart/form-data", "", 400, "the body is no form of the type multipart/form-data (Missing boundary"),
    (PNG, FORM, "", 400, "the body is no form"),
    (
        form({}, {"picture": PNG}),
        FORM,
        "",
        400,
        "expected files of the name file or image in the form, got a",
    ),
    (form({}, {"prompt": b"a"}), FORM, "", 400, "got a file 'prompt'"),
    (
        form({"file": "dog.jpg"}, {}),
        FORM,
        "",
        400,
        "got the text 'dog.jpg'; send a file, with an @: curl",
    ),
    (form({"image": "http://a/b.png"}, {}), FORM, "", 400, "expected image to be a file or a data URL"),
    (form({"speed": 9}), FORM, "", 400, "there is no parameter 'speed'; parameters are prompt, max_new_tokens"),
    (form({"seed": 9}), FORM, "seed=9", 400, "expected seed once, got it twice"),
    (form({"num_beams": "two"}), FORM, "", 400, "expected num_beams to be a whole number of at least 1, got 'two'"),
    (form({}, {"file": PNG, "image": PNG}), FORM, "", 400, "expected one picture, got a list of 2"),
    (form({}, {"file": b"no picture"}), FORM, "", 400, "not a picture"),
    (b"{", "application/json", "", 400, "cannot be parsed"),
    (b"[]", "application/json", "", 400, "expected a JSON object"),
    (b"{}", "application/json", "", 400, "expected a picture as data:"),
    (b'{"image": "dog.jpg"}', "application/json", "", 400, "expected a picture as data:"),
    (b'{"image": []}', "application/json", "", 400, "expected a picture, got none"),
    (json.dumps({"image": data_url(PNG), "prompt": 3}).encode(), "application/json", "", 400, "prompt to be a text"),
    (
        PNG,
        "text/html",
        "",
        415,
        "expected a body of the type image/*, multipart/form-data or application/json, got",
    ),
    (PNG, "video/mp4", "", 415, "got 'video/mp4'"),
    (PNG, None, "promt=a", 400, "there is no parameter 'promt'"),
    (PNG, None, "prompt=a&prompt=b", 400, "expected prompt once, got it twice"),
    (PNG, None, "max_new_tokens=1.5", 400, "expected max_new_tokens to be a whole number of at least 1, got 1.5"),
    (PNG, None, "max_new_tokens=true", 400, "expected max_new_tokens to be a whole number"),
    (PNG, None, "temperature=NaN", 400, "expected temperature to be a number from 0 to 1000, got nan"),
    (PNG, None, "num_beams=9", 400, "expected num_beams of at most 8, got 9"),
    (PNG, None, "draft=x", 400, "expected draft to be one of"),
    (PNG, None, "deadline_s=soon", 400, "expected deadline_s to be a number of seconds, got 'soon'"),
    (PNG, None, "deadline_s=0", 400, "expected deadline_s to be a number above 0"),
    (PNG, None, "prompt=%3Cimage%3E", 400, "the prompt contains <image>, which marks a picture"),
    (PNG, None, "prompt=a%3C/s%3E", 400, "the prompt contains </s>, which is a special token of this model"),
]


@pytest.mark.parametrize(("body", "kind", "query", "status", "told"), WRONG, ids=[row[-1][:50] for row in WRONG])
def test_anything_else_is_told_precisely(
    body: bytes, kind: str | None, query: str, status: int, told: str, server: Server
) -> None:
    answer = got(ask(server, "POST", "/caption", body, query, kind=kind), status)
    assert told in answer.error
    assert "\n" not in answer.error
    assert list(answer.json["error"]) == ["message", "type", "param", "code"]
