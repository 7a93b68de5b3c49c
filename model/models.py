"""Builds any supported model from its config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blip2edge.errors import UsageError, option
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.retrieval import RetrievalConfig, RetrievalModel
from blip2edge.model.vision.registry import vision_encoder
from blip2edge.model.vision.token_merging import most_merged

Config = CaptionerConfig | RetrievalConfig
Model = CaptionerModel | RetrievalModel

ORDERED_BRIDGES = ("mlp",)
"""Kinds of bridges that make one visual token of each patch, in the order of the patches.

For bridges of all other kinds, the order of the patches has no effect.
"""


def build_model(config: Config) -> Model:
    """Builds a captioner or a retrieval model from its config, on torch's default device."""
    return RetrievalModel(config) if isinstance(config, RetrievalConfig) else CaptionerModel(config)


def with_merged_tokens(config: Config, tokens: int) -> Config:
    """Returns the config with token merging in the vision encoder.

    Args:
        config: Config of a model without token merging.
        tokens: Number of patches merged into others in each layer; 0 does not change the config.

    Raises:
        UsageError: ``tokens`` is negative or too large for the vision encoder, or the bridge needs the order of
            the patches, which merging does not keep.
    """
    if tokens == 0:
        return config
    vision: Any = config.vision
    if not vision_encoder(vision.kind).merges:
        raise UsageError(
            f"{option('merge_tokens')} {tokens} merges patches in the layers of a ViT, and the vision encoder is of "
            f"kind {vision.kind}",
            f"leave {option('merge_tokens')} out",
        )
    patches, layers = vision.num_positions - 1, vision.num_layers
    most = most_merged(patches, layers)
    if isinstance(config, CaptionerConfig) and config.bridge.kind in ORDERED_BRIDGES:
        raise UsageError(
            f"{option('merge_tokens')} {tokens} changes the order of the patches, and the language model of a "
            f"{config.family} with an {config.bridge.kind} bridge needs that order",
            f"leave {option('merge_tokens')} out",
        )
    if not 0 < tokens <= most:
        mend = f"give {option('merge_tokens')} 1 to {most}" if most else f"leave {option('merge_tokens')} out"
        raise UsageError(
            f"{option('merge_tokens')} {tokens} does not fit a vision encoder of {layers} layers and {patches} patches",
            mend,
        )
    return replace(config, vision=replace(vision, merge_tokens=tokens))
