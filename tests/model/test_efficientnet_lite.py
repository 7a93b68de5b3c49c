"""EfficientNet-Lite: equal to convolutions and batch norms written another way, and to the package if it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2edge.errors import CheckpointError, UnsupportedModelError, UsageError
from blip2edge.model.checkpoint.encoder import is_encoder, load_encoder, save_encoder
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.models import with_merged_tokens
from blip2edge.model.vision.efficientnet_lite import (
    BATCH_NORM_EPS,
    EfficientNetLite,
    EfficientNetLiteConfig,
    fold_batch_norms,
)
from blip2edge.model.vision.registry import vision_encoder
from tests.drawing_photos import package_state

NORM = ("running_mean", "running_var", "weight", "bias")
TINY = EfficientNetLiteConfig(image_size=70, width_coefficient=0.25, depth_coefficient=0.5)


def tensorflow_convolution(x: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
    """A convolution with TensorFlow's padding "SAME", as a sum over the kernel's places."""
    size, kernel = x.shape[-1], weight.shape[-1]
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    padded = F.pad(x, [total // 2, total - total // 2] * 2)
    result = torch.zeros(len(x), len(weight), out, out, dtype=x.dtype)
    for row in range(kernel):
        for column in range(kernel):
            part = padded[:, :, row : row + out * stride : stride, column : column + out * stride : stride]
            part = part[:, :, :out, :out]
            taps = weight[:, :, row, column]
            result += torch.einsum("bchw,oc->bohw", part, taps) if groups == 1 else part * taps[:, 0, None, None]
    return result


def reference(state: dict[str, Tensor], config: EfficientNetLiteConfig, pixels: Tensor) -> Tensor:
    """The network from the package's tensors, with batch norms, in float64."""

    def unit(x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        x = tensorflow_convolution(x, state[f"{conv}.weight"].double(), stride, groups)
        mean, variance, scale, shift = (state[f"{norm}.{name}"].double()[:, None, None] for name in NORM)
        return (x - mean) / (variance + BATCH_NORM_EPS).sqrt() * scale + shift

    x = unit(pixels.double(), "_conv_stem", "_bn0", stride=2).clamp(0, 6)
    for number, shape in enumerate(config.blocks()):
        name, before = f"_blocks.{number}.", x
        if shape.inner != shape.inputs:
            x = unit(x, f"{name}_expand_conv", f"{name}_bn0").clamp(0, 6)
        depthwise = unit(x, f"{name}_depthwise_conv", f"{name}_bn1", shape.stride, groups=shape.inner)
        x = unit(depthwise.clamp(0, 6), f"{name}_project_conv", f"{name}_bn2")
        x = x + before if shape.residual else x
    return unit(x, "_conv_head", "_bn1").clamp(0, 6).flatten(2).transpose(1, 2)


def loaded(state: dict[str, Tensor], config: EfficientNetLiteConfig) -> EfficientNetLite:
    model = EfficientNetLite(config)
    model.load_state_dict(fold_batch_norms(state, config))
    return model.eval()


def test_equal_to_batch_norms_and_sums_over_the_kernel() -> None:
    state = package_state(TINY)
    pixels = torch.randn(2, 3, TINY.image_size, TINY.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = loaded(state, TINY)(pixels)
    wanted = reference(state, TINY, pixels)
    assert found.shape == wanted.shape == (2, TINY.num_embeds, 1280)
    assert float(wanted.std()) > 0.1, "the weights are too small to show a difference"
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


def test_normalized_features_have_mean_zero_and_variance_one() -> None:
    state = package_state(TINY)
    pixels = torch.randn(1, 3, TINY.image_size, TINY.image_size, generator=torch.Generator().manual_seed(2))
    config = EfficientNetLiteConfig(**{**vars(TINY), "normalize": True})
    with torch.no_grad():
        plain, found = loaded(state, TINY)(pixels), loaded(state, config)(pixels)
    centred = plain - plain.mean(dim=-1, keepdim=True)
    wanted = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found, wanted)


def test_sizes_of_lite0() -> None:
    config = EfficientNetLiteConfig()
    with torch.device("meta"):
        model = EfficientNetLite(config)
    assert (config.num_embeds, config.hidden_size, len(model.blocks)) == (49, 1280, 16)
    channels = sum(len(tensor) for name, tensor in model.named_parameters() if name.endswith(".bias"))
    classifier = 1281 * 1000
    parameters = sum(tensor.numel() for tensor in model.parameters())
    assert parameters + channels + classifier == 4_652_008, "the package has two parameters a channel in its norms"


@pytest.mark.parametrize("size", [64, 70, 224])
def test_equal_to_the_package(size: int) -> None:
    """Random weights of Lite0 in the package's own module, whose padding depends on the picture's size."""
    package: Any = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch to compare with it"
    )
    config = EfficientNetLiteConfig(image_size=size)
    other = package.EfficientNet.from_name("efficientnet-lite0", image_size=size).double().eval()
    state = {name: tensor.double() for name, tensor in package_state(config).items()}
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    model = EfficientNetLite(config).double()
    model.load_state_dict(fold_batch_norms(state, config))
    with torch.no_grad():
        wanted = other.extract_features(pixels).flatten(2).transpose(1, 2)
        found = model(pixels)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(found, wanted)


def test_a_checkpoint_of_the_encoder_alone(tmp_path: Path) -> None:
    model = loaded(package_state(TINY), TINY)
    save_encoder(model, tmp_path)
    assert is_encoder(tmp_path)
    again = load_encoder(tmp_path)
    assert again.config == TINY
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_errors() -> None:
    state = package_state(TINY)
    del state["_blocks.3._bn1.running_var"]
    with pytest.raises(CheckpointError, match=r"no tensor _blocks\.3\._bn1\.running_var"):
        fold_batch_norms(state, TINY)
    with pytest.raises(CheckpointError, match="width_coefficient must be above 0"):
        EfficientNetLiteConfig.from_hf({"width_coefficient": 0.0})
    with pytest.raises(UnsupportedModelError, match="efficientnet_lite"):
        vision_encoder("swin")
    config: Any = CaptionerConfig(TINY, None, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is of kind efficientnet_lite"):
        with_merged_tokens(config, 2)
