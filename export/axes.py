"""Axes and tensors that several graphs share."""

from __future__ import annotations

from blip2edge.bundle.schema import Axis, Dim, TensorSpec
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.models import Config

MAX_BATCH = 8  # rows


def batch_axis() -> Axis:
    """Returns the dynamic axis ``batch``: 1 to :data:`MAX_BATCH` rows."""
    return Axis("batch", 1, 1, MAX_BATCH)


def pictures_axis(config: Config) -> Axis:
    """Returns the axis ``batch`` of the vision encoder: one row for each picture or video frame.

    The frames of one video are consecutive rows.
    """
    return Axis("batch", 1, config.frames, MAX_BATCH * config.frames)


def queries_dim(config: CaptionerConfig) -> Dim:
    """Returns the dimension of the visual tokens of one picture.

    It is a fixed number, or an axis if the bridge is elastic (works with fewer queries as well).
    """
    most = config.bridge.num_visual_tokens
    return Axis("queries", config.elastic, most, most) if config.elastic else most


def image_embeds(config: Config) -> TensorSpec:
    """Describes the tensor ``image_embeds``: the vision encoder's output, float32 ``[B, P, Dv]``."""
    return TensorSpec(
        "image_embeds",
        "float32",
        (pictures_axis(config), config.vision.num_embeds, config.vision.hidden_size),
    )
