"""BLIP-2, BLIP and CLIP for retrieval: scores and vectors equal transformers'."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip2edge import Captioner, Matcher
from blip2edge.calibration.confidence.references import References
from blip2edge.calibration.pipeline import calibrate
from blip2edge.cli import main
from blip2edge.errors import BundleError, CheckpointError, PromptError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.checkpoint.directory import load_checkpoint, load_model, save_checkpoint
from blip2edge.runtime.images.preprocess import FORMATS
from tests.drawing import draw_pictures
from tests.families import drawing_blip as drawing

TEXTS = ["a photo of two cats", "Red dog", "what is the dog where it is"]
WITHIN = 1e-4


def save(kind: str, directory: Path, seed: int) -> tuple[Any, Any]:
    """Draws a checkpoint of a kind; every second CLIP has the older configs' end token."""
    if kind == "blip-itm":
        return drawing.save_blip(directory, "retrieval", seed)
    if kind == "blip-2-itm":
        return drawing.save_blip2(directory, seed)
    return drawing.save_clip(directory, seed, eos=2 if seed == 1 else drawing.SEP)


def scores(kind: str, model: Any, processor: Any, image: Any, text: str) -> tuple[float | None, float]:
    """Probability and cosine of one picture and one text in transformers."""
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        if kind == "clip":
            out = model(**inputs)
            return None, float(out.image_embeds @ out.text_embeds.T)
        if kind == "blip-itm":
            match = model(**inputs, use_itm_head=True).itm_score
            return float(match.softmax(dim=1)[0, 1]), float(model(**inputs, use_itm_head=False).itm_score)
        match = model(**inputs, use_image_text_matching_head=True).logits_per_image
        contrast = model(**inputs, use_image_text_matching_head=False).logits_per_image
        return float(match.softmax(dim=1)[0, 1]), float(contrast)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("kind", ["blip-2-itm", "blip-itm", "clip"])
def test_scores_equal_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    model, processor = save(kind, tmp_path / "checkpoint", seed)
    verify = "sample" if (kind, seed) == ("blip-2-itm", 2) else "full"
    report = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", verify=verify)
    match = [] if kind == "clip" else ["match"]
    assert [graph.name for graph in report.graphs] == [
        "vision_encoder",
        "image_features",
        "text_embeds",
        *match,
    ]
    matcher = Matcher.load(tmp_path / "bundle", threads=1)
    pictures = draw_pictures(3, seed)
    together = list(matcher.match_many(pictures, TEXTS, batch_size=3))
    alone = [matcher.match(picture, text) for picture in pictures for text in TEXTS]
    wanted = [scores(kind, model, processor, picture, text) for picture in pictures for text in TEXTS]
    for one, other, (probability, cosine) in zip(alone, together, wanted, strict=True):
        for result in (one, other):
            assert result.cosine == pytest.approx(cosine, abs=WITHIN)
            if probability is None:
                assert result.probability is None
            else:
                assert result.probability == pytest.approx(probability, abs=WITHIN)
    assert np.std([cosine for _, cosine in wanted]) > 0.02  # the scores depend on picture and text
    if kind == "clip":
        with pytest.raises(UsageError, match="no matching head"):
            matcher.probabilities(pictures, [TEXTS] * 3)
    else:
        ragged = matcher.probabilities(pictures, [TEXTS, [], TEXTS[:1]], batch_size=3)
        expected = [probability for probability, _ in wanted]
        assert ragged == [
            pytest.approx(expected[:3], abs=WITHIN),
            [],
            pytest.approx(expected[6:7], abs=WITHIN),
        ]
    features, texts = matcher.embed_images(pictures, batch_size=2), matcher.embed_texts(TEXTS, batch_size=3)
    features = features.reshape(3, -1, texts.shape[1])  # [N, K, F]
    cosines = (features @ texts.T).max(axis=1).reshape(-1)
    np.testing.assert_allclose(cosines, [cosine for _, cosine in wanted], atol=WITHIN)


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of BLIP-2's first stage."""
    directory: Path = tmp_path_factory.mktemp("blip2") / "checkpoint"
    drawing.save_blip2(directory, 5)
    return directory


@pytest.fixture(scope="module")
def half(blip2: Path) -> Path:
    """Its bundle in fp16."""
    output = blip2.parent / "half"
    export_checkpoint(blip2, output, precision="fp16")
    return output


def test_the_command_line_compares(half: Path, blip2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for index, picture in enumerate(draw_pictures(2)):
        paths.append(str(tmp_path / f"{index}.png"))
        picture.save(paths[-1])
    assert main(["match", *paths, "--text", "a red dog", "-b", str(half), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == paths
    assert all(set(line) == {"image", "text", "probability", "cosine"} for line in lines)
    from transformers import Blip2ForImageTextRetrieval, Blip2Processor

    model = Blip2ForImageTextRetrieval.from_pretrained(blip2)
    processor = Blip2Processor.from_pretrained(blip2, backend="pil")
    probability, cosine = scores("blip-2-itm", model, processor, draw_pictures(2)[1], "a red dog")
    assert lines[1]["probability"] == pytest.approx(probability, abs=0.02)
    assert lines[1]["cosine"] == pytest.approx(cosine, abs=0.02)
    assert main(["match", paths[0], "--text", "a red dog", "-b", str(half)]) == 0
    assert capsys.readouterr().out.startswith("probability 0.")


def test_the_command_line_embeds(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(tmp_path / "picture.png")
    draw_pictures(1)[0].save(picture)
    assert main(["embed", picture, "-b", str(half), "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["image"] == picture
    assert np.shape(line["embedding"]) == (5, 20)
    target = tmp_path / "texts.npy"
    texts = ["--text", "a dog", "--text", "two cats"]
    assert main(["embed", *texts, "-b", str(half), "--output", str(target)]) == 0
    vectors = np.load(target)
    assert vectors.shape == (2, 20)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    assert main(["embed", "-b", str(half)]) == 2
    assert main(["embed", picture, "--text", "a", "-b", str(half)]) == 2
    assert main(["inspect", str(half)]) == 0
    assert "match_logits" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_broken_picture_fails_alone(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_size: str
) -> None:
    for name, picture in zip("abc", draw_pictures(3), strict=True):
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"half a pict")
    good = [str(tmp_path / name) for name in ("a.png", "c.png")]
    shared = ["-b", str(half), "--batch-size", batch_size, "--json"]
    texts = ["--text", "a dog", "--text", "two cats"]
    for command, each in ((["match", str(tmp_path), *texts], 2), (["embed", str(tmp_path)], 1)):
        assert main([*command, *shared]) == 1
        output = capsys.readouterr()
        assert [json.loads(line)["image"] for line in output.out.splitlines()] == [
            one for one in good for _ in range(each)
        ]
        assert [line.partition("; ")[0] for line in output.err.splitlines()] == [
            f"error: {tmp_path / 'b.png'}: not a picture in one of the formats {', '.join(FORMATS)}"
        ]
    target = tmp_path / "vectors.npy"  # a row of the array belongs to each picture, so that none can be left out
    assert main(["embed", str(tmp_path), "-b", str(half), "--output", str(target)]) == 1
    assert f"b.png: not a picture in one of the formats {', '.join(FORMATS)}" in (error := capsys.readouterr().err)
    assert f"{target} was not written, because it would lack the row of this picture" in error
    assert not target.exists()


def test_missing_pictures_are_found_before_the_bundle_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_pictures(1)[0].save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    target = tmp_path / "vectors.npy"
    for wrong, problem in (
        ("nope.png", "no such file"),
        ("empty", "expected a folder of pictures"),
        ("*.jpg", "no picture matches this pattern"),
    ):
        pictures = [str(tmp_path / name) for name in ("a.png", wrong)]
        assert main(["embed", *pictures, "-b", str(tmp_path / "no bundle"), "--output", str(target)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{pictures[1]}: {problem}" in line
        assert line.endswith(f"{target} was not written, because it would lack the row of this picture")


def test_vectors_are_not_lost_with_their_file(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "--text", "a dog", "--text", "a cat", "-b", str(half), "--output", "/dev/full"]) == 1
    output = capsys.readouterr()
    assert [json.loads(line)["text"] for line in output.out.splitlines()] == ["a dog", "a cat"]
    assert "the disk is full" in output.err
    assert main(["embed", "--text", "a dog", "-b", str(half), "--output", str(tmp_path / "v.txt")]) == 2
    assert "expected --output to be a file with the suffix .npy" in capsys.readouterr().err


def test_channel_order_of_arrays(half: Path) -> None:
    matcher, picture = Matcher.load(half), draw_pictures(1)[0]
    frame = np.asarray(picture)[..., ::-1]
    assert matcher.match(frame, "a dog", channels="bgr") == matcher.match(picture, "a dog")
    assert matcher.match(frame, "a dog") != matcher.match(picture, "a dog")
    np.testing.assert_array_equal(matcher.embed_image(frame, channels="bgr"), matcher.embed_image(picture))
    probabilities = matcher.probabilities([picture], [["a dog"]])
    assert matcher.probabilities([frame], [["a dog"]], channels="bgr") == probabilities


def test_an_error_of_calibrate_names_the_bundle(half: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for images in (None, tmp_path):
        with pytest.raises(BundleError, match=f"^{re.escape(str(half))} compares .* cannot caption them"):
            calibrate(half, output, images=images, references=References((), "cider >= 1"))
    assert not output.exists()


def test_what_does_not_fit_is_told_in_a_line(half: Path) -> None:
    matcher, picture = Matcher.load(half, threads=1), draw_pictures(1)[0]
    with pytest.raises(PromptError, match="43 tokens, but the model takes at most 40"):
        matcher.match(picture, "a " * 41)
    with pytest.raises(PromptError, match="the text is empty"):
        matcher.match(picture, " ")
    for token, does in (("<image>", "marks a picture"), ("[SEP]", "is a special token of this model")):
        for call in (matcher.embed_text, lambda text: matcher.match(picture, text)):
            with pytest.raises(PromptError, match=f"the text contains {re.escape(token)}, which {does}; remove it"):
                call(f"two {token} cats")
    with pytest.raises(UsageError, match="batch_size"):
        list(matcher.match_many([picture], ["a"], batch_size=0))
    with pytest.raises(BundleError, match="cannot caption them; use match or embed instead"):
        Captioner.load(half)


@pytest.mark.parametrize("kind", ["blip-2-itm", "blip-itm", "clip"])
def test_a_checkpoint_is_written_as_it_was_read(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "checkpoint", 0)
    model = load_model(tmp_path / "checkpoint")
    save_checkpoint(model, tmp_path / "copy", like=tmp_path / "checkpoint")
    copy = load_model(tmp_path / "copy")
    assert copy.config == model.config
    theirs, ours = model.state_dict(), copy.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(CheckpointError, match="generates no text"):
        load_checkpoint(tmp_path / "copy")


def test_a_qformer_that_reads_no_text(blip2: Path, tmp_path: Path) -> None:
    values = json.loads((blip2 / "config.json").read_text())
    values["qformer_config"]["use_qformer_text_input"] = False
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="use_qformer_text_input is false"):
        load_model(tmp_path)
