"""Vision encoders beside CLIP and EVA: equal to transformers, in training, and in bundles of both precisions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="encoders are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

import torch

from blip2edge.bundle.bundle import Bundle
from blip2edge.engine.builder import BuildOptions, build_engine
from blip2edge.engine.operators import VERSIONS
from blip2edge.engine.prepare import plans_of
from blip2edge.engine.support import check_graph
from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.explanation.grid import patch_grid
from blip2edge.explanation.pipeline import explain
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.export.verify import TOLERANCES
from blip2edge.graph_files import load_graph
from blip2edge.model.checkpoint.directory import load_checkpoint
from blip2edge.model.checkpoint.encoder import load_encoder
from blip2edge.model.checkpoint.image_processor import load_preprocessing, read_image_processor
from blip2edge.model.vision.registry import vision_encoder
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.tensorrt.session import load_tensorrt
from blip2edge.training import run as runs
from blip2edge.training.run import train
from blip2edge.training.setup.pretrained import open_vision
from tests.drawing import draw_pictures
from tests.engine.rtx import HAS_RTX
from tests.families.drawing_encoders import ENCODERS, SIZE, save_encoder
from tests.training.setup.test_build import STEPS, recipe

PICTURE = draw_pictures(1, 5)[0]


def relative(found: Any, wanted: Any) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())


@torch.no_grad()
def features(model: Any, pixels: torch.Tensor, layer: int | None = None) -> torch.Tensor:
    """transformers' last hidden state, or that of a layer."""
    output = model(pixels, output_hidden_states=True)
    return output.last_hidden_state if layer is None else output.hidden_states[layer]


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model, _ = save_encoder(kind, tmp_path, seed=1)
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    section = values.get("vision_config", values)
    for layer, strategy in ((None, "full"), (-1, "full"), (-2, "full"), (1, "full"), (None, "default")):
        section |= {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
        path.write_text(json.dumps(values))
        encoder = load_encoder(tmp_path, (SIZE, SIZE))
        wanted = features(model, pixels, layer)
        if strategy == "default":
            wanted = wanted[:, -((SIZE // 8) ** 2) :]  # the patches alone
        with torch.no_grad():
            found = encoder(pixels)
        assert found.shape == wanted.shape == (2, encoder.config.num_embeds, 24)
        assert relative(found, wanted) < 1e-5
        row = vision_encoder(encoder.config.kind)
        assert row.read_config(encoder.config.to_hf()) == encoder.config
    assert relative(features(model, pixels), features(model, pixels, -1)) > 0.1  # the final norm matters


TRAINED = (
    pytest.param("siglip", "fp32", id="siglip"),
    pytest.param("dinov2-with-registers", "fp32", id="dinov2-with-registers"),
    *(
        pytest.param(kind, precision, marks=pytest.mark.slow)
        for kind, precision in (
            ("siglip", "fp16"),
            ("dinov2", "fp32"),
            ("dinov2", "fp16"),
            ("dinov2-giant", "fp16"),
            ("dinov2-with-registers", "fp16"),
            ("dinov3", "fp32"),
            ("dinov3", "fp16"),
            ("dinov3-gated", "fp16"),
        )
    ),
)


@pytest.mark.parametrize(("kind", "precision"), TRAINED)
def test_trained_and_exported(
    kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Any
) -> None:
    """A training step of stage 2 with the frozen encoder; its embeddings of a picture in a bundle are transformers'."""
    monkeypatch.setattr(runs, "draw_curve", lambda lines, path: False)
    model, processor = save_encoder(kind, tmp_path / kind, seed=3)
    (tmp_path / "blip2").symlink_to(tiny_checkpoint.directory)
    path = recipe(tmp_path, "recipe", f'vision_from = "{kind}"\nlanguage_from = "blip2"', 'bridge = "pool"')
    record = train("stage2", path, tmp_path / "trained", evaluation_scenes=0)
    assert record["phases"]["stage2"]["final_loss"] > 0
    assert load_checkpoint(tmp_path / "trained").config.family == "blip2edge"
    verify = "sample" if precision == "fp16" else "full"
    wanted = features(model, processor(PICTURE, return_tensors="pt")["pixel_values"]).numpy()
    bundle = Bundle.open(
        export_checkpoint(tmp_path / "trained", tmp_path / "bundle", precision=precision, verify=verify).bundle
    )
    pixels = Preprocessing.from_json(bundle.manifest.preprocessing).batch([PICTURE])
    session = OnnxRuntimeSession(bundle.file("vision_encoder.onnx"), 1)
    dtype = np.float16 if precision == "fp16" else np.float32
    found = session.run({"pixel_values": pixels.astype(dtype)})["image_embeds"]
    assert found.shape == wanted.shape
    assert relative(found, wanted) < TOLERANCES[precision]
    spec = bundle.graph("vision_encoder").spec
    grid = patch_grid(load_graph(bundle.file("vision_encoder.onnx")), spec)  # of `explain`
    assert (grid.rows, grid.columns, grid.before) == (4, 4, wanted.shape[1] - 16)
    plan = next(plan for plan in plans_of(bundle, VERSIONS["rtx"], capacity=32) if plan.name == "vision_encoder")
    for name, version in VERSIONS.items():
        assert check_graph(plan.model(), version) == [], name
    if precision == "fp16" and HAS_RTX:
        file = tmp_path / "vision.engine"
        built = build_engine(load_tensorrt("rtx"), plan, VERSIONS["rtx"], file, BuildOptions("rtx", (86,)))
        assert built.size == file.stat().st_size > 0


@pytest.mark.slow
def test_both_stages_and_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Any) -> None:
    """A Q-Former and its text head, trained in both stages on a DINOv2's registers and patches."""
    monkeypatch.setattr(runs, "draw_curve", lambda lines, path: False)
    save_encoder("dinov2-with-registers", tmp_path / "dino", seed=5)
    (tmp_path / "blip2").symlink_to(tiny_checkpoint.directory)
    parts = 'vision_from = "dino"\nlanguage_from = "blip2"'
    first = recipe(tmp_path, "first", parts)
    first.write_text(first.read_text() + f"[stage1]\n{STEPS}embed_dim = 8\nmax_tokens = 12\n")
    train("stage1", first, tmp_path / "stage1")
    second = recipe(tmp_path, "second", f'{parts}\nbridge_from = "stage1"')
    train("stage2", second, tmp_path / "trained", evaluation_scenes=0)
    config = load_checkpoint(tmp_path / "trained").config
    assert (config.family, config.bridge.kind, config.vision.num_embeds) == ("blip2edge", "qformer", 1 + 4 + 16)
    bundle = export_checkpoint(tmp_path / "trained", tmp_path / "bundle").bundle
    document = explain([PICTURE], bundle, tmp_path / "out", threads=1).document
    assert document["grid"] == {"rows": 4, "columns": 4, "before": 5, "stride": [8, 8]}


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov3"])
def test_the_preprocessing_is_that_of_the_file(kind: str, tmp_path: Path) -> None:
    _, processor = save_encoder(kind, tmp_path)
    preprocessing = load_preprocessing(tmp_path).preprocessing
    again = Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json())))
    for picture in (*draw_pictures(2, 7), PICTURE.resize((90, 41)), PICTURE.resize((20, 64))):
        wanted = processor(picture, return_tensors="pt")["pixel_values"].numpy()
        np.testing.assert_allclose(again.batch([picture]), wanted, atol=2e-6)
    assert ("rescale_first" in preprocessing.to_json()) == (kind == "dinov3")


def test_defaults_of_dinov3s_image_processor() -> None:
    found = read_image_processor({"image_processor_type": "DINOv3ViTImageProcessorFast"}).preprocessing
    assert (found.size, found.crop, found.resample) == ({"height": 224, "width": 224}, None, 2)
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    picture = draw_pictures(1, 3)[0]
    crop = {"height": 40, "width": 40}
    padded = replace(found, size={"height": 32, "width": 36}, crop=crop)(picture)
    inner = replace(found, size={"height": 32, "width": 36})(picture)
    np.testing.assert_array_equal(padded[:, 4:36, 2:38], inner)
    assert np.unique(padded[0, :4]).size == 1  # black, normalized


def test_tensors_beyond_the_config_are_refused(tmp_path: Path) -> None:
    save_encoder("siglip", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"its config does not describe: encoder\.layers\.2"):
        load_encoder(tmp_path)


def test_another_size_than_the_positions_is_refused(tmp_path: Path) -> None:
    save_encoder("siglip", tmp_path)
    with pytest.raises(CheckpointError, match="takes pictures of 32x32 pixels, but the preprocessing makes 48x48"):
        load_encoder(tmp_path, (48, 48))


def test_naflex_is_refused_by_name(tmp_path: Path) -> None:
    for model_type in ("siglip2", "siglip2_vision_model"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UnsupportedModelError, match="SigLIP 2 NaFlex reads a varying number of patches"):
            load_encoder(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Siglip2ImageProcessor"}')
        with pytest.raises(UnsupportedModelError, match="SigLIP 2 NaFlex reads a varying number of patches"):
            open_vision(str(tmp_path), tmp_path)
