"""Fused attention whose keys are also used to merge patches (``model/vision/token_merging.py``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the graph is traced from torch")
from torch import nn  # noqa: E402

ir = pytest.importorskip("onnx_ir", reason="graphs are rewritten with onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime", reason="what comes out is run")
pytest.importorskip("onnxscript", reason="export needs onnxscript")

from blip2edge.bundle.schema import VISION, Axis, GraphSpec, TensorSpec  # noqa: E402
from blip2edge.export.to_onnx import trace  # noqa: E402
from blip2edge.export.weights import write_weights  # noqa: E402
from blip2edge.model.config import VisionConfig  # noqa: E402
from blip2edge.model.vision.vit import VisionTransformer  # noqa: E402
from blip2edge.optimization.graph import clean, prepare  # noqa: E402
from blip2edge.optimization.passes.attention import fuse_attention  # noqa: E402

CONFIG = VisionConfig(32, 64, 3, 4, image_size=32, patch_size=8)


class Wrapped(nn.Module):
    """As the exporter wraps it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision = VisionTransformer(config)

    def forward(self, pixel_values: Any) -> Any:
        return self.vision(pixel_values)


def written(tokens: int, folder: Path) -> tuple[Path, Any]:
    """A graph with large biases on queries, keys and values, and its module."""
    config = replace(CONFIG, merge_tokens=tokens)
    torch.manual_seed(4)
    module = Wrapped(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.4 if parameter.ndim > 1 else 1.0)
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
    with torch.device("meta"):
        empty = Wrapped(config).eval()
    batch = Axis("batch", 1, 1, 8)
    spec = GraphSpec(
        VISION,
        (TensorSpec("pixel_values", "float32", (batch, 3, 32, 32)),),
        (TensorSpec("image_embeds", "float32", (batch, config.num_embeds, 32)),),
    )
    traced = trace(empty, spec)
    state = module.state_dict()
    write_weights(traced, state.__getitem__, folder / "g.data", torch.float32)
    ir.save(traced.model, folder / "g.onnx")
    return folder / "g.onnx", module


@pytest.mark.parametrize("tokens", [0, pytest.param(4, marks=pytest.mark.slow), 7])
def test_fused_attention_keeps_pairs_and_sizes(tokens: int, tmp_path: Path) -> None:
    path, module = written(tokens, tmp_path)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(pixels)).numpy()
    model = ir.load(path)
    prepare(model)
    assert fuse_attention(model) == CONFIG.num_layers
    model.graph.sort()
    clean(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("MultiHeadAttention") == CONFIG.num_layers
    assert "Softmax" not in kinds
    ir.save(model, tmp_path / "fused.onnx")
    for file in (path, tmp_path / "fused.onnx"):
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"pixel_values": pixels})
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()
