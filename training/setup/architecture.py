"""Makes a captioner's config from a picture encoder, a language model and the recipe's key `bridge`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from blip2edge.errors import ConfigError
from blip2edge.model.bridges.instruct import InstructedQFormerConfig
from blip2edge.model.bridges.mlp import MLPConfig
from blip2edge.model.bridges.perceiver import PerceiverConfig
from blip2edge.model.bridges.pool import AttentionPoolConfig
from blip2edge.model.config import (
    BLIP2_VISION,
    CLIP_VISION,
    BridgeConfig,
    CaptionerConfig,
    DraftConfig,
    LanguageConfig,
    QFormerConfig,
    VisionEncoderConfig,
)
from blip2edge.model.language.flamingo import FlamingoConfig
from blip2edge.model.language.llama_config import LlamaConfig
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.model.vision.registry import vision_encoder
from blip2edge.training.model_config import ModelConfig

MakeBridge = Callable[[ModelConfig, VisionEncoderConfig, LanguageConfig], BridgeConfig]


def _qformer(sizes: ModelConfig, vision: VisionEncoderConfig, _: LanguageConfig) -> QFormerConfig:
    """Makes the config of a Q-Former with the recipe's sizes."""
    return QFormerConfig(
        **asdict(sizes.qformer),
        num_query_tokens=sizes.num_query_tokens,
        encoder_hidden_size=vision.hidden_size,
        dropout=0.0 if sizes.is_miniature else sizes.dropout,
    )


def _mlp(_: ModelConfig, vision: VisionEncoderConfig, language: LanguageConfig) -> MLPConfig:
    return MLPConfig(vision.hidden_size, language.embed_dim, vision.num_embeds)


def _perceiver(sizes: ModelConfig, vision: VisionEncoderConfig, language: LanguageConfig) -> PerceiverConfig:
    return replace(_resampler(sizes, vision, language), output_size=language.embed_dim)


def _resampler(sizes: ModelConfig, vision: VisionEncoderConfig, _: LanguageConfig) -> PerceiverConfig:
    block = sizes.qformer
    return PerceiverConfig(
        width=vision.hidden_size,
        num_latents=sizes.num_query_tokens,
        num_layers=block.num_layers,
        num_heads=block.num_heads,
        head_dim=block.hidden_size // block.num_heads,
    )


def _pool(sizes: ModelConfig, vision: VisionEncoderConfig, _: LanguageConfig) -> AttentionPoolConfig:
    block = sizes.qformer
    return AttentionPoolConfig(block.hidden_size, block.num_heads, sizes.num_query_tokens, vision.hidden_size)


@dataclass(frozen=True)
class Architecture:
    """The functions and families with which a captioner is built, for one value of the recipe's key `bridge`.

    Attributes:
        bridge: Function that makes the bridge's config.
        family: Family (a key of `model/families/registry.py`) of a checkpoint with BLIP-2's picture encoder; empty if
            this encoder is unsupported.
        clip_family: Family of a checkpoint with a CLIP picture encoder; empty if unsupported.
        any_family: Family of a checkpoint with another picture encoder of `model/vision/registry.py`; empty if
            unsupported.
        language: Function that makes the captioner's language config, from the language model's original config, the
            picture encoder's config, and the number of rows to append to the token embedding table.
    """

    bridge: MakeBridge
    family: str
    clip_family: str = ""
    any_family: str = ""
    language: Callable[[Any, VisionEncoderConfig, int], LanguageConfig] = lambda language, vision, extra: replace(
        language, vocab_size=language.vocab_size + extra
    )


def _flamingo(language: LanguageConfig, vision: VisionEncoderConfig, extra: int) -> FlamingoConfig:
    """Makes the config of a Flamingo: a Llama with a gated cross-attention layer before each of the Llama's layers."""
    if not isinstance(language, LlamaConfig) or language.kind != "llama" or language.num_kv_heads != language.num_heads:
        raise ConfigError(
            "bridge = 'flamingo' needs a Llama without grouped-query attention (num_kv_heads = num_heads), and the"
            f" language model is of type {language.kind!r} with {language.num_kv_heads} heads of keys",
            "set model.language_from to such a Llama, or choose another bridge",
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


ARCHITECTURES: dict[str, Architecture] = {
    "qformer": Architecture(_qformer, "blip-2", any_family="blip2edge"),
    "projection": Architecture(_qformer, "blip-2", any_family="blip2edge"),
    "mlp": Architecture(_mlp, "blip2edge", clip_family="llava", any_family="blip2edge"),
    "perceiver": Architecture(_perceiver, "blip2edge", any_family="blip2edge"),
    "pool": Architecture(_pool, "blip2edge", any_family="blip2edge"),
    "flamingo": Architecture(_resampler, "", clip_family="idefics", language=_flamingo),
}


def family_of(bridge: str, vision: VisionEncoderConfig) -> str:
    """Returns the family (a key of `model/families/registry.py`) of a checkpoint with this bridge and picture encoder.

    Raises:
        ConfigError: This bridge does not support this kind of picture encoder.
    """
    row = ARCHITECTURES[bridge]
    family = {BLIP2_VISION: row.family, CLIP_VISION: row.clip_family}.get(vision.kind, row.any_family)
    if not family:
        raise ConfigError(
            f"bridge = {bridge!r} does not support the picture encoder of a {vision_encoder(vision.kind).title}",
            f"set model.vision_from to a {'CLIP' if row.clip_family else 'BLIP-2'}, or choose another bridge",
        )
    return family


def captioner_config(
    bridge: str,
    sizes: ModelConfig,
    vision: VisionEncoderConfig,
    language: LanguageConfig,
    *,
    extra: int = 0,
    text: DraftConfig | None = None,
    instructed: bool = False,
) -> CaptionerConfig:
    """Makes the config of the captioner that a recipe describes, without its special tokens.

    Args:
        bridge: Value of the recipe's key `bridge`.
        sizes: Sizes of a new bridge.
        vision: Config of the picture encoder.
        language: Config of the language model.
        extra: Number of rows to append to the language model's token embedding table.
        text: Config of the Q-Former's text modules (draft model, or input of the prompt); None for no text modules.
        instructed: Whether the Q-Former reads the prompt (InstructBLIP).

    Raises:
        ConfigError: These parts do not fit together.
    """
    row = ARCHITECTURES[bridge]
    family = family_of(bridge, vision)
    language = row.language(language, vision, extra)
    bridge_config = row.bridge(sizes, vision, language)
    if instructed:
        if not isinstance(bridge_config, QFormerConfig) or text is None:
            raise ConfigError(
                f"instruct needs a Q-Former that reads the prompt, and bridge is {bridge!r}",
                "set bridge to 'qformer'",
            )
        return CaptionerConfig(vision, with_text_side(bridge_config, text), language, family="instructblip")
    draft = text if isinstance(bridge_config, QFormerConfig) else None
    return CaptionerConfig(vision, bridge_config, language, family=family, draft=draft)


def qformer_sizes(config: QFormerConfig) -> dict[str, Any]:
    """Returns the fields of a plain Q-Former's config, also if `config` describes a Q-Former that reads text."""
    return {each.name: getattr(config, each.name) for each in fields(QFormerConfig)}


def with_text_side(qformer: QFormerConfig, text: DraftConfig) -> InstructedQFormerConfig:
    """Makes the config of a Q-Former whose layers also get text as input."""
    return InstructedQFormerConfig(
        **qformer_sizes(qformer), vocab_size=text.vocab_size, instruction_positions=text.max_positions
    )


def stage1_config(
    vision: VisionEncoderConfig, qformer: QFormerConfig, text: DraftConfig, embed_dim: int
) -> RetrievalConfig:
    """Makes the config of the stage-1 model from a picture encoder and a Q-Former.

    Args:
        vision: Config of the picture encoder.
        qformer: Config of the captioner's Q-Former.
        text: Config of the Q-Former's text modules.
        embed_dim: Dimension of the vectors in which pictures and texts are compared.
    """
    return RetrievalConfig(
        family="blip-2-itm",
        vision=vision,
        text=with_text_side(qformer, text),
        embed_dim=embed_dim,
        max_positions=text.max_positions,
        num_features=qformer.num_query_tokens,
    )
