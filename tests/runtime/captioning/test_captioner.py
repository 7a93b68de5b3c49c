"""The captioner on an exported bundle: batches, streams, stop texts, context length, and errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.bundle.schema import BackendName
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.errors import (
    BackendError,
    BundleError,
    BundleIntegrityError,
    ImageError,
    PromptError,
    UsageError,
)
from blip2edge.runtime.backends.base import BACKENDS
from blip2edge.runtime.captioning.captioner import STAGES, Captioner, CaptionResult
from blip2edge.runtime.captioning.request import Span
from blip2edge.runtime.images.preprocess import DeferredImage
from tests.drawing import BOS, Drawn, draw_pictures

NEW = 10
PROMPTS = (None, "a photo of", "Question: what is two? Short answer:", "red dog", None)


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five pictures on disk."""
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path, picture in zip(paths, draw_pictures(5, 2), strict=True):
        picture.save(path)
    return paths


def answers(results: Iterator[CaptionResult]) -> list[tuple[str | None, str, tuple[int, ...]]]:
    return [(result.prompt, result.text, result.tokens) for result in results]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"repetition_penalty": 1.4, "min_new_tokens": 4}, {"temperature": 1.2, "seed": 5}],
)
@pytest.mark.parametrize("batch_size", [2, 3, 5, 9])
def test_batches_give_what_single_pictures_give(batch_size: int, options: dict[str, Any], captioner: Captioner) -> None:
    images = draw_pictures(5, 1)
    single = answers(captioner.caption_many(images, prompts=PROMPTS, max_new_tokens=NEW, **options))
    batch = captioner.caption_many(images, prompts=PROMPTS, batch_size=batch_size, max_new_tokens=NEW, **options)
    assert answers(batch) == single
    assert len({tokens for _, _, tokens in single}) > 3


def test_results_come_in_order_and_name_their_picture(captioner: Captioner, files: list[Path]) -> None:
    results = list(captioner.caption_many(files, prompts=PROMPTS, batch_size=2, max_new_tokens=NEW))
    assert [result.image for result in results] == [str(path) for path in files]
    assert [result.prompt for result in results] == list(PROMPTS)
    for path, prompt, result in zip(files, PROMPTS, results, strict=True):
        assert captioner.caption(path, prompt=prompt, max_new_tokens=NEW).tokens == result.tokens


def test_a_result_as_json(captioner: Captioner, files: list[Path]) -> None:
    values = json.loads(json.dumps(captioner.caption(files[0], max_new_tokens=4).to_json()))
    assert list(values) == [
        "image",
        "prompt",
        "text",
        "tokens",
        "finish_reason",
        "timings_ms",
        "tokens_per_s",
        "logprob",
        "confidence",
        "queries",
        "token_logprobs",
    ]
    assert list(values["timings_ms"]) == [*STAGES, "total"]
    assert all(value > 0 for value in values["timings_ms"].values())
    assert values["tokens_per_s"] > 0
    assert len(values["tokens"]) == 4
    assert values["finish_reason"] == "length"
    assert captioner.caption(PIL.Image.open(files[0])).image is None


def test_every_kind_of_picture_gives_the_same(captioner: Captioner, files: list[Path]) -> None:
    picture = PIL.Image.open(files[0])
    sources = (files[0], str(files[0]), picture, np.asarray(picture))
    assert len({captioner.caption(source, max_new_tokens=NEW).tokens for source in sources}) == 1


def test_no_pictures(captioner: Captioner) -> None:
    assert list(captioner.caption_many([])) == []


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"temperature": 0.9, "top_k": 9, "seed": 3}])
@pytest.mark.parametrize("prompt", [None, "a photo of"])
def test_the_stream_is_the_caption(prompt: str | None, options: dict[str, Any], captioner: Captioner) -> None:
    for picture in draw_pictures(4, 9):
        pieces = list(captioner.stream(picture, prompt=prompt, max_new_tokens=NEW, **options))
        caption = captioner.caption(picture, prompt=prompt, max_new_tokens=NEW, **options)
        assert "".join(pieces).strip() == caption.text
        assert len(pieces) > 3


def test_a_stop_string_ends_the_text(captioner: Captioner) -> None:
    picture = draw_pictures(1, 4)[0]
    whole = captioner.caption(picture, max_new_tokens=NEW)
    words = whole.text.split()
    stop = words[4]
    result = captioner.caption(picture, max_new_tokens=NEW, stop=(stop, "never"))
    assert result.finish_reason == "stop"
    assert result.text.split() == words[: words.index(stop)]
    assert result.tokens == whole.tokens[: len(result.tokens)]
    assert len(result.tokens) < len(whole.tokens)
    streamed = "".join(captioner.stream(picture, max_new_tokens=NEW, stop=(stop,)))
    assert streamed.strip() == result.text
    several = captioner.caption_many([picture] * 3, batch_size=3, max_new_tokens=NEW, stop=(stop,))
    assert {one.tokens for one in several} == {result.tokens}


def test_a_stop_string_among_beams(captioner: Captioner) -> None:
    picture = draw_pictures(1, 4)[0]
    stop = captioner.caption(picture, num_beams=3, max_new_tokens=NEW).text.split()[3]
    assert stop not in captioner.caption(picture, num_beams=3, max_new_tokens=NEW, stop=(stop,)).text


def test_a_question_is_put_into_the_template(captioner: Captioner) -> None:
    picture = draw_pictures(1)[0]
    asked = captioner.ask(picture, "what is it?", max_new_tokens=NEW)
    assert asked.prompt == "Question: what is it? Short answer:"
    assert asked.tokens == captioner.caption(picture, prompt=asked.prompt, max_new_tokens=NEW).tokens


def test_the_bundles_defaults(captioner: Captioner) -> None:
    options = captioner.options()
    assert (options.max_new_tokens, options.eos_token_ids, options.num_beams) == (30, (BOS,), 1)
    assert captioner.options(min_new_tokens=40).max_new_tokens == 40


# The context: 64 slots, 5 of them for the picture


def test_a_caption_ends_with_the_context(captioner: Captioner, tiny_checkpoint: Drawn) -> None:
    picture = draw_pictures(1, 6)[0]
    prompt = "a photo of " * 17 + "two"  # 5 + 1 + 52 slots: 6 are left, and the last token is not read
    searches: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    for options in searches:
        result = captioner.caption(picture, prompt=prompt, max_new_tokens=50, **options)
        assert (len(result.tokens), result.finish_reason) == (7, "length")
        assert result.tokens == tiny_checkpoint.generate(picture, prompt, max_new_tokens=7, **options)
        least = captioner.caption(picture, prompt=prompt, max_new_tokens=50, min_new_tokens=50, **options)
        assert len(least.tokens) == 7


def test_the_context_of_one_row_does_not_end_the_others(captioner: Captioner) -> None:
    images, prompts = draw_pictures(3, 6), ("a photo of", "a photo of " * 19, None)
    batch = list(captioner.caption_many(images, prompts=prompts, batch_size=3, max_new_tokens=20))
    assert [len(result.tokens) for result in batch] == [20, 2, 20]
    for image, prompt, result in zip(images, prompts, batch, strict=True):
        assert captioner.caption(image, prompt=prompt, max_new_tokens=20).tokens == result.tokens


def test_a_prompt_that_fills_the_context(captioner: Captioner) -> None:
    picture = draw_pictures(1)[0]
    assert len(captioner.caption(picture, prompt="two " * 58).tokens) == 1
    with pytest.raises(PromptError, match=r"has 65 tokens .* context has 64"):
        captioner.caption(picture, prompt="two " * 59)
    with pytest.raises(PromptError):
        captioner.stream(picture, prompt="two " * 59)


# What is refused


def test_a_broken_picture_ends_the_run_after_what_came_before(captioner: Captioner, files: list[Path]) -> None:
    files[3].write_bytes(b"no picture")
    wanted = [captioner.caption(path, max_new_tokens=4).tokens for path in files[:3]]
    for batch_size in (1, 2, 3, 5):
        results = captioner.caption_many(files, batch_size=batch_size, max_new_tokens=4)
        assert [next(results).tokens for _ in range(3)] == wanted
        with pytest.raises(ImageError, match=r"3\.png"):
            next(results)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_errors_in_place_of_results(captioner: Captioner, files: list[Path], batch_size: int) -> None:
    files[1].write_bytes(b"half a pict")
    prompts = ["a", "a", "word " * 5000, "a", "a"]
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": 4}
    results = list(captioner.caption_many(files, prompts=prompts, return_exceptions=True, **options))
    assert [type(result) for result in results] == [
        CaptionResult,
        ImageError,
        PromptError,
        CaptionResult,
        CaptionResult,
    ]
    for at in (0, 3, 4):
        result, alone = results[at], captioner.caption(files[at], prompt="a", max_new_tokens=4)
        assert isinstance(result, CaptionResult)
        assert result.tokens == alone.tokens


def bgr(picture: PIL.Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A frame as OpenCV gives it."""
    return np.ascontiguousarray(np.asarray(picture)[..., ::-1])


def test_channel_order_of_arrays(captioner: Captioner, files: list[Path]) -> None:
    pictures = draw_pictures(5, 2)
    frames = [bgr(picture) for picture in pictures]
    expected = [captioner.caption(picture, max_new_tokens=NEW).tokens for picture in pictures]
    as_rgb = [captioner.caption(frame, max_new_tokens=NEW).tokens for frame in frames]
    assert as_rgb != expected  # the order matters for these pictures
    for batch_size in (1, 3):
        results = captioner.caption_many(frames, channels="bgr", batch_size=batch_size, max_new_tokens=NEW)
        assert [result.tokens for result in results] == expected
    with captioner.scheduler() as scheduler:
        request = scheduler.submit(frames[0], captioner.options(max_new_tokens=NEW), channels="bgr")
        assert request.result().tokens == expected[0]
    text = captioner.caption(pictures[0], max_new_tokens=NEW).text
    assert "".join(captioner.stream(frames[0], channels="bgr", max_new_tokens=NEW)).strip() == text
    question = {"max_new_tokens": NEW, "question": "what is it"}
    asked = captioner.ask(frames[0], channels="bgr", **question)  # type: ignore[arg-type]
    assert asked.tokens == captioner.ask(pictures[0], **question).tokens  # type: ignore[arg-type]
    alpha = np.dstack([frames[0], np.full(frames[0].shape[:2], 7, np.uint8)])
    assert captioner.caption(alpha, channels="bgr", max_new_tokens=NEW).tokens == expected[0]
    for other in (pictures[0], files[0], files[0].read_bytes()):  # these name their own channels
        assert captioner.caption(other, channels="bgr", max_new_tokens=NEW).tokens == expected[0]
    grey = np.asarray(pictures[0].convert("L"))
    for array in (grey, grey[..., None]):
        assert captioner.caption(array, channels="bgr").tokens == captioner.caption(array).tokens


def test_channel_order_that_does_not_exist(captioner: Captioner) -> None:
    with pytest.raises(UsageError, match="expected channels to be 'rgb' or 'bgr', got 'BGR'"):
        captioner.caption(bgr(draw_pictures(1)[0]), channels="BGR")  # type: ignore[arg-type]


def test_picture_that_is_read_when_it_is_decoded(captioner: Captioner, files: list[Path]) -> None:
    expected = captioner.caption(files[0]).tokens
    assert captioner.caption(DeferredImage("a", files[0].read_bytes)).tokens == expected
    frame = bgr(draw_pictures(5, 2)[0])
    assert captioner.caption(DeferredImage("a", lambda: frame), channels="bgr").tokens == expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_picture_whose_reading_fails(captioner: Captioner, files: list[Path], batch_size: int) -> None:
    def fail() -> bytes:
        raise ConnectionResetError("the line is dead")

    pictures: list[Any] = [files[0], DeferredImage("the camera", fail), files[2], files[3]]
    results = list(captioner.caption_many(pictures, batch_size=batch_size, return_exceptions=True, max_new_tokens=2))
    assert [type(result) for result in results] == [CaptionResult, ImageError, CaptionResult, CaptionResult]
    assert str(results[1]) == "the camera: cannot be read (the line is dead)"
    broken = DeferredImage("the camera", lambda: b"no picture")
    with pytest.raises(ImageError, match="the camera: not a picture"):
        captioner.caption(broken, channels="bgr")


def test_a_prompt_too_long_ends_the_run_after_what_came_before(captioner: Captioner) -> None:
    images, prompts = draw_pictures(3), ("a", "two " * 70, "b")
    results = captioner.caption_many(images, prompts=prompts, batch_size=3, max_new_tokens=4)
    assert next(results).tokens
    with pytest.raises(PromptError):
        next(results)


def test_a_run_may_be_left_early(captioner: Captioner, files: list[Path]) -> None:
    results = captioner.caption_many(files, max_new_tokens=2)
    next(results)
    results.close()
    assert captioner.caption(files[0], max_new_tokens=2).tokens


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": "3"}, "min_new_tokens"),
        ({"min_new_tokens": None}, "min_new_tokens"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "temperature": 0.7}, "num_beams"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e308}, "from 0.001 to 1000"),
        ({"repetition_penalty": 10**400}, "a number of 1329 bits"),
        ({"temperature": 10**400}, "from 0 to 1000"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"max_new_tokens": 10**5000}, "max_new_tokens of at most 2147483647"),
        ({"seed": -(10**5000)}, "a whole number of at least 0"),
        ({"seed": 2**64}, "seed of at most"),
        ({"top_k": 2**31}, "top_k of at most"),
        ({"stop": ["a"] * 65}, "at most 64 texts"),
        ({"stop": "x" * 1000}, "..."),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": "text"}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"beams": 3}, "no option beams"),
        ({"encoder_repetition_penalty": 2.0}, "does not act on this model"),
        ({"encoder_no_repeat_ngram_size": 2}, "does not act on this model"),
        ({"bad_words_ids": [[3, 9999]]}, "ids below 120, got 9999"),
    ],
)
def test_options_outside_their_range(options: dict[str, Any], told: str, captioner: Captioner) -> None:
    for call in (captioner.caption_many, captioner.stream, captioner.caption):
        argument: Any = draw_pictures(1) if call == captioner.caption_many else draw_pictures(1)[0]
        with pytest.raises(UsageError) as caught:  # at the call, not at the first result
            call(argument, **options)
        assert told in str(caught.value)
        assert len(str(caught.value)) < 250
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1e3, "temperature": 1e3, "seed": 2**64 - 1, "top_k": 2**31 - 1},
        {"repetition_penalty": 1e-3, "temperature": 1e-5, "seed": 0, "top_p": 0.0},
        {"length_penalty": 10.0, "num_beams": 2, "repetition_penalty": 1e-3},
        {"max_new_tokens": 2**31 - 1},
    ],
)
def test_the_ends_of_the_ranges_break_nothing(options: dict[str, Any], captioner: Captioner) -> None:
    """Warnings of numbers that overflow are errors here."""
    result = captioner.caption(draw_pictures(1)[0], **{"max_new_tokens": 3, **options})
    assert result.tokens


def test_an_engine_bounds_the_rows(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = draw_pictures(5, 2)
    alone = [captioner.caption(picture, max_new_tokens=4, min_new_tokens=4).tokens for picture in pictures]
    together = {}
    for most in (None, 2):
        spans: list[Span] = []
        monkeypatch.setattr(captioner.generator.language.decoder, "max_rows", most, raising=False)
        with captioner.scheduler(max_batch=5, trace=spans.append) as scheduler:
            options = captioner.options(max_new_tokens=4, min_new_tokens=4)
            requests = [scheduler.submit(picture, options) for picture in pictures]
            assert [request.result().tokens for request in requests] == alone
        together[most] = max(len(span.requests) for span in spans)
    assert together[None] > 2
    assert together[2] <= 2


def test_arguments_that_do_not_fit(captioner: Captioner, tiny_bundle: Path) -> None:
    images = draw_pictures(2)
    with pytest.raises(UsageError, match="one prompt for each of the 2 pictures, got 1"):
        captioner.caption_many(images, prompts=["a"])
    with pytest.raises(UsageError, match="batch_size"):
        captioner.caption_many(images, batch_size=0)
    with pytest.raises(UsageError, match="beams"):
        captioner.stream(images[0], num_beams=2)
    with pytest.raises(UsageError, match="threads"):
        Captioner.load(tiny_bundle, threads=0)
    with pytest.raises(BackendError, match=r"expected backend to be one of .* got abacus"):
        Captioner.load(tiny_bundle, backend="abacus")  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["nowhere.png", ".", ""])
def test_pictures_that_are_none(source: str, captioner: Captioner) -> None:
    with pytest.raises(ImageError):
        captioner.caption(source)


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def reseal(bundle: Path, **changes: Any) -> None:
    """Changes the manifest and seals the files as they are."""
    path = bundle / "bundle.json"
    values = json.loads(path.read_text()) | changes
    values["files"] = {name: dataclasses.asdict(FileRecord.of(bundle / name)) for name in values["files"]}
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("backend", ["auto", *(name for name, row in BACKENDS.items() if row.refuses)])
def test_bf16_is_refused_with_the_reason(backend: BackendName, copy: Path) -> None:
    reseal(copy, precision="bf16")
    reason = "no CPU kernels" if backend in ("auto", "cpu") else "NumPy has no bfloat16"
    hint = "use backend openvino, or export with precision fp32 or fp16"
    with pytest.raises(BackendError, match=rf"bf16, which the backend \S+ does not run: .*{reason}.*; {hint}"):
        Captioner.load(copy, backend=backend)


def test_a_changed_bundle(copy: Path) -> None:
    data = bytearray((copy / "decoder.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "decoder.onnx.data").write_bytes(data)
    with pytest.raises(BundleIntegrityError, match=r"decoder\.onnx\.data"):
        Captioner.load(copy)


@pytest.mark.parametrize("name", ["decoder.onnx", "tokenizer.json", "embed_tokens.safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b'{"a": 1}', b'\x09\0\0\0\0\0\0\0{"a": 1}{'])
def test_a_bundle_sealed_with_broken_files(name: str, content: bytes, copy: Path) -> None:
    """Whatever lies there, the answer is one line."""
    (copy / name).write_bytes(content)
    reseal(copy)
    with pytest.raises(BundleError, match=name) as caught:
        Captioner.load(copy)
    assert "\n" not in str(caught.value)


def test_a_table_shorter_than_its_header_says(copy: Path) -> None:
    path = copy / "embed_tokens.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    reseal(copy)
    with pytest.raises(BundleError, match=r"embed_tokens\.safetensors"):
        Captioner.load(copy)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"temperature": 0.8, "seed": 2}, {"draft": "lookup"}, {"stop": ("o",)}],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_every_path_gives_the_log_probability_of_each_token(
    captioner: Captioner, files: list[Path], options: dict[str, Any]
) -> None:
    """Batches, single pictures and streams; the values are of the same order for all rows."""
    together = list(captioner.caption_many(files, max_new_tokens=NEW, batch_size=3, **options))
    assert all(len(result.token_logprobs) == result.new_tokens for result in together)
    assert all(value <= 0 for result in together for value in result.token_logprobs)
    alone = captioner.caption(files[0], max_new_tokens=NEW, **options)
    assert alone.token_logprobs == pytest.approx(together[0].token_logprobs, abs=1e-3)
    assert alone.logprob == pytest.approx(sum(alone.token_logprobs))
    if "num_beams" not in options:
        pieces = list(captioner.stream(files[0], max_new_tokens=NEW, **options))
        tokens = [token for piece in pieces for token in piece.tokens]
        assert "".join(token.text for token in tokens) == "".join(pieces) == alone.text
        shown = alone.token_logprobs[: len(tokens)]
        assert [token.logprob for token in tokens] == pytest.approx(shown, abs=1e-3)


def test_the_likeliest_tokens_of_each_place(captioner: Captioner, files: list[Path]) -> None:
    result = captioner.caption(files[0], max_new_tokens=NEW, top_logprobs=4)
    assert [len(place) for place in result.likeliest] == [4] * result.new_tokens
    for token, logprob, place in zip(result.tokens, result.token_logprobs, result.likeliest, strict=True):
        assert place[0][0] == token  # greedy decoding takes the likeliest
        assert place[0][1] == pytest.approx(logprob, abs=1e-5)
        assert [value for _, value in place] == sorted((value for _, value in place), reverse=True)
    with pytest.raises(UsageError, match="top_logprobs"):
        captioner.options(top_logprobs=2, num_beams=2)
