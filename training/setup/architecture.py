"""Which captioner the key `bridge` makes of a picture encoder and a language model: a row a choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from blip2edge.errors import ConfigError
from blip2edge.model.bridges.instruct import InstructedQFormerConfig
from blip2edge.model.bridges.mlp import MLPConfig
from blip2edge.model.bridges.perceiver import PerceiverConfig
from blip2edge.model.bridges.pool import AttentionPoolConfig
from blip2edge.model.config import (
    BridgeConfig,
    CaptionerConfig,
    DraftConfig,
    LanguageConfig,
    QFormerConfig,
    VisionConfig,
)
from blip2edge.model.language.flamingo import FlamingoConfig
from blip2edge.model.language.llama_config import LlamaConfig
from blip2edge.training.config import ModelConfig

Maker = Callable[[ModelConfig, VisionConfig, LanguageConfig], BridgeConfig]


def _qformer(sizes: ModelConfig, vision: VisionConfig, _: LanguageConfig) -> QFormerConfig:
    """A Q-Former of the recipe's sizes."""
    block = sizes.qformer
    return QFormerConfig(
        hidden_size=block.hidden_size,
        intermediate_size=block.intermediate_size,
        num_layers=block.num_layers,
        num_heads=block.num_heads,
        num_query_tokens=sizes.num_query_tokens,
        encoder_hidden_size=vision.hidden_size,
        dropout=0.0 if sizes.is_miniature else sizes.dropout,
    )


def _mlp(_: ModelConfig, vision: VisionConfig, language: LanguageConfig) -> MLPConfig:
    return MLPConfig(vision.hidden_size, language.embed_dim, vision.num_embeds)


def _perceiver(sizes: ModelConfig, vision: VisionConfig, language: LanguageConfig) -> PerceiverConfig:
    return replace(_resampler(sizes, vision, language), output_size=language.embed_dim)


def _resampler(sizes: ModelConfig, vision: VisionConfig, _: LanguageConfig) -> PerceiverConfig:
    block = sizes.qformer
    return PerceiverConfig(
        width=vision.hidden_size,
        num_latents=sizes.num_query_tokens,
        num_layers=block.num_layers,
        num_heads=block.num_heads,
        head_dim=block.hidden_size // block.num_heads,
    )


def _pool(sizes: ModelConfig, vision: VisionConfig, _: LanguageConfig) -> AttentionPoolConfig:
    block = sizes.qformer
    return AttentionPoolConfig(block.hidden_size, block.num_heads, sizes.num_query_tokens, vision.hidden_size)


@dataclass(frozen=True)
class Row:
    """One choice of the key `bridge`.

    Attributes:
        bridge: Makes the bridge's config.
        family: What a checkpoint is written as: a row of `model/families/registry.py`.
        clip_family: The same behind a CLIP; empty where there is none.
        language: Makes the language model's config of the given one and the rows behind its token table.
    """

    bridge: Maker
    family: str
    clip_family: str = ""
    language: Callable[[Any, VisionConfig, int], LanguageConfig] = lambda language, vision, extra: replace(
        language, vocab_size=language.vocab_size + extra
    )


def _flamingo(language: LanguageConfig, vision: VisionConfig, extra: int) -> FlamingoConfig:
    """A Llama with a gated layer before each of its own."""
    if (
        not isinstance(language, LlamaConfig)
        or language.kind != "llama"
        or language.num_kv_heads != language.num_heads
    ):
        raise ConfigError(
            "bridge = 'flamingo' puts layers into a Llama whose heads have keys of their own, and the language model"
            f" is of type {language.kind!r} with {language.num_kv_heads} heads of keys",
            "give such a Llama in model.language_from, or another bridge",
        )
    base: dict[str, Any] = {each.name: getattr(language, each.name) for each in fields(LlamaConfig)}
    return FlamingoConfig(
        **base
        | {
            "kind": "idefics",
            "vocab_size": language.vocab_size + extra,
            "base_vocab_size": language.vocab_size,
            "source_dim": vision.hidden_size,
        }
    )


ROWS: dict[str, Row] = {
    "qformer": Row(_qformer, "blip-2"),
    "projection": Row(_qformer, "blip-2"),
    "mlp": Row(_mlp, "blip2edge", clip_family="llava"),
    "perceiver": Row(_perceiver, "blip2edge"),
    "pool": Row(_pool, "blip2edge"),
    "flamingo": Row(_resampler, "", clip_family="idefics", language=_flamingo),
}


def family_of(bridge: str, vision: VisionConfig) -> str:
    """What a checkpoint of these parts is written as: a row of `model/families/registry.py`.

    Raises:
        ConfigError: The choice is not for this kind of picture encoder.
    """
    row = ROWS[bridge]
    family = row.clip_family if vision.clip else row.family
    if not family:
        kind, other = ("a CLIP", "BLIP-2's") if vision.clip else ("BLIP-2's", "a CLIP")
        raise ConfigError(
            f"bridge = {bridge!r} is not for a picture encoder that is {kind}",
            f"give {other} in model.vision_from, or another bridge",
        )
    return family


def architecture(
    bridge: str,
    sizes: ModelConfig,
    vision: VisionConfig,
    language: LanguageConfig,
    *,
    extra: int = 0,
    text: DraftConfig | None = None,
    instructed: bool = False,
) -> CaptionerConfig:
    """The captioner that a recipe asks for; its special tokens are still to be filled in.

    Args:
        bridge: The key of the recipe.
        sizes: Of a fresh bridge.
        vision: The picture encoder's.
        language: The language model's.
        extra: Rows that the language model's token table gets behind its own.
        text: The text side of the Q-Former, kept as a draft or read with the prompt; None for none.
        instructed: The prompt enters the Q-Former.

    Raises:
        ConfigError: These parts do not go together.
    """
    row = ROWS[bridge]
    family = family_of(bridge, vision)
    language = row.language(language, vision, extra)
    made = row.bridge(sizes, vision, language)
    if instructed:
        if not isinstance(made, QFormerConfig) or text is None:
            raise ConfigError(
                f"instruct: the prompt enters a Q-Former, and bridge is {bridge!r}", "set bridge to 'qformer'"
            )
        base = {each.name: getattr(made, each.name) for each in fields(QFormerConfig)}
        made = InstructedQFormerConfig(
            **base, vocab_size=text.vocab_size, instruction_positions=text.max_positions
        )
        return CaptionerConfig(vision, made, language, family="instructblip")
    draft = text if isinstance(made, QFormerConfig) else None
    return CaptionerConfig(vision, made, language, family=family, draft=draft)
