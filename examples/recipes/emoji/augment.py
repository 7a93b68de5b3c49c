"""Augments drawings in batches: rotates, scales, shifts and recolours them, on different backgrounds.

Drawings of different artists differ in outline, palette and pose. Augmentation varies palette and pose; several
artists in the training data vary the outline. All changes are small: with rotations of 25° and a coloured background
under every second picture, an encoder learned nothing in the first of its few minutes of training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TURN = 10.0  # degrees, to either side
SCALE = (0.85, 1.05)  # side of the drawing, in sides of the picture
SHIFT = 0.05  # of the picture's side, in any direction
STRETCH = 0.08  # of width relative to height, either way
HUE = 0.15  # radians, either way
SATURATION = (0.7, 1.3)
BRIGHTNESS = (0.85, 1.15)
PLAIN_SHARE = 0.8  # share of the pictures on a white background
DIRECTED = (
    "left",
    "right",
    "clockwise",
    "east",
    "west",
    "oclock",
    "thirty",
)  # words in names that are wrong for the mirror image

# RGB to YIQ: a rotation in the plane of I and Q changes the hue.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def premultiplied(rgba: Tensor) -> Tensor:
    """uint8 [B, S, S, 4] to float [B, 4, S, S] from 0 to 1 with premultiplied alpha, as resampling needs it."""
    planes = rgba.permute(0, 3, 1, 2).float() / 255
    return torch.cat([planes[:, :3] * planes[:, 3:], planes[:, 3:]], dim=1)


def may_mirror(name: str) -> bool:
    """Whether the name is also right for the mirror image."""
    return not any(part in DIRECTED for part in name.split("-"))


def _uniform(rows: int, low: float, high: float, draw: torch.Generator) -> Tensor:
    return torch.rand(rows, generator=draw) * (high - low) + low


def _places(mirror: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """Sampling grid: the position in the drawing for each pixel of the picture, [B, size, size, 2]."""
    rows = mirror.shape[0]
    turn = _uniform(rows, -TURN, TURN, draw) * math.pi / 180
    scale = _uniform(rows, *SCALE, draw)
    stretch = torch.exp(_uniform(rows, -STRETCH, STRETCH, draw))
    flipped = torch.where(mirror & (torch.rand(rows, generator=draw) < 0.5), -1.0, 1.0)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    shift = [_uniform(rows, -SHIFT, SHIFT, draw) * 2 for _ in range(2)]
    first = torch.stack([flipped * cos * stretch, -flipped * sin * stretch, shift[0]], dim=1)
    second = torch.stack([sin / stretch, cos / stretch, shift[1]], dim=1)
    theta = torch.stack([first, second], dim=1)  # [B, 2, 3]
    return F.affine_grid(theta, [rows, 4, size, size], align_corners=False)


def _palettes(rows: int, draw: torch.Generator) -> Tensor:
    """Random linear colour transforms: [B, 3, 3]."""
    hue = _uniform(rows, -HUE, HUE, draw)
    saturation = _uniform(rows, *SATURATION, draw)
    brightness = _uniform(rows, *BRIGHTNESS, draw)
    turn = torch.zeros(rows, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
    turn[:, 2, 1] = saturation * hue.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    palettes: Tensor = brightness[:, None, None] * (torch.linalg.inv(_YIQ) @ turn @ _YIQ)
    return palettes


def _grounds(rows: int, size: int, draw: torch.Generator) -> Tensor:
    """Backgrounds: white, or a gradient between two colours, [B, 3, size, size]."""
    ends = torch.rand(2, rows, 3, 1, 1, generator=draw)
    ends = torch.where(torch.rand(rows, 1, 1, 1, generator=draw) < PLAIN_SHARE, torch.ones(()), ends)
    angle = _uniform(rows, 0, 2 * math.pi, draw)[:, None, None]
    line = torch.linspace(-0.5, 0.5, size)
    along = 0.5 + 0.7 * (angle.cos() * line[None, None, :] + angle.sin() * line[None, :, None])
    return torch.lerp(ends[0], ends[1], along.clamp(0, 1)[:, None])


def augment(drawings: Tensor, mirror: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """Makes randomly augmented pictures of drawings.

    Args:
        drawings: float [B, 4, S, S] from :func:`premultiplied`.
        mirror: bool [B], from :func:`may_mirror`.
        size: Side of the pictures in pixels.
        draw: Random generator.

    Returns:
        float [B, 3, size, size] from 0 to 1.
    """
    rows = drawings.shape[0]
    moved = F.grid_sample(drawings, _places(mirror, size, draw), align_corners=False)
    coloured = torch.einsum("bij,bjhw->bihw", _palettes(rows, draw), moved[:, :3])
    return (coloured + (1 - moved[:, 3:]) * _grounds(rows, size, draw)).clamp(0, 1)


def plain(drawings: Tensor, size: int) -> Tensor:
    """Makes pictures of drawings on white, without augmentation: float [B, 3, size, size] from 0 to 1."""
    small = F.interpolate(drawings, (size, size), mode="bilinear", antialias=True)
    return (small[:, :3] + 1 - small[:, 3:]).clamp(0, 1)
