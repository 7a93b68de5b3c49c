"""InstructBlipVideo compared with transformers, and the accepted forms of a video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

import torch
from PIL import Image

from blip2edge.cli import main
from blip2edge.errors import ImageError, PromptError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.images.video import chosen, load_frames, pictures_of
from tests.families.drawing_instruct import FRAMES, QUERIES, draw_instructblipvideo

PROMPTS = ("A short video caption.", "what is it doing?", "Question: what is it, two cats? Short answer:")
SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "t5": (10, "t5", {}),
    "llama": (11, "llama", {}),
    "llama-every-layer": (12, "llama", {"cross_attention_frequency": 1}),
}


class Exported(NamedTuple):
    model: Any
    oracle: Any
    captioner: Captioner
    encoder_decoder: bool


@pytest.fixture(
    scope="module",
    params=[
        "llama",
        pytest.param("t5", marks=pytest.mark.slow),
        pytest.param("llama-every-layer", marks=pytest.mark.slow),
    ],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    seed, kind, qformer = CASES[request.param]
    directory = tmp_path_factory.mktemp(kind)
    model, oracle = draw_instructblipvideo(directory / "checkpoint", seed, kind, **qformer)
    bundle = export_checkpoint(directory / "checkpoint", directory / "bundle").bundle
    return Exported(model, oracle, Captioner.load(bundle, threads=1), kind == "t5")


def draw_video(seed: int, frames: int = FRAMES) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (30 + 7 * seed, 50, 3), dtype=np.uint8)) for _ in range(frames)]


def expected(exported: Exported, frames: list[Any], prompt: str, **search: Any) -> list[int]:
    """What transformers generates for one video, the padding left out."""
    inputs = exported.oracle(frames, prompt)
    with torch.no_grad():
        ids = exported.model.generate(**inputs, max_new_tokens=8, **search)[0].tolist()
    ids = ids[0 if exported.encoder_decoder else inputs["input_ids"].shape[1] :]
    return ids[: ids.index(3) + 1] if 3 in ids else ids


@pytest.mark.parametrize("search", list(SEARCHES))
def test_single_and_batched_ids_are_transformers(exported: Exported, search: str) -> None:
    options = SEARCHES[search] | {"max_new_tokens": 8}
    videos = [draw_video(seed) for seed in range(3)]
    wanted = [
        expected(exported, video, prompt, **SEARCHES[search]) for video, prompt in zip(videos, PROMPTS, strict=True)
    ]
    assert len({tuple(ids) for ids in wanted}) == 3
    batched = exported.captioner.caption_many(videos, prompts=PROMPTS, batch_size=3, **options)
    assert [list(result.tokens) for result in batched] == wanted
    for video, prompt, ids in zip(videos, PROMPTS, wanted, strict=True):
        assert list(exported.captioner.caption(video, prompt=prompt, **options).tokens) == ids


def test_frames_come_from_anything_that_holds_them(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = draw_video(1)
    wanted = exported.captioner.caption(video, max_new_tokens=6).tokens
    for index, frame in enumerate(video):
        frame.save(tmp_path / f"frame{index * 5}.png")  # 0, 5, 10, 15: in the order of the numbers
    assert exported.captioner.caption(tmp_path, max_new_tokens=6).tokens == wanted
    capsys.readouterr()
    command = [
        "caption",
        str(tmp_path),
        "-b",
        str(exported.captioner.bundle.path),
        "--json",
        "--threads",
        "1",
    ]
    assert main([*command, "--max-new-tokens", "6"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (tuple(line["tokens"]), line["image"]) == (wanted, str(tmp_path))
    stacked = np.stack([np.asarray(frame) for frame in video])
    assert exported.captioner.caption(stacked, max_new_tokens=6).tokens == wanted


def test_the_order_of_frames_matters_and_a_picture_stands_still(exported: Exported) -> None:
    video = draw_video(2)
    first, last = video[0], video[-1]
    still = exported.captioner.caption(first, max_new_tokens=6)
    assert still.tokens == exported.captioner.caption([first] * FRAMES, max_new_tokens=6).tokens
    forth = exported.oracle([first, first, last, last], PROMPTS[0])
    back = exported.oracle([last, last, first, first], PROMPTS[0])
    assert not torch.equal(forth["pixel_values"], back["pixel_values"])
    for frames, pair in (([first, last], forth), ([last, first], back)):
        pixels = exported.captioner.encoder.images.preprocessing.batch(pictures_of([frames], FRAMES))
        np.testing.assert_array_equal(pixels, pair["pixel_values"][0].numpy())


def test_the_bundle_says_how_many_frames(exported: Exported) -> None:
    spec = exported.captioner.prompts.spec
    assert spec.frames == FRAMES
    for token in ("<video>", "<image>", "</s>"):
        with pytest.raises(PromptError, match=f"the prompt contains {token}, which"):
            exported.captioner.caption(draw_video(0), prompt=f"a {token} of")
    assert spec.visual_tokens == FRAMES * QUERIES
    axis = exported.captioner.bundle.graph("vision_encoder").spec.axes()["batch"]
    assert (axis.min, axis.opt, axis.max) == (1, FRAMES, 8 * FRAMES)


@pytest.mark.parametrize(
    ("total", "indices"), [(4, [0, 1, 2, 3]), (1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (10, [0, 2, 5, 7])]
)
def test_frames_are_taken_at_equal_distances(total: int, indices: list[int]) -> None:
    assert chosen(total, 4) == indices
    assert indices == np.arange(0, total, total / 4).astype(int).tolist()  # transformers' example


def test_no_frames_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="expected a folder of frames, got an empty one"):
        load_frames(tmp_path / "empty", 4)
    with pytest.raises(ImageError, match="at least one frame"):
        load_frames([], 4)


def test_a_single_picture_family_takes_no_frames(tmp_path: Path) -> None:
    preprocessing = Preprocessing()
    with pytest.raises(ImageError, match="expected a picture, got a directory"):
        preprocessing.batch(pictures_of([tmp_path], 1))
    with pytest.raises(UsageError, match="expected one picture, got a list"):
        preprocessing.batch(pictures_of([draw_video(0)], 1))


def test_what_is_no_video_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not a video")
    with pytest.raises(ImageError, match=r"clip\.mp4: (cannot be read as a video|reading a video needs av)"):
        load_frames(path, 4)


def test_a_video_file_gives_its_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="videos are read with PyAV")
    path = tmp_path / "clip.mp4"
    shades = range(10, 250, 24)  # ten frames, each of one grey
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for shade in shades:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = [np.asarray(frame).mean() for frame in load_frames(path, 4)]
    wanted = [shades[index] for index in chosen(10, 4)]
    np.testing.assert_allclose(found, wanted, atol=6)
