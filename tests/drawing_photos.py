"""Draws an EfficientNet-Lite, and a captioner with one: random weights, a Q-Former, a tiny OPT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from blip2edge.model.checkpoint.encoder import save_encoder
from blip2edge.model.config import CaptionerConfig, QFormerConfig
from blip2edge.model.vision.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig, fold_batch_norms

PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""What the package's documentation does: the shorter side to the picture's size, bilinear; ImageNet's mean and std."""


def package_state(config: EfficientNetLiteConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the package ``efficientnet-lite-pytorch``, large enough to matter; eight classes."""
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def add(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        fan_in = inputs * kernel * kernel
        state[f"{conv}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=draw) * (2 / fan_in) ** 0.5
        state[f"{norm}.weight"] = torch.rand(outputs, generator=draw) + 0.5
        state[f"{norm}.bias"] = torch.randn(outputs, generator=draw) * 0.3
        state[f"{norm}.running_mean"] = torch.randn(outputs, generator=draw) * 0.3
        state[f"{norm}.running_var"] = torch.rand(outputs, generator=draw) + 0.5

    add("_conv_stem", "_bn0", 32, 3, 3)
    shapes = config.blocks()
    for number, shape in enumerate(shapes):
        name = f"_blocks.{number}."
        if shape.inner != shape.inputs:
            add(f"{name}_expand_conv", f"{name}_bn0", shape.inner, shape.inputs, 1)
        add(f"{name}_depthwise_conv", f"{name}_bn1", shape.inner, 1, shape.kernel)
        add(f"{name}_project_conv", f"{name}_bn2", shape.outputs, shape.inner, 1)
    add("_conv_head", "_bn1", config.hidden_size, shapes[-1].outputs, 1)
    state["_fc.weight"] = torch.randn(8, config.hidden_size, generator=draw) * 0.1
    state["_fc.bias"] = torch.randn(8, generator=draw) * 0.1
    return state


def encoder(config: EfficientNetLiteConfig) -> EfficientNetLite:
    """An encoder with random weights, in eval mode."""
    model = EfficientNetLite(config)
    model.load_state_dict(fold_batch_norms(package_state(config), config))
    return model.eval()


def write_preprocessing(directory: Path, config: EfficientNetLiteConfig) -> None:
    """Writes the preprocessing of the package."""
    size = config.image_size
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING | sizes))


def save_encoder_alone(directory: Path, config: EfficientNetLiteConfig) -> None:
    """Writes a checkpoint of the encoder alone."""
    save_encoder(encoder(config), directory)
    write_preprocessing(directory, config)


def save_captioner(directory: Path, like: Path, config: EfficientNetLiteConfig, queries: int = 4) -> None:
    """Writes a native checkpoint: a random encoder and Q-Former before the language model of ``like``, a BLIP-2."""
    given = load_checkpoint(like)
    sizes = given.config
    bridge = QFormerConfig(
        hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_query_tokens=queries,
        encoder_hidden_size=config.hidden_size,
    )  # fmt: skip
    whole = CaptionerConfig(
        config, bridge, sizes.language, sizes.bos_token_id, sizes.eos_token_ids, sizes.pad_token_id,
        sizes.image_token_id, family="blip2edge",
    )  # fmt: skip
    model = CaptionerModel(whole)
    model.vision.load_state_dict(encoder(config).state_dict())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.bridge.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2.2 / parameter.shape[-1] ** 0.5, generator=draw)
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.3, generator=draw)
    model.language.load_state_dict(given.language.state_dict())
    save_checkpoint(model, directory, like=like)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (directory / name).unlink(missing_ok=True)
    write_preprocessing(directory, config)
