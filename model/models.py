"""Any model of the family, and how it is built of its config."""

from __future__ import annotations

from dataclasses import replace

from blip2edge.errors import UsageError, option
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.retrieval import RetrievalConfig, RetrievalModel
from blip2edge.model.vision.token_merging import most_merged

Config = CaptionerConfig | RetrievalConfig
Model = CaptionerModel | RetrievalModel

READS_IN_ORDER = ("mlp",)
"""Bridges behind which patches stand in the text one by one; every other reads them as a set."""


def build_model(config: Config) -> Model:
    """A captioner, or a model that compares; on the device that torch makes tensors on."""
    return RetrievalModel(config) if isinstance(config, RetrievalConfig) else CaptionerModel(config)


def with_merged_tokens(config: Config, tokens: int) -> Config:
    """The same model, merging so many patches in each layer of its vision encoder.

    Args:
        config: Of a model without merging.
        tokens: Patches that disappear in a layer; 0 leaves the config as it is.

    Raises:
        UsageError: Fewer than none, more than the vision encoder has, or the language model reads the patches in
            their order, which merging does not keep.
    """
    if tokens == 0:
        return config
    patches, layers = config.vision.num_positions - 1, config.vision.num_layers
    most = most_merged(patches, layers)
    if isinstance(config, CaptionerConfig) and config.bridge.kind in READS_IN_ORDER:
        raise UsageError(
            f"{option('merge_tokens')} {tokens} would put patches out of their order, and the language model of a "
            f"{config.family} with an {config.bridge.kind} bridge reads them in it",
            f"leave {option('merge_tokens')} out",
        )
    if not 0 < tokens <= most:
        mend = f"give {option('merge_tokens')} 1 to {most}" if most else f"leave {option('merge_tokens')} out"
        raise UsageError(
            f"{option('merge_tokens')} {tokens} does not fit a vision encoder of {layers} layers and {patches} patches",
            mend,
        )
    return replace(config, vision=replace(config.vision, merge_tokens=tokens))
