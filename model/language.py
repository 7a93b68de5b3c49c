"""The language models that a bridge can feed: one row a ``model_type``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from blip2edge.errors import UnsupportedModelError
from blip2edge.model import weights
from blip2edge.model.config import LanguageConfig
from blip2edge.model.opt import OPTConfig, OPTDecoder


@dataclass(frozen=True)
class Language:
    """How a language model is read and built."""

    read_config: Callable[[Any], LanguageConfig]
    build: Callable[[Any], nn.Module]
    rules: tuple[weights.Rule, ...]


LANGUAGES: dict[str, Language] = {
    "opt": Language(OPTConfig.from_hf, OPTDecoder, weights.OPT),
}


def language_of(model_type: Any) -> Language:
    """The row of a ``text_config.model_type``.

    Raises:
        UnsupportedModelError: No such row.
    """
    if model_type not in LANGUAGES:
        raise UnsupportedModelError(
            f"the language model is of type {model_type!r}, which is not supported",
            f"supported: {', '.join(sorted(LANGUAGES))}",
        )
    return LANGUAGES[model_type]
