"""Finds the place of each patch in the picture: reverses the crop and the resizing of the preprocessing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.schema import GraphSpec
from blip2edge.errors import BundleError
from blip2edge.runtime.images.preprocess import Preprocessing

PASSED = ("Cast", "QuantizeLinear", "DequantizeLinear", "Mul", "Add", "Div", "Sub")
"""Operators that may come between the pixel values and the patch embedding, because they do not move any pixel."""


@dataclass(frozen=True)
class PatchGrid:
    """The grid of patches, and the place of the patches among the picture's embeddings.

    Attributes:
        rows: Rows of patches.
        columns: Columns of patches.
        before: Number of embeddings before the patches: the class token, registers.
        stride: Height and width of a patch in pixels of the model's input. The patches begin at the upper left corner
            of the input; a rest at the right and lower edges belongs to no patch.
    """

    rows: int
    columns: int
    before: int
    stride: tuple[float, float]


@dataclass(frozen=True)
class View:
    """The part of a picture that is the model's input, and its patches.

    A point ``x`` of the picture is at ``(x / scale_x) - left`` of the model's input.

    Attributes:
        picture: Width and height of the upright picture in pixels.
        scale: Number of pixels of the picture for one pixel of the resized picture, across and down.
        corner: Left and top of the crop in pixels of the resized picture; below 0 if the crop is larger than the
            resized picture, which is then padded.
        grid: The patches of the model's input.
    """

    picture: tuple[int, int]
    scale: tuple[float, float]
    corner: tuple[int, int]
    grid: PatchGrid

    def patch_of(self, points: NDArray[np.float64], axis: int) -> NDArray[np.int64]:
        """Returns the column (or the row) of the patch that contains each point of the picture.

        Args:
            points: Coordinates of the points in pixels of the picture, ``[N]``.
            axis: 0 for horizontal coordinates and columns, 1 for vertical coordinates and rows.

        Returns:
            int64 ``[N]``: columns or rows, counted from 0; -1 for a point that is in no patch.
        """
        count = (self.grid.columns, self.grid.rows)[axis]
        places = (points / self.scale[axis] - self.corner[axis]) / self.grid.stride[1 - axis]
        numbers = np.floor(places).astype(np.int64)
        return np.where((numbers >= 0) & (numbers < count), numbers, -1)

    def rectangle(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Returns left, top, right and bottom of a patch in pixels of the upright picture, limited to the picture."""
        sides = []
        for axis, number in enumerate((column, row)):
            for edge in (number, number + 1):
                place = (edge * self.grid.stride[1 - axis] + self.corner[axis]) * self.scale[axis]
                sides.append(min(max(place, 0.0), float(self.picture[axis])))
        left, right, top, bottom = sides
        return left, top, right, bottom


def view_of(preprocessing: Preprocessing, width: int, height: int, grid: PatchGrid) -> View:
    """Computes which part of an upright picture is the model's input.

    Args:
        preprocessing: The bundle's preprocessing.
        width: Width of the upright picture in pixels.
        height: Height of the upright picture in pixels.
        grid: The patches of the model's input.
    """
    across, down = preprocessing.resized(width, height) if preprocessing.resize else (width, height)
    corner = 0, 0
    if preprocessing.crop is not None:
        corner = (across - preprocessing.crop["width"]) // 2, (down - preprocessing.crop["height"]) // 2
    return View((width, height), (width / across, height / down), corner, grid)


def patch_grid(vision: ir.Model, spec: GraphSpec) -> PatchGrid:
    """Finds the rows and columns of a vision encoder's patches.

    The stride of the patch embedding (the convolution whose input is the pixels) gives both numbers. If the first
    convolution is no patch embedding, the grid has the proportions of the input, and as many patches as possible, but
    not more than there are embeddings.

    Args:
        vision: The vision encoder's graph.
        spec: The graph's spec: the last dimensions of its input are height and width of the pixel values.

    Raises:
        BundleError: The sizes vary, or the embeddings do not fit a grid of patches.
    """
    height, width = spec.inputs[0].dims[-2:]
    embeds = spec.outputs[0].dims[1]
    if not isinstance(height, int) or not isinstance(width, int) or not isinstance(embeds, int):
        raise BundleError(
            "expected a vision encoder of a fixed number of patches, found one whose number varies",
            "export a checkpoint with a fixed image size",
        )
    stride: tuple[float, float] | None = _patch_size(vision)
    if stride is None:
        share = math.gcd(height, width)
        times = math.isqrt(embeds // (height // share * (width // share)))
        rows, columns = times * (height // share), times * (width // share)
        stride = height / max(rows, 1), width / max(columns, 1)
    else:
        rows, columns = int(height // stride[0]), int(width // stride[1])
    if not 0 < rows * columns <= embeds:
        raise BundleError(
            f"expected at least one embedding for each of {rows} x {columns} patches, found {embeds}",
            "export the checkpoint again",
        )
    return PatchGrid(rows, columns, embeds - rows * columns, stride)


def _patch_size(vision: ir.Model) -> tuple[int, int] | None:
    """Returns height and width of a patch in pixels; None if the graph has no convolution that cuts patches."""
    value = vision.graph.inputs[0]
    for _ in range(len(PASSED) * 2):
        readers = [user for user, _ in value.uses()]
        convolution = next((node for node in readers if node.op_type == "Conv"), None)
        if convolution is not None:
            strides = convolution.attributes.get("strides")
            weight = convolution.inputs[1]
            kernel = weight.shape[-2:] if weight is not None and weight.shape is not None else None
            if strides is None or kernel is None:
                return None
            high, wide = strides.as_ints()
            return (high, wide) if (high, wide) == tuple(kernel) else None
        passed = next((node for node in readers if node.op_type in PASSED), None)
        if passed is None:
            return None
        value = passed.outputs[0]
    return None
