"""Random tiny vision encoders of transformers' classes, saved with their image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SIZE = 32
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": SIZE,
    "patch_size": 8,
}
SQUARE = {"height": SIZE, "width": SIZE}


def draw_weights(model: Any, seed: int) -> Any:
    """Weights with which every part of the encoder matters; returns the model in eval mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name or "token" in name:
                parameter.normal_(0, 0.7)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 2.2 / parameter[0].numel() ** 0.5)
            elif name.endswith("lambda1") or ("norm" in name and name.endswith("weight")):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)
    return model.eval()


def siglip() -> tuple[Any, Any]:
    """SigLIP's vision encoder, with its pooling head."""
    config = SiglipVisionConfig(**SIZES, intermediate_size=40)
    return SiglipVisionModel(config), SiglipImageProcessorPil(size=SQUARE)


def whole_siglip() -> tuple[Any, Any]:
    """A whole SigLIP, as it is published; SigLIP 2 of a fixed resolution has the same classes."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(vision_config={**SIZES, "intermediate_size": 40}, text_config={**text, "vocab_size": 30})
    return SiglipModel(config), SiglipImageProcessorPil(size=SQUARE)


def cropped() -> Any:
    """DINOv2's preprocessing: the shorter side to 8/7 of the crop."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return BitImageProcessorPil(size={"shortest_edge": SIZE * 8 // 7}, crop_size=SQUARE, image_mean=mean, image_std=std)


def dinov2() -> tuple[Any, Any]:
    """DINOv2; like the published ones, it has positions for larger pictures than its preprocessing makes."""
    return Dinov2Model(Dinov2Config(**{**SIZES, "image_size": 72})), cropped()


def giant_dinov2() -> tuple[Any, Any]:
    """DINOv2 with a gated feed-forward, as its giant model, and with a classifier, which is not used."""
    config = Dinov2Config(**SIZES, use_swiglu_ffn=True, qkv_bias=False)
    return Dinov2ForImageClassification(config), cropped()


def dinov2_with_registers() -> tuple[Any, Any]:
    """DINOv2 with registers."""
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**{**SIZES, "image_size": 56})), cropped()


class Dinov3Processor:
    """DINOv3's preprocessing in torch; transformers' class needs torchvision, which calls the same function."""

    values: ClassVar[dict[str, Any]] = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "size": SQUARE,
        "resample": 2,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }

    def __call__(self, picture: Any, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Rescales, resizes in floating point with an antialiased filter, and normalizes."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] * self.values["rescale_factor"]
        pixels = interpolate(pixels, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(self.values[name])[:, None, None] for name in ("image_mean", "image_std"))
        return {"pixel_values": (pixels - mean) / std}

    def save_pretrained(self, directory: Path) -> None:
        """Writes the keys of the published file."""
        (directory / "preprocessor_config.json").write_text(json.dumps(self.values))


def dinov3() -> tuple[Any, Any]:
    """DINOv3's ViT with four registers, as all published ones."""
    return DINOv3ViTModel(DINOv3ViTConfig(**SIZES, intermediate_size=40, num_register_tokens=4)), Dinov3Processor()


def gated_dinov3() -> tuple[Any, Any]:
    """DINOv3's ViT with a gated feed-forward, as its huge models, for pictures of another size than the config's."""
    sizes = {**SIZES, "image_size": 64}
    return DINOv3ViTModel(
        DINOv3ViTConfig(**sizes, intermediate_size=40, use_gated_mlp=True, key_bias=True)
    ), Dinov3Processor()


ENCODERS = {
    "siglip": siglip,
    "whole-siglip": whole_siglip,
    "dinov2": dinov2,
    "dinov2-giant": giant_dinov2,
    "dinov2-with-registers": dinov2_with_registers,
    "dinov3": dinov3,
    "dinov3-gated": gated_dinov3,
}
"""Functions that make the model and its image processor, by the name of the variant."""


def save_encoder(kind: str, directory: Path, seed: int = 0) -> tuple[Any, Any]:
    """Draws and saves an encoder of :data:`ENCODERS`; returns the vision model and the image processor."""
    made, processor = ENCODERS[kind]()
    model = draw_weights(made, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return next((getattr(model, name) for name in ("vision_model", "dinov2") if hasattr(model, name)), model), processor
