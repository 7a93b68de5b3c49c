"""EfficientNet-Lite's blocks as data (arXiv 1905.11946), for the modules of ``model/vision`` and for ``plan``."""

from __future__ import annotations

import math
from typing import NamedTuple

from blip2edge.bundle.schema import VISION
from blip2edge.shapes.model_shape import ModelPart, WeightMatrix

STEM = 32  # channels after the first convolution, in every size of the network
DIVISOR = 8  # numbers of channels are multiples of it


class Stage(NamedTuple):
    """The blocks of one resolution.

    Attributes:
        repeats: Number of blocks.
        kernel: Side of the depthwise kernel.
        stride: Stride of the first block; the other blocks have stride 1.
        expansion: Channels inside a block, divided by its input channels.
        channels: Output channels.
    """

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
"""Stages of EfficientNet-Lite0 (arXiv 1905.11946, table 1)."""


class BlockShape(NamedTuple):
    """The sizes of one block.

    Attributes:
        inputs: Input channels.
        inner: Channels of the depthwise convolution.
        outputs: Output channels.
        kernel: Side of the depthwise kernel.
        stride: Stride of the depthwise convolution.
        side: Height and width of the block's input.
        residual: Whether the block's input is added to its output.
    """

    inputs: int
    inner: int
    outputs: int
    kernel: int
    stride: int
    side: int
    residual: bool


def feature_side(image_size: int) -> int:
    """Returns height and width of the last feature map in cells, for a square picture of ``image_size`` pixels."""
    side = math.ceil(image_size / 2)  # after the stem
    for stage in STAGES:
        side = math.ceil(side / stage.stride)
    return side


def scaled_channels(plain: int, factor: float) -> int:
    """Multiplies a number of channels by ``factor``, and rounds the product to a multiple of 8.

    The result is at most 10 % smaller than the exact product.
    """
    exact = plain * factor
    rounded = max(DIVISOR, int(exact + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * exact else rounded


def block_shapes(image_size: int, width_coefficient: float, depth_coefficient: float) -> list[BlockShape]:
    """Returns the sizes of each block, in the order of the network.

    Args:
        image_size: Side of the picture in pixels.
        width_coefficient: Factor of the channels of all stages.
        depth_coefficient: Factor of the number of blocks of all stages except the first and the last.
    """
    found: list[BlockShape] = []
    inputs, side = STEM, math.ceil(image_size / 2)
    for number, stage in enumerate(STAGES):
        ends = number in (0, len(STAGES) - 1)
        repeats = stage.repeats if ends else math.ceil(depth_coefficient * stage.repeats)
        outputs = scaled_channels(stage.channels, width_coefficient)
        for repeat in range(repeats):
            stride = 1 if repeat else stage.stride
            inner = inputs * stage.expansion
            found.append(BlockShape(inputs, inner, outputs, stage.kernel, stride, side, repeat > 0))
            inputs, side = outputs, math.ceil(side / stride)
    return found


def convolutions(image_size: int, width_coefficient: float, depth_coefficient: float, hidden: int) -> ModelPart:
    """Describes the network without its classifier: each convolution is a matrix, and each output cell is a row.

    A depthwise convolution computes each output from ``kernel²`` values, so its matrix has ``kernel²`` inputs.

    Args:
        image_size: Side of the picture in pixels.
        width_coefficient: Factor of the channels of all stages.
        depth_coefficient: Factor of the number of blocks of all stages except the first and the last.
        hidden: Channels of the last convolution.
    """
    blocks = block_shapes(image_size, width_coefficient, depth_coefficient)
    rows = [WeightMatrix("stem", 3 * 3 * 3, STEM, str(blocks[0].side ** 2), 1, True)]
    for each in blocks:
        before, after = str(each.side**2), str(math.ceil(each.side / each.stride) ** 2)
        if each.inner != each.inputs:
            rows.append(WeightMatrix("expand", each.inputs, each.inner, before, 1, True))
        rows.append(WeightMatrix("depthwise", each.kernel**2, each.inner, after, 1, True))
        rows.append(WeightMatrix("project", each.inner, each.outputs, after, 1, True))
    rows.append(WeightMatrix("head", blocks[-1].outputs, hidden, "grid", 1, True))
    return ModelPart(VISION, tuple(rows))
