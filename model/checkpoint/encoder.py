"""Reads and writes checkpoints of a vision encoder alone: its ``vision_config`` as ``config.json``, and its weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.checkpoint.stored.tensors import TensorFiles
from blip2edge.model.interfaces import VisionModule
from blip2edge.model.layers import shapes_of
from blip2edge.model.vision.registry import VISION_ENCODERS, build_vision, vision_encoder
from blip2edge.model.weights.rules import WeightMap, under


def is_encoder(directory: Path) -> bool:
    """Whether a checkpoint is that of a vision encoder alone, a row of ``vision/registry.py``."""
    path = directory / "config.json"
    return path.is_file() and read_checkpoint_json(path).get("model_type") in VISION_ENCODERS


def load_encoder(directory: Path) -> VisionModule:
    """Reads a vision encoder in eval mode, float32.

    Raises:
        CheckpointError: Config and tensors do not fit together.
        UnsupportedModelError: The encoder is not supported.
    """
    values = read_checkpoint_json(directory / "config.json")
    row = vision_encoder(values.get("model_type"))
    config = row.read_config(values)
    names = WeightMap(under("", row.prefix, row.rules(config)), row.left_out)
    with torch.device("meta"):
        module = build_vision(config)
    shapes = shapes_of(module)
    files = TensorFiles(directory)
    try:
        names.check(shapes, files.shapes)
        state = {ours: files.read(names.sources(ours)).to(torch.float32, copy=True) for ours in shapes}
    finally:
        files.close()
    module.load_state_dict(state, assign=True)
    return module.eval()


def save_encoder(module: VisionModule, directory: Path) -> None:
    """Writes a directory that :func:`load_encoder` reads; created if missing. The preprocessing is not written."""
    directory.mkdir(parents=True, exist_ok=True)
    row = vision_encoder(module.config.kind)
    names = WeightMap(under("", row.prefix, row.rules(module.config)))
    tensors: dict[str, Tensor] = {}
    for ours, tensor in module.state_dict().items():
        for source, part in names.split(ours, tensor.detach()).items():
            tensors[source] = part.contiguous().cpu()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(module.config.to_hf(), indent=2) + "\n", encoding="utf-8")
