"""Random tiny vision encoders of transformers' classes, saved with their image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipVisionConfig, SiglipVisionModel

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


ENCODERS = {"siglip": siglip, "whole-siglip": whole_siglip}
"""Functions that make the model and its image processor, by the name of the variant."""


def save_encoder(kind: str, directory: Path, seed: int = 0) -> tuple[Any, Any]:
    """Draws and saves an encoder of :data:`ENCODERS`; returns the vision model and the image processor."""
    made, processor = ENCODERS[kind]()
    model = draw_weights(made, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return getattr(model, "vision_model", model), processor
