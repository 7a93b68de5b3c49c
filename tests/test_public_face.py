"""The public interface: closing, repr, arguments of the wrong type, one error in three interfaces."""

from __future__ import annotations

import asyncio
import base64
import gc
import inspect
import io
import json
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bundles are made here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge import Captioner, ImageError, Matcher, UsageError, evaluate
from blip2edge.bundle.schema import DRAFTS, BackendName
from blip2edge.cli import main
from blip2edge.cli.messages import error_line
from blip2edge.errors import BackendError, BundleError, OverloadError, option
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.limits import Limits
from blip2edge.runtime.backends.base import BACKENDS
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.captioning.captioner import CaptionerOptions
from blip2edge.runtime.decoding.options import CaptionOptions, GenerationOptions
from blip2edge.runtime.serving.http import Server
from tests.drawing import draw_pictures
from tests.families import drawing_blip

PICTURE = draw_pictures(1, 3)[0]


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Iterator[Captioner]:
    with Captioner.load(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clip")
    drawing_blip.save_clip(directory / "checkpoint", 0, eos=drawing_blip.SEP)
    return export_checkpoint(directory / "checkpoint", directory / "bundle", verify="sample").bundle


@pytest.fixture(scope="module")
def matcher(clip: Path) -> Iterator[Matcher]:
    with Matcher.load(clip, threads=1) as opened:
        yield opened


def test_types_list_what_there_is() -> None:
    assert list(CaptionOptions.__annotations__) == list(GenerationOptions.__dataclass_fields__)
    assert get_args(BackendName) == ("auto", *BACKENDS)
    assert DRAFTS[0] == "auto"
    assert {*CaptionerOptions.__annotations__} == {*inspect.signature(Captioner.load).parameters} - {"bundle"}


def test_limits_of_a_matcher(clip: Path) -> None:
    limited = Matcher.load(clip, threads=1, limits=Limits(side=5))
    with limited, pytest.raises(ImageError, match="at most 5 a side"):
        limited.match(PICTURE, "a dog")


def test_repr_gives_bundle_backend_and_precision(captioner: Captioner, matcher: Matcher) -> None:
    path = str(captioner.bundle.path)
    assert repr(captioner) == f"Captioner({path!r}, backend='cpu', precision='fp32')"
    assert repr(matcher) == f"Matcher({str(matcher.bundle.path)!r}, backend='cpu', precision='fp32')"


def test_a_closed_captioner_captions_nothing_and_frees_its_graphs(tiny_bundle: Path) -> None:
    with Captioner.load(tiny_bundle, threads=1) as captioner:
        assert captioner.caption(PICTURE, max_new_tokens=2).tokens
        graphs = [weakref.ref(vars(session)["_session"]) for session in captioner.graphs._sessions]
    assert len(graphs) == 3
    captioner.close()  # harmless when called twice
    with pytest.raises(UsageError, match="this Captioner is closed; load the bundle again"):
        captioner.caption(PICTURE)
    with pytest.raises(UsageError, match="closed"):
        captioner.stream(PICTURE)
    with pytest.raises(UsageError, match="closed"):
        captioner.scheduler()
    assert repr(captioner).endswith(", precision='fp32', closed)")
    del captioner
    gc.collect()
    assert [graph() for graph in graphs] == [None, None, None]


def test_a_captioner_that_fails_to_load_leaves_no_graph_open(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[OnnxRuntimeSession] = []

    def open_graph(path: Path, threads: int | None = None) -> OnnxRuntimeSession:
        if path.name == "bridge.onnx":
            raise BundleError("the bridge is broken")
        opened.append(OnnxRuntimeSession(path, threads))
        return opened[-1]

    monkeypatch.setattr("blip2edge.runtime.backends.onnxruntime_cpu.open_graph", open_graph)
    with pytest.raises(BundleError, match="the bridge is broken"):
        Captioner.load(tiny_bundle, threads=1)
    assert opened
    for graph in opened:
        with pytest.raises(BackendError, match="this graph is closed"):
            graph.run({})


def test_a_stream_ends_where_the_captioner_is_closed(tiny_bundle: Path) -> None:
    captioner = Captioner.load(tiny_bundle, threads=1)
    pieces = captioner.stream(PICTURE)
    results = captioner.caption_many([PICTURE] * 2)
    captioner.close()
    for rest in (pieces, results):
        with pytest.raises(UsageError, match="this Captioner is closed"):
            next(rest)


def test_a_closed_matcher_matches_nothing(clip: Path) -> None:
    with Matcher.load(clip, threads=1) as matcher:
        assert -1.0 <= matcher.match(PICTURE, "a").cosine <= 1.0
    with pytest.raises(UsageError, match=r"this Matcher is closed; load .* with Matcher\.load"):
        matcher.match(PICTURE, "a")
    with pytest.raises(UsageError, match="closed"):
        matcher.embed_text("a")


WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "str for images": (
        lambda c: c.caption_many("dog.jpg"),
        UsageError,
        "expected images to be a list, got 'dog.jpg'; put a single value in a list: [x]",
    ),
    "path for images": (
        lambda c: c.caption_many(Path("dog.jpg")),
        UsageError,
        "expected images to be a list",
    ),
    "picture for images": (lambda c: c.caption_many(PICTURE), UsageError, "expected images to be a list"),
    "number for images": (lambda c: c.caption_many(3), UsageError, "expected images to be a list, got 3"),
    "array for images": (
        lambda c: c.caption_many(np.zeros((8, 9, 3), np.uint8)),
        UsageError,
        "expected images to be a list, got an array [8, 9, 3]",
    ),
    "str for prompts": (
        lambda c: c.caption_many([PICTURE], prompts="a"),
        UsageError,
        "expected prompts to be a list, got 'a'",
    ),
    "number in prompts": (
        lambda c: c.caption_many([PICTURE], prompts=[3]),
        UsageError,
        "expected prompt to be a text, got 3",
    ),
    "number for prompt": (
        lambda c: c.caption(PICTURE, prompt=3),
        UsageError,
        "expected prompt to be a text, got 3",
    ),
    "prompt of a stream": (lambda c: c.stream(PICTURE, prompt=3), UsageError, "expected prompt to be a text"),
    "question": (lambda c: c.ask(PICTURE, None), UsageError, "expected question to be a text, got None"),
    "str for stop": (
        lambda c: c.caption(PICTURE, stop="x"),
        UsageError,
        "expected stop to be a list of non-empty texts, got 'x'; put the text in a list: ['x']",
    ),
    "no image": (
        lambda c: c.caption(None),
        ImageError,
        "expected a path, bytes, a Pillow image or an array, got NoneType",
    ),
    "str for batch_size": (
        lambda c: c.caption_many([PICTURE], batch_size="2"),
        UsageError,
        "expected batch_size to be a whole number of at least 1, got '2'",
    ),
    "unknown option": (
        lambda c: c.caption(PICTURE, max_tokens=3),
        UsageError,
        "there is no option max_tokens",
    ),
    "path for bundle": (
        lambda c: Captioner("bundle"),  # type: ignore[arg-type]
        UsageError,
        "expected bundle to be an opened Bundle, got 'bundle'; load a directory with Captioner.load('bundle')",
    ),
    "nothing for bundle": (
        lambda c: Matcher(None),  # type: ignore[arg-type]
        UsageError,
        "expected bundle to be an opened Bundle, got None; load a directory with Matcher.load(directory)",
    ),
    "None to load": (lambda c: Captioner.load(None), UsageError, "expected bundle to be the path of a directory, got"),  # type: ignore[arg-type]
    "number to load": (lambda c: Captioner.load(3), UsageError, "got int; give a str or a pathlib.Path"),  # type: ignore[arg-type]
    "bytes to load": (lambda c: Matcher.load(b"x"), UsageError, "path of a directory, got bytes"),  # type: ignore[arg-type]
    "str for threads": (
        lambda c: Captioner.load(c.bundle.path, threads="2"),  # type: ignore[arg-type]
        UsageError,
        "threads must be from 1 to 1024, not '2'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_are_one_clear_error(name: str, captioner: Captioner) -> None:
    call, kind, told = WRONG[name]
    with pytest.raises(kind) as caught:
        call(captioner)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.match_many("a.jpg", ["a"]), "expected images to be a list, got 'a.jpg'"),
        (lambda m: m.match_many([PICTURE], "a"), "expected texts to be a list, got 'a'"),
        (lambda m: m.match(PICTURE, 3), "expected text to be a text, got 3"),
        (lambda m: m.embed_images(PICTURE), "expected images to be a list"),
        (lambda m: m.embed_texts("a"), "expected texts to be a list, got 'a'"),
        (lambda m: m.match_many([PICTURE], ["a"], batch_size=0), "expected batch_size to be a whole number"),
    ],
)
def test_wrong_types_for_a_matcher(call: Callable[[Any], Any], told: str, matcher: Matcher) -> None:
    with pytest.raises(UsageError) as caught:
        call(matcher)
    assert told in str(caught.value)


def test_a_stack_of_pictures_is_several(captioner: Captioner) -> None:
    stack = np.stack([np.asarray(PICTURE), np.asarray(PICTURE)])
    assert len(list(captioner.caption_many(stack, max_new_tokens=2))) == 2


# One error, three interfaces


def answer(server: Server, path: str, body: bytes, query: bytes = b"") -> tuple[int, dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": query}
    asyncio.run(asyncio.wait_for(server(scope, receive, send), 60))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))["error"]


def test_each_interface_writes_an_option_in_its_own_way(
    captioner: Captioner, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        captioner.caption(PICTURE, max_new_tokens=3, min_new_tokens=9)
    assert caught.value.field == "min_new_tokens"
    assert str(caught.value) == "expected min_new_tokens of at most 3, got 9; raise max_new_tokens"
    assert caught.value.problem == "expected min_new_tokens of at most 3, got 9"
    assert caught.value.fix == "raise max_new_tokens"
    assert error_line(caught.value) == "expected --min-new-tokens of at most 3, got 9; raise --max-new-tokens"

    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    PICTURE.save(tmp_path / "picture.png")
    words = ["caption", str(tmp_path / "picture.png"), "-b", str(tiny_bundle), "--threads", "1"]
    assert main([*words, "--max-new-tokens", str(2**40)]) == 2
    assert capsys.readouterr().err.startswith("error: expected --max-new-tokens of at most 2147483647")

    server = Server(captioner, max_batch=1)
    try:
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 0}
        status, error = answer(server, "/v1/chat/completions", json.dumps(body).encode())
        assert status == 400
        assert error == {
            "message": "expected max_tokens to be a whole number of at least 1, got 0",
            "type": "invalid_request_error",
            "param": "max_tokens",
            "code": "invalid_value",
        }
        status, error = answer(server, "/v1/chat/completions", json.dumps({**body, "tools": 1}).encode())
        assert (status, error["param"]) == (400, "tools")
        status, error = answer(server, "/caption", file.getvalue(), b"speed=9")
        assert (status, error["param"]) == (400, "speed")
        status, error = answer(server, "/caption", b"no picture")
        assert (status, error["param"]) == (400, None)
    finally:
        server.close()


def test_marked_options_in_errors() -> None:
    error = BundleError(f"{{braces}} stay, {option('max_waiting')} too", f"use {option('force', on=True)}")
    assert str(error) == "{braces} stay, max_waiting too; use force=True"
    assert error_line(error) == "{braces} stay, --queue too; use --force"
    assert error.field == "max_waiting"
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - ours; errors cross processes
    assert (str(copy), copy.field, error_line(copy)) == (str(error), error.field, error_line(error))
    assert OverloadError("full", f"lower {option('max_batch')}").field is None
    assert UsageError(f"{option('a')} and b", field="b").field == "b"


def test_evaluate_is_what_eval_does(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--count", "3", "--metrics", "exact", "--max-new-tokens", "2", "--threads", "1", "--json"]
    assert main(["eval", str(tiny_bundle), *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    stages: list[tuple[str, int, int]] = []
    figures = evaluate(
        tiny_bundle,
        count=3,
        metrics=["exact"],
        max_new_tokens=2,
        threads=1,
        progress=lambda *done: stages.append(done),
    )
    assert json.loads(json.dumps(figures)) == printed
    assert stages[-1] == ("scoring", 3, 3)
    with pytest.raises(UsageError, match="expected count to be at least 2 pictures, got 1"):
        evaluate(tiny_bundle, count=1)
    with pytest.raises(UsageError, match="predictions needs a captioner"):
        evaluate(tiny_bundle, count=2, predictions=True)
