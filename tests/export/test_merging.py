"""Exports that merge patches: compared with torch on the same pairs, and refused if pairs or rows are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="export needs torch")
pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="exports are verified in ONNX Runtime")

from blip2edge.bundle.bundle import Bundle  # noqa: E402
from blip2edge.calibration.pipeline import calibrate  # noqa: E402
from blip2edge.errors import ParityError, UsageError  # noqa: E402
from blip2edge.export import verify  # noqa: E402
from blip2edge.export.graphs import GRAPHS, graphs_of  # noqa: E402
from blip2edge.export.merging import PAIRS, TOLERANCES, GuidedMatching, merging_of  # noqa: E402
from blip2edge.model.checkpoint.directory import load_model  # noqa: E402
from blip2edge.model.config import VisionConfig  # noqa: E402
from blip2edge.model.models import build_model, with_merged_tokens  # noqa: E402
from blip2edge.model.vision.token_merging import TokenMatching  # noqa: E402
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession  # noqa: E402
from blip2edge.runtime.captioning.captioner import Captioner  # noqa: E402
from tests.drawing import Drawn, draw_pictures  # noqa: E402
from tests.engine.families import FAMILIES  # noqa: E402

Export = Callable[..., Path]
COUNT = 3  # the tiny checkpoint has 16 patches in 2 layers


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Drawn) -> Path:
    return tiny_checkpoint.directory


def merged_model(checkpoint: Path, tokens: int) -> Any:
    plain = load_model(checkpoint)
    model = build_model(with_merged_tokens(plain.config, tokens))
    model.load_state_dict(plain.state_dict())
    return model.eval()


@pytest.mark.parametrize("mode", ["full", "sample"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_precision_is_verified_both_ways(
    mode: str, precision: str, quick: Export, checkpoint: Path, tmp_path: Path
) -> None:
    bundle = quick(checkpoint, tmp_path / "bundle", verify=mode, precision=precision, merge_tokens=COUNT)
    assert not list(bundle.glob(".choices*"))
    manifest = Bundle.open(bundle).manifest
    assert json.loads((bundle / "bundle.json").read_text())["merging"]["merge_tokens"] == COUNT
    record: Any = manifest.merging
    assert (record.embeds, record.embeds_before) == (17 - 2 * COUNT, 17)
    if mode == "full":
        assert 0.5 < record.lowest <= record.cosine < 0.9999  # it is another model, and says how far
        assert (record.output, record.pictures) == ("visual_tokens", 8)
    else:
        assert record.cosine is None
    vision = manifest.graphs["vision_encoder"]
    found = {parity.output: parity for parity in vision.parity}
    assert set(found) == {"image_embeds", PAIRS}
    assert all(parity.relative <= parity.tolerance for parity in vision.parity)
    bounds = {"image_embeds": verify.TOLERANCES[precision], PAIRS: TOLERANCES[precision]}
    assert {name: parity.tolerance for name, parity in found.items()} == bounds
    assert vision.spec.outputs[0].dims[1] == manifest.graphs["bridge"].spec.inputs[0].dims[1] == record.embeds
    assert any("token matching" in why for why in vision.fp32_exceptions) == (precision != "fp32")
    if precision != "bf16":
        assert Captioner.load(bundle, threads=1).caption(draw_pictures(1)[0], max_new_tokens=3).tokens


def test_no_merging_is_not_mentioned(tiny_bundle: Path) -> None:
    assert "merging" not in json.loads((tiny_bundle / "bundle.json").read_text())
    assert Bundle.open(tiny_bundle).manifest.merging is None


@torch.no_grad()
def test_the_graph_is_the_merged_model(quick: Export, checkpoint: Path, tmp_path: Path) -> None:
    bundle = quick(checkpoint, tmp_path / "bundle", merge_tokens=COUNT)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = merged_model(checkpoint, COUNT).vision(pixels).numpy()
    session = OnnxRuntimeSession(bundle / "vision_encoder.onnx", threads=1)
    got = session.run({"pixel_values": pixels.numpy()})["image_embeds"]
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


class WorstPairs(TokenMatching):
    """Merges what is least alike."""

    def choose(self, scores: Any) -> Any:
        order, partner = super().choose(-scores)
        return order, partner


class NextPairs(TokenMatching):
    """Merges each patch that is merged with the second nearest to it."""

    def choose(self, scores: Any) -> Any:
        best = scores.amax(dim=-1)
        nearest = (scores == best[:, :, None]).to(scores.dtype)
        return best.topk(best.shape[1]).indices, (scores - 4 * nearest).argmax(dim=-1)


class LostSizes(TokenMatching):
    """Forgets how many patches a slot stands for."""

    def forward(self, keys: Any, sizes: Any, count: int) -> Any:
        pairs = super().forward(keys, sizes, count)
        return pairs._replace(bias=torch.zeros_like(pairs.bias))


@pytest.mark.parametrize(
    ("wrong", "named", "precision"),
    [
        (WorstPairs, rf"{PAIRS} is off by \S+ in cosine", "fp32"),
        (WorstPairs, rf"{PAIRS} is off by \S+ in cosine", "fp16"),
        (NextPairs, rf"{PAIRS} is off by \S+ in cosine", "fp32"),
        (NextPairs, rf"{PAIRS} is off by \S+ in cosine", "fp16"),
        (LostSizes, r"image_embeds is off by \S+ of its largest value", "fp32"),
    ],
)
@pytest.mark.parametrize("mode", ["full", "sample"])
def test_wrong_pairs_and_lost_sizes_are_published_by_neither_check(
    wrong: type[TokenMatching],
    named: str,
    precision: str,
    mode: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph is traced from another module than the one that it is held to."""
    from blip2edge.export import pipeline

    def traced_wrong(module: Any, spec: Any) -> Any:
        if spec.name == "vision_encoder":
            module.vision.matching = wrong()
        return real(module, spec)

    real = vars(pipeline)["trace"]  # the shared one
    monkeypatch.setattr(pipeline, "graphs_of", lambda _: {"vision_encoder": GRAPHS["vision_encoder"]})
    monkeypatch.setattr(pipeline, "trace", traced_wrong)
    monkeypatch.setattr(verify, "trace", traced_wrong)
    with pytest.raises(ParityError, match=f"vision_encoder: {named}"):
        pipeline.export_checkpoint(
            checkpoint, tmp_path / "bundle", verify=mode, precision=precision, merge_tokens=COUNT
        )
    assert not list(tmp_path.iterdir())


def test_a_tie_may_go_either_way() -> None:
    """Two pairs as near as each other: whichever a graph takes, nothing falls short."""
    keys = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[None, None]
    for partner, shortfall in ((0, 0.0), (1, 0.0)):
        guide = GuidedMatching([np.array([[0, 1]]), np.array([[partner, 0]])])
        pairs = guide(keys, torch.ones(1, 4), 1)
        assert guide.shortfall == shortfall
        assert pairs.weights[0, :, 0].tolist() == [0.5 * (partner == 0), 0.5 * (partner == 1)]
    guide = GuidedMatching([np.array([[1, 0]]), np.array([[0, 0]])])  # the second is as far as can be
    guide(keys, torch.ones(1, 4), 1)
    assert guide.shortfall == pytest.approx(1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gap_that_is_no_number_is_infinite(value: float) -> None:
    guide = GuidedMatching([np.array([[0, 1]]), np.array([[0, 0]])])
    guide.shortfall = 0.25
    keys = torch.tensor([[9.0, 9.0], [1.0, 0.0], [value, 0.0], [1.0, 0.0], [0.0, 1.0]])[None, None]
    guide(keys, torch.ones(1, 4), 1)
    assert guide.shortfall == np.inf


@pytest.mark.parametrize(
    ("order", "partner", "told"),
    [
        ([[0, 0]], [[0, 0]], "order of 2 patches does not list every"),
        ([[1, 2]], [[0, 0]], "order of 2 patches does not list every"),
        ([[0, 1]], [[0, 2]], "into the patches 0 to 1, got 0 to 2"),
    ],
)
def test_what_is_no_choice_is_refused(order: list[list[int]], partner: list[list[int]], told: str) -> None:
    keys = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[None, None]
    guide = GuidedMatching([np.array(order), np.array(partner)])
    with pytest.raises(ParityError, match=told):
        guide(keys, torch.ones(1, 4), 1)


SETS = [family for family in FAMILIES if family != "llava"]


@pytest.mark.parametrize("family", SETS)
@torch.no_grad()
def test_every_graph_follows_the_number_that_is_left(family: str, tmp_path: Path) -> None:
    """Bridges, frames, decoders that look at patches, class tokens: torch gives the shapes that the graphs declare."""
    FAMILIES[family](tmp_path / "checkpoint")
    plain = load_model(tmp_path / "checkpoint")
    config = with_merged_tokens(plain.config, 2)
    assert isinstance(config.vision, VisionConfig)
    model = build_model(config)
    model.load_state_dict(plain.state_dict())
    model.eval()
    assert config.vision.num_embeds == plain.config.vision.num_embeds - 2 * config.vision.num_layers
    for graph in graphs_of(config).values():
        spec, module = graph.spec(config), graph.wrap(model)
        sizes = next(verify.cases_of(spec))
        drawn = verify.random_inputs(spec, sizes, np.random.default_rng(0))
        outputs = module(*(torch.from_numpy(array) for array in drawn.values()))
        for tensor, output in zip(spec.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True):
            assert tuple(output.shape) == tensor.shape(sizes), (spec.name, tensor.name)
    record = merging_of(config, model)
    assert record is not None
    assert record.cosine is not None
    assert 0.2 < record.cosine < 1 + 1e-6  # a class token behind a single layer sees no merge


@pytest.mark.slow
def test_a_decoder_that_looks_at_merged_patches(tmp_path: Path) -> None:
    from blip2edge.export.pipeline import export_checkpoint

    FAMILIES["idefics"](tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", merge_tokens=2).bundle
    captioner = Captioner.load(bundle, threads=1)
    texts = {captioner.caption(picture, max_new_tokens=6).tokens for picture in draw_pictures(4)}
    assert len(texts) > 1


def test_a_model_that_reads_patches_in_order_is_refused(tmp_path: Path) -> None:
    from blip2edge.export.pipeline import export_checkpoint

    FAMILIES["llava"](tmp_path / "checkpoint")
    with pytest.raises(UsageError, match=r"changes the order.*llava.*; leave merge_tokens out"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", merge_tokens=1)
    assert not (tmp_path / "bundle").exists()


def test_too_many_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from blip2edge.export.pipeline import export_checkpoint

    with pytest.raises(UsageError, match=r"2 layers and 16 patches; give merge_tokens 1 to 7"):
        export_checkpoint(checkpoint, tmp_path / "bundle", merge_tokens=8)
    assert not (tmp_path / "bundle").exists()


def test_calibration_keeps_the_merging(quick: Export, checkpoint: Path, tmp_path: Path) -> None:
    bundle = quick(checkpoint, tmp_path / "bundle", merge_tokens=COUNT)
    images = tmp_path / "images"
    images.mkdir()
    for index, picture in enumerate(draw_pictures(6)):
        picture.save(images / f"{index}.png")
    calibrate(bundle, tmp_path / "int8", images=images, threads=1)
    manifest = Bundle.open(tmp_path / "int8").manifest
    assert manifest.merging == Bundle.open(bundle).manifest.merging
    assert manifest.graphs["vision_encoder"].precision == "int8"
    assert Captioner.load(tmp_path / "int8", threads=1).caption(draw_pictures(1)[0], max_new_tokens=3).tokens
