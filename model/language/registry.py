"""The supported language models: one row per ``model_type``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blip2edge.errors import UnsupportedModelError
from blip2edge.model.config import LanguageConfig
from blip2edge.model.interfaces import DecoderModule
from blip2edge.model.language.bert import BertConfig, BertDecoder
from blip2edge.model.language.flamingo import Flamingo, FlamingoConfig
from blip2edge.model.language.llama import LlamaDecoder
from blip2edge.model.language.llama_config import LlamaConfig
from blip2edge.model.language.opt import OPTConfig, OPTDecoder
from blip2edge.model.language.t5 import T5, T5Config
from blip2edge.model.weights.blip import BLIP_DECODER, BLIP_TIES
from blip2edge.model.weights.idefics import IDEFICS_TIES, flamingo_rules
from blip2edge.model.weights.language import LLAMA, LLAMA_TIES, OPT, OPT_TIES, T5_TIES, t5_rules
from blip2edge.model.weights.rules import Rule
from blip2edge.model.weights.ties import Tie


@dataclass(frozen=True)
class Language:
    """One row of the table of language models: how a kind of language model is read from a checkpoint and built.

    Attributes:
        read_config: Function that makes the config from a ``text_config``.
        build: Function that makes the module from a config.
        rules: Function that returns, for a config, the names of the checkpoint's tensors for the parameters.
        encoder_inputs: Names of the encoder's inputs, for encoder-decoder models.
        ties: Tied tensors of a checkpoint whose config says that the embeddings are tied.
        left_out: Tensors of a checkpoint that are not used (regular expressions).
        bridged: Whether the language model works with any bridge; if not, only one family uses it.
    """

    read_config: Callable[[Any], LanguageConfig]
    build: Callable[[Any], DecoderModule]
    rules: Callable[[Any], tuple[Rule, ...]]
    encoder_inputs: tuple[str, ...] = ("inputs_embeds", "attention_mask")
    ties: tuple[Tie, ...] = ()
    left_out: tuple[str, ...] = ()
    bridged: bool = True


LANGUAGES: dict[str, Language] = {
    "opt": Language(OPTConfig.from_hf, OPTDecoder, lambda config: OPT, ties=OPT_TIES),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3"),
        Language(LlamaConfig.from_hf, LlamaDecoder, lambda config: LLAMA, ties=LLAMA_TIES),
    ),
    "blip_text_model": Language(
        BertConfig.from_hf,
        BertDecoder,
        lambda config: BLIP_DECODER,
        encoder_inputs=("input_ids", "attention_mask", "image_embeds"),
        ties=BLIP_TIES,
        left_out=(r"text_decoder\.cls\.predictions\.bias",),
        bridged=False,
    ),
    "idefics": Language(
        FlamingoConfig.from_hf,
        Flamingo,
        lambda config: flamingo_rules(config.base_vocab_size, config.vocab_size - config.base_vocab_size),
        ties=IDEFICS_TIES,
        bridged=False,
    ),
    "t5": Language(
        T5Config.from_hf,
        T5,
        lambda config: t5_rules(config.gated),
        ties=T5_TIES,
        # The encoder reads embeddings, not ids.
        left_out=(
            r"encoder\.embed_tokens\.weight",
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative.*",
        ),
    ),
}


def language_of(model_type: Any) -> Language:
    """Returns the registry's entry for the language model whose ``text_config`` has this ``model_type``.

    Raises:
        UnsupportedModelError: The ``model_type`` is not supported.
    """
    if not isinstance(model_type, str) or model_type not in LANGUAGES:
        raise _unsupported(model_type)
    return LANGUAGES[model_type]


def bridged_language(model_type: Any) -> Language:
    """Returns the registry's entry for the language model of this ``model_type``, if it works with any bridge.

    Raises:
        UnsupportedModelError: No language model with this ``model_type`` works with any bridge.
    """
    row = language_of(model_type)
    if not row.bridged:
        raise _unsupported(model_type)
    return row


def bridged_languages() -> list[str]:
    """Returns the values of ``model_type`` that :func:`bridged_language` accepts."""
    return sorted(name for name, row in LANGUAGES.items() if row.bridged)


def _unsupported(model_type: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the language model is of type {model_type!r}, which is not supported",
        f"supported: {', '.join(bridged_languages())}",
    )
