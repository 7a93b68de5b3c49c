"""Adds outlier channels and massive-activation tokens, as EVA and CLIP have them, to a checkpoint's vision encoder.

The example checkpoint is small and has no outliers. This module adds outliers so that the captions do not change:

- Some channels after each norm become 20 to 80 times larger. The following weights for these channels become smaller by
  the same factor, so that the encoder computes the same function.
- Two hidden units of the first MLP are active on one token each: the class token, and the first patch. Their values are
  hundreds of times larger than those of other units. The two units change one channel of that token's residual stream,
  as found by Sun et al. (arXiv 2402.17762) and Darcet et al. (arXiv 2309.16588) in trained encoders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2edge.model.checkpoint.directory import load_model
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.checkpoint.lavis import open_checkpoint

OUTLIERS = 4  # channels after each norm
FACTORS = (20.0, 80.0)  # of those channels
MASSIVE = 400.0  # hidden value of the two units, and the value that they add to the residual stream
SILENT = -8.0  # input of the units for all other tokens; GELU of it is 0
LAYER = "vision_model.encoder.layers.{}."


def plant(source: Path, target: Path, pictures: Sequence[Image.Image], seed: int = 0) -> None:
    """Writes a copy of a BLIP-2 checkpoint with outlier channels and massive-activation tokens.

    Args:
        source: The checkpoint's directory.
        target: Directory of the copy.
        pictures: Pictures like those of the training. They give one direction for the class token and one for the first
            patch; the direction separates the token from all other tokens.
        seed: Seed of the choice of channels.
    """
    shutil.copytree(source, target)
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    _massive_tokens(tensors, _behind_norm2(source, pictures))
    _outlier_channels(tensors, np.random.default_rng(seed))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def _behind_norm2(source: Path, pictures: Sequence[Image.Image]) -> Tensor:
    """Runs the encoder on pictures; returns the input of the first MLP, ``[pictures, tokens, width]``."""
    opened = open_checkpoint(source, None)
    model: Any = load_model(opened)
    seen: list[Tensor] = []
    model.vision.layers[0].norm2.register_forward_hook(lambda _module, _given, output: seen.append(output))
    settings = load_preprocessing(source).preprocessing
    model.vision(torch.from_numpy(settings.batch(list(pictures))))
    return seen[0]


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _massive_tokens(tensors: dict[str, Tensor], states: Tensor) -> None:
    """Makes the two least used hidden units of the first MLP active on the first two tokens only."""
    mlp = LAYER.format(0) + "mlp."
    up, down = tensors[mlp + "fc1.weight"], tensors[mlp + "fc2.weight"]
    bias = tensors[mlp + "fc1.bias"]
    used = torch.nn.functional.gelu(states @ up.T + bias).abs().mean(dim=(0, 1)) * down.norm(dim=0)
    for token, unit in enumerate(used.argsort()[:2].tolist()):
        own, others = states[:, token], states[:, torch.arange(states.shape[1]) != token].flatten(0, 1)
        inner = torch.cov(others.T) + torch.cov(own.T) + 1e-3 * torch.eye(own.shape[1])
        direction = torch.linalg.solve(inner, own.mean(0) - others.mean(0))  # Fisher's discriminant
        low, high = float((others @ direction).max()), float((own @ direction).mean())
        if high <= low:
            raise SystemExit(f"token {token} cannot be distinguished from the others")
        scale = (MASSIVE - SILENT) / (high - low)
        up[unit], bias[unit] = direction * scale, SILENT - low * scale
        down[:, unit] = 0.0
        down[7 + 40 * token, unit] = 1.0  # channels 7 and 47; any other two would do


def _outlier_channels(tensors: dict[str, Tensor], random: np.random.Generator) -> None:
    """Multiplies some gains of a norm by a factor, and divides the columns of the following weights by this factor."""
    layer = 0
    while LAYER.format(layer) + "layer_norm1.weight" in tensors:
        prefix = LAYER.format(layer)
        for norm, reader in (("layer_norm1", "self_attn.qkv"), ("layer_norm2", "mlp.fc1")):
            gain, shift = tensors[f"{prefix}{norm}.weight"], tensors[f"{prefix}{norm}.bias"]
            channels = random.choice(len(gain), OUTLIERS, replace=False)
            factors = torch.from_numpy(np.geomspace(*FACTORS, OUTLIERS)).float()
            gain[channels] *= factors
            shift[channels] *= factors
            tensors[f"{prefix}{reader}.weight"][:, channels] /= factors
        layer += 1
