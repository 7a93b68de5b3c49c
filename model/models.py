"""Builds any supported model from its config."""

from __future__ import annotations

from dataclasses import replace

from blip2edge.errors import UsageError
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.retrieval import RetrievalConfig, RetrievalModel
from blip2edge.model.vision.token_merging import most_merged

Config = CaptionerConfig | RetrievalConfig
Model = CaptionerModel | RetrievalModel

ORDERED_BRIDGES = ("mlp",)
"""Bridges that keep the order of the patches in the text. All others read the patches as a set."""


def build_model(config: Config) -> Model:
    """A captioner or a retrieval model, on torch's default device."""
    return RetrievalModel(config) if isinstance(config, RetrievalConfig) else CaptionerModel(config)


def with_merged_tokens(config: Config, tokens: int) -> Config:
    """The same model with token merging in its vision encoder.

    Args:
        config: Config of a model without token merging.
        tokens: Patches merged away in each layer; 0 leaves the config as it is.

    Raises:
        UsageError: The number is negative or too large for the vision encoder, or the bridge needs the order of
            the patches, which merging does not keep.
    """
    if tokens == 0:
        return config
    patches, layers = config.vision.num_positions - 1, config.vision.num_layers
    most = most_merged(patches, layers)
    if isinstance(config, CaptionerConfig) and config.bridge.kind in ORDERED_BRIDGES:
        raise UsageError(
            f"--merge-tokens {tokens} changes the order of the patches, and the language model of a "
            f"{config.family} with an {config.bridge.kind} bridge needs that order",
            "leave --merge-tokens out",
        )
    if not 0 < tokens <= most:
        mend = f"give --merge-tokens 1 to {most}" if most else "leave --merge-tokens out"
        raise UsageError(
            f"--merge-tokens {tokens} does not fit a vision encoder of {layers} layers and {patches} patches",
            mend,
        )
    return replace(config, vision=replace(config.vision, merge_tokens=tokens))
