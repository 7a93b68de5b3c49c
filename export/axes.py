"""Axes and tensors that several graphs share."""

from __future__ import annotations

from blip2edge.bundle.schema import Axis, Dim, TensorSpec
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.models import Config

MAX_BATCH = 8  # rows


def batch_axis() -> Axis:
    """The rows of a batch."""
    return Axis("batch", 1, 1, MAX_BATCH)


def pictures_axis(config: Config) -> Axis:
    """The pictures of a batch; the frames of a video are consecutive rows."""
    return Axis("batch", 1, config.frames, MAX_BATCH * config.frames)


def queries_dim(config: CaptionerConfig) -> Dim:
    """The visual tokens of a picture: their number, or an axis if the bridge is elastic."""
    most = config.bridge.num_visual_tokens
    return Axis("queries", config.elastic, most, most) if config.elastic else most


def image_embeds(config: Config) -> TensorSpec:
    """Describes the tensor ``image_embeds``: the vision encoder's output, float32 ``[B, P, Dv]``."""
    return TensorSpec(
        "image_embeds",
        "float32",
        (pictures_axis(config), config.vision.num_embeds, config.vision.hidden_size),
    )
