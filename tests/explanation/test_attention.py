"""The attention weights of ``explain`` are the softmax of the model, in every kind of bridge and in every precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

import torch

from blip2edge.bundle.bundle import Bundle
from blip2edge.calibration.pipeline import calibrate
from blip2edge.explanation.attention import AttentionLayer, LayerWeights, layer_weights
from blip2edge.explanation.pipeline import explain
from blip2edge.explanation.probe import Probe, open_bridge
from blip2edge.export.pipeline import export_checkpoint
from tests.drawing import Drawn, draw_pictures, save
from tests.explanation.oracle import torch_attention
from tests.export.test_elastic import mark
from tests.families.drawing_blip import save_blip2
from tests.families.drawing_idefics import draw_idefics
from tests.families.drawing_instruct import draw_instructblip
from tests.families.test_pool import save_pool

PICTURE = draw_pictures(1, 3)[0]


def opened(bundle: Path, prompt: str | None = None) -> Probe:
    probe = open_bridge(Bundle.open(bundle), prompt, None, 1, gated=False)
    assert probe is not None
    return probe


def averaged(probe: Probe, found: list[Any], embeds: int) -> list[LayerWeights]:
    grid = probe.grid
    return [
        layer_weights(layer, one, embeds, grid.rows, grid.columns)
        for layer, one in zip(probe.layers, found, strict=True)
    ]


def assert_same(probe: Probe, directory: Path, *inputs: torch.Tensor) -> list[LayerWeights]:
    """The weights and visual tokens of one picture are torch's; every query's weights sum to 1."""
    weights, tokens, _ = probe(PICTURE)
    pixels = probe.preprocessing.batch([PICTURE])
    expected, visual = torch_attention(directory, pixels, len(tokens), *inputs)
    assert len(weights) == len(expected)
    embeds = probe.bundle.graph("vision_encoder").spec.outputs[0].dims[1]
    assert isinstance(embeds, int)
    for ours, theirs in zip(weights, averaged(probe, expected, embeds), strict=True):
        for part in ("patches", "before", "queries"):
            np.testing.assert_allclose(getattr(ours, part), getattr(theirs, part), atol=2e-5)
        total = ours.patches.sum(axis=(1, 2)) + ours.before + ours.queries
        np.testing.assert_allclose(total, 1, atol=1e-5)
        assert ours.patches.std(axis=(1, 2)).max() > 0.01, "equal weights on all patches prove nothing"
    np.testing.assert_allclose(tokens, visual[0], atol=1e-3)
    return weights


def test_the_weights_are_those_of_transformers(tiny_checkpoint: Drawn, tiny_bundle: Path) -> None:
    probe = opened(tiny_bundle)
    assert (probe.grid.rows, probe.grid.columns, probe.grid.before) == (4, 4, 1)
    assert [layer.layer for layer in probe.layers] == [0]  # every second of two layers
    weights = assert_same(probe, tiny_checkpoint.directory)
    model: Any = tiny_checkpoint.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            pixels = torch.from_numpy(probe.preprocessing.batch([PICTURE]))
            states = model.vision_model(pixels).last_hidden_state
            found = model.qformer(
                query_embeds=model.query_tokens, encoder_hidden_states=states, output_attentions=True
            ).cross_attentions
    finally:
        model.set_attn_implementation(before)
    crossed = [one.numpy() for one in found if one is not None and one.shape[-1] == states.shape[1]]
    for ours, theirs in zip(weights, averaged(probe, crossed, states.shape[1]), strict=True):
        np.testing.assert_allclose(ours.patches, theirs.patches, atol=2e-5)


def test_half_and_int8(tiny_checkpoint: Drawn, tiny_bundle: Path, tmp_path: Path) -> None:
    for at, picture in enumerate(draw_pictures(4)):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture.save(tmp_path / "pictures" / f"{at}.png")
    half = export_checkpoint(tiny_checkpoint.directory, tmp_path / "half", precision="fp16").bundle
    bridge = ["vision_encoder", "bridge"]
    int8 = calibrate(tiny_bundle, tmp_path / "int8", images=tmp_path / "pictures", activations=bridge, threads=1).bundle
    int4 = calibrate(tiny_bundle, tmp_path / "int4", images=tmp_path / "pictures", formats=["bridge=int4"], threads=1)
    exact = opened(tiny_bundle)(PICTURE)[0]
    for bundle, least in ((half, 0.9999), (int8, 0.98), (int4.bundle, 0.8)):
        weights, _, heads = opened(bundle)(PICTURE)
        assert heads == 3
        for ours, theirs in zip(weights, exact, strict=True):
            total = ours.patches.sum(axis=(1, 2)) + ours.before
            np.testing.assert_allclose(total, 1, atol=1e-3)
            cosine = np.corrcoef(ours.patches.ravel(), theirs.patches.ravel())[0, 1]
            assert cosine > least
            assert not np.array_equal(ours.patches, theirs.patches)


def pool(directory: Path, drawn: Drawn) -> tuple[torch.Tensor, ...]:
    save_pool(directory, drawn)
    return ()


def retrieval(directory: Path, drawn: Drawn) -> tuple[torch.Tensor, ...]:
    save_blip2(directory, 0)
    return ()


BRIDGES: dict[str, tuple[Callable[[Path, Drawn], tuple[torch.Tensor, ...]], int]] = {
    "pool": (pool, 1),
    "retrieval": (retrieval, 1),
}


@pytest.mark.parametrize("kind", BRIDGES)
def test_other_bridges(kind: str, tiny_checkpoint: Drawn, tmp_path: Path) -> None:
    save, layers = BRIDGES[kind]
    inputs = save(tmp_path / "checkpoint", tiny_checkpoint)
    probe = opened(export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle)
    assert len(assert_same(probe, tmp_path / "checkpoint", *inputs)) == layers


@pytest.mark.slow
def test_the_first_queries_of_an_elastic_bundle(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", seed=4)
    mark(tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle
    for queries in (2, None):
        probe = open_bridge(Bundle.open(bundle), None, queries, 1, gated=False)
        assert probe is not None
        ids = torch.arange(queries or 5)[None]
        weights, tokens, _ = probe(PICTURE)
        expected, visual = torch_attention(
            tmp_path / "checkpoint", probe.preprocessing.batch([PICTURE]), len(tokens), query_ids=ids
        )
        assert len(tokens) == len(weights[0].patches) == ids.shape[1]
        np.testing.assert_allclose(weights[0].patches, averaged(probe, expected, 17)[0].patches, atol=2e-5)
        np.testing.assert_allclose(tokens, visual[0], atol=1e-3)


def test_an_instruction_changes_the_weights(tmp_path: Path) -> None:
    draw_instructblip(tmp_path / "checkpoint", 0, "t5")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle
    found = []
    for prompt in ("A short image caption.", "what is it doing?"):
        probe = opened(bundle, prompt)
        assert probe.instruction == prompt
        inputs = [torch.from_numpy(probe.others[name]) for name in ("instruction_ids", "instruction_mask")]
        found.append(assert_same(probe, tmp_path / "checkpoint", *inputs))
    first, second = (layers[-1].patches for layers in found)
    assert np.abs(first - second).max() > 1e-3


def test_a_perceiver_and_the_gates_of_flamingo(tmp_path: Path) -> None:
    model, _ = draw_idefics(tmp_path / "checkpoint", 0)
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle
    weights = assert_same(opened(bundle), tmp_path / "checkpoint")
    assert [one.layer for one in weights] == [0, 1]
    assert min(one.queries.min() for one in weights) > 0  # the latents attend to themselves as well
    report = explain([PICTURE], bundle, tmp_path / "out", threads=1)
    layers = model.model.gated_cross_attn_layers
    expected = [
        {
            "layer": at,
            "before": at * model.config.cross_layer_interval,
            "attention": pytest.approx(torch.tanh(layer.alpha_cross_attn).item(), abs=1e-6),
            "feed_forward": pytest.approx(torch.tanh(layer.alpha_dense).item(), abs=1e-6),
            "channels": 1,
        }
        for at, layer in enumerate(layers)
    ]
    assert report.document["gates"] == expected
    assert len(expected) > 1
    assert json.loads((tmp_path / "out" / "explain.json").read_text()) == report.document
    assert (tmp_path / "out" / "gates.png").is_file()


def test_only_gates_without_a_resampler(tmp_path: Path) -> None:
    values = {"use_resampler": False, "additional_vocab_size": 0, "vocab_size": 93, "num_hidden_layers": 2}
    draw_idefics(tmp_path / "checkpoint", 2, **values)
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", verify="sample").bundle
    report = explain([PICTURE], bundle, tmp_path / "out", threads=1)
    assert report.document["gates"]
    assert not report.document["pictures"]
    assert "no bridge with queries" in report.page.read_text(encoding="utf-8")


def test_spread_counts_patches() -> None:
    one = np.zeros((1, 2, 3, 5))
    one[0, :, 0, 1] = 1  # all weight on one patch
    one[0, :, 1, 1:] = 1 / 4  # the same on all four
    one[0, :, 2] = [0.5, 0.25, 0.25, 0, 0]
    layer = layer_weights(AttentionLayer(3, "softmax"), one, 5, 2, 2)
    np.testing.assert_allclose(layer.spread, [1, 4, 2])
    np.testing.assert_allclose(layer.before, [0, 0, 0.5])
