"""Reads and writes checkpoints of a vision encoder alone: its ``vision_config`` as ``config.json``, and its weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2edge.errors import CheckpointError
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.checkpoint.stored.tensors import TensorFiles
from blip2edge.model.config import VisionEncoderConfig
from blip2edge.model.interfaces import VisionModule
from blip2edge.model.layers import shapes_of
from blip2edge.model.vision.registry import REFUSED, VISION_ENCODERS, WHOLE_MODELS, build_vision, vision_encoder
from blip2edge.model.weights.rules import WeightMap, under


def is_encoder(directory: Path) -> bool:
    """Returns whether only the vision encoder of a checkpoint can be used (:func:`load_encoder`).

    This is so if the checkpoint holds only a vision encoder, or a model such as SigLIP, which is neither a captioner
    nor a retrieval model that this project supports.
    """
    path = directory / "config.json"
    known = VISION_ENCODERS.keys() | WHOLE_MODELS.keys() | REFUSED.keys()
    return path.is_file() and read_checkpoint_json(path).get("model_type") in known


def encoder_config(directory: Path, size: tuple[int, int] | None = None) -> VisionEncoderConfig:
    """Returns the config of the encoder that :func:`load_encoder` reads, without reading weights.

    Raises:
        CheckpointError: The encoder cannot encode pictures of this size.
        UnsupportedModelError: The encoder is not supported.
    """
    with torch.device("meta"):
        return _for_size(build_vision(_read_config(directory)), size, directory).config


def _read_config(directory: Path) -> VisionEncoderConfig:
    """Returns the config of an encoder's checkpoint, for the picture size that the checkpoint names."""
    values = read_checkpoint_json(directory / "config.json")
    model_type = values.get("model_type")
    if model_type in WHOLE_MODELS:
        model_type, values = WHOLE_MODELS[model_type], values.get("vision_config", {})
    return vision_encoder(model_type).read_config(values)


def load_encoder(directory: Path, size: tuple[int, int] | None = None) -> VisionModule:
    """Reads a vision encoder in eval mode, float32.

    Args:
        directory: The checkpoint of the encoder, or of a whole model with this encoder.
        size: Height and width of the pictures that the preprocessing makes, in pixels; None for the encoder's size.

    Raises:
        CheckpointError: Config and tensors do not fit together, or the encoder cannot encode pictures of this size.
        UnsupportedModelError: The encoder is not supported.
    """
    config = _read_config(directory)
    row = vision_encoder(config.kind)
    with torch.device("meta"):
        module = build_vision(config)
    shapes = shapes_of(module)
    files = TensorFiles(directory)
    try:
        prefix = row.prefix if any(name.startswith(row.prefix) for name in files.shapes) else ""
        cut = () if getattr(config, "post_norm", True) else row.cut
        names = WeightMap(under("", prefix, row.rules(config)), (*row.left_out, *cut))
        found = {name: shape for name, shape in files.shapes.items() if 0 not in shape}  # no registers: an empty tensor
        names.check(shapes, found)
        state = {ours: files.read(names.sources(ours)).to(torch.float32, copy=True) for ours in shapes}
    finally:
        files.close()
    module.load_state_dict(state, assign=True)
    return _for_size(module.eval(), size, directory)


def _for_size(module: VisionModule, size: tuple[int, int] | None, directory: Path) -> VisionModule:
    """Returns the encoder, or a copy of it for pictures of another ``size`` (height and width in pixels).

    Raises:
        CheckpointError: The encoder cannot be resized, or the size is not square.
    """
    side = module.config.image_size
    if size is None or size == (side, side):
        return module
    resized = vision_encoder(module.config.kind).resized
    if resized is None or size[0] != size[1]:
        raise CheckpointError(
            f"{directory}: the vision encoder takes pictures of {side}x{side} pixels, but the preprocessing makes "
            f"{size[0]}x{size[1]}",
            "use the preprocessing that was saved with this checkpoint",
        )
    return resized(module, size[0])


def save_encoder(module: VisionModule, directory: Path) -> None:
    """Writes config and weights of a vision encoder to a directory, for :func:`load_encoder`.

    The directory is created if it is missing. The preprocessing is not written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    row = vision_encoder(module.config.kind)
    names = WeightMap(under("", row.prefix, row.rules(module.config)))
    tensors: dict[str, Tensor] = {}
    for ours, tensor in module.state_dict().items():
        for source, part in names.split(ours, tensor.detach()).items():
            tensors[source] = part.contiguous().cpu()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(module.config.to_hf(), indent=2) + "\n", encoding="utf-8")
