"""Models that compare a picture with a text: BLIP and BLIP-2 with two heads (ITC and ITM), CLIP with one (ITC).

Image-text contrast (ITC) compares two vectors by their cosine; image-text matching (ITM) reads picture and
text together and predicts whether they match (Li et al., arXiv 2107.07651, section 3.2; arXiv 2301.12597,
section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from blip2edge.model.bridges.instruct import InstructedQFormer
from blip2edge.model.config import VisionEncoderConfig
from blip2edge.model.interfaces import MatcherModule
from blip2edge.model.language.bert import BertEncoder
from blip2edge.model.language.clip_text import ClipText
from blip2edge.model.layers import Unit, key_mask_bias
from blip2edge.model.vision.registry import build_vision


class TextConfig(Protocol):
    """Base class of the configs of text encoders."""

    @property
    def kind(self) -> str:
        """Name of the matcher, a key of :data:`MATCHERS`."""

    @property
    def vocab_size(self) -> int:
        """Number of rows of the token table."""

    def to_hf(self) -> dict[str, Any]:
        """Returns the text encoder's section of a ``config.json``."""


@dataclass(frozen=True)
class RetrievalConfig:
    """Config of a model that compares pictures with texts.

    Attributes:
        text: Config of the text encoder.
        embed_dim: Width F of the space that picture and text are projected to.
        max_positions: Longest text, in tokens.
        num_features: Number of vectors per picture: one per query in BLIP-2, else one.
        has_match: Whether the model has a matching (ITM) head.
        family: Name of the family, a key in ``families/registry.py``.
    """

    vision: VisionEncoderConfig
    text: TextConfig
    embed_dim: int
    max_positions: int
    num_features: int = 1
    has_match: bool = True
    family: str = "blip-itm"

    frames: ClassVar[int] = 1

    @property
    def vocab_size(self) -> int:
        """Number of token ids that a text can have."""
        return self.text.vocab_size


class BlipMatcher(MatcherModule):
    """BLIP's matcher: a BERT encodes the text, and its first state represents the text.

    For ITC, BERT does not attend to the picture, and the picture is represented by its class token. For ITM, BERT
    attends to the patches.
    """

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        text: Any = config.text
        self.encoder = BertEncoder(text)
        self.image_projection = nn.Linear(config.vision.hidden_size, config.embed_dim)
        self.text_projection = nn.Linear(text.hidden_size, config.embed_dim)
        self.match_head = nn.Linear(text.hidden_size, 2)
        self.unit = Unit()

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """Computes unit vectors ``[B, 1, F]`` from ``image_embeds [B, P, Dv]``."""
        return self.unit(self.image_projection(image_embeds[:, :1]))

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes unit vectors ``[B, F]`` of texts: ids and mask are int64 ``[B, S]``, padded on the right."""
        return self.unit(self.text_projection(self.encoder(input_ids, attention_mask)[:, 0]))

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes the logits ``[B, 2]`` of "do not match" and "match"."""
        return self.match_head(self.encoder(input_ids, attention_mask, image_embeds)[:, 0])


class RetrievalQFormer(InstructedQFormer):
    """The Q-Former of BLIP-2's first stage; its input is a picture, a text, or both together."""

    def read_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encodes a text alone; ids and mask are int64 ``[B, S]``, padded on the right. Returns ``[B, S, D]``."""
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        text: Tensor = self.norm(self.word_embeddings(input_ids) + self.position_embeddings(slots))
        text = self.dropout(text)
        bias = key_mask_bias(attention_mask, text.dtype)
        for layer in self.layers:
            text = layer.read_text(text, bias)
        return text


class Blip2Matcher(MatcherModule):
    """BLIP-2's matcher: a picture has one vector per query; the vector nearest to the text gives the similarity.

    The ITM logits are the mean over the queries.
    """

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        text: Any = config.text
        self.qformer = RetrievalQFormer(text)
        self.image_projection = nn.Linear(text.hidden_size, config.embed_dim)
        self.text_projection = nn.Linear(text.hidden_size, config.embed_dim)
        self.match_head = nn.Linear(text.hidden_size, 2)
        self.unit = Unit()

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """Computes unit vectors ``[B, Q, F]`` from ``image_embeds [B, P, Dv]``."""
        return self.unit(self.image_projection(self.qformer.read(image_embeds)[0]))

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes unit vectors ``[B, F]`` of texts: ids and mask are int64 ``[B, S]``, padded on the right."""
        states = self.qformer.read_text(input_ids, attention_mask)
        return self.unit(self.text_projection(states[:, 0]))

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes the logits ``[B, 2]`` of "do not match" and "match"."""
        queries = self.qformer(image_embeds, input_ids, attention_mask)  # [B, Q, D]
        return self.match_head(queries).mean(dim=1)


class ClipMatcher(MatcherModule):
    """CLIP's matcher: vectors of the picture's class token and of the text's end token; no ITM head."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        text: Any = config.text
        self.text = ClipText(text)
        self.image_projection = nn.Linear(config.vision.hidden_size, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.embed_dim, bias=False)
        self.unit = Unit()

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """Computes unit vectors ``[B, 1, F]`` from ``image_embeds [B, P, Dv]``."""
        return self.unit(self.image_projection(image_embeds[:, :1]))

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes unit vectors ``[B, F]`` of texts: ids and mask are int64 ``[B, S]``, padded on the right."""
        return self.unit(self.text_projection(self.text(input_ids, attention_mask)))


MATCHERS: dict[str, Callable[[RetrievalConfig], MatcherModule]] = {
    "blip_text_model": BlipMatcher,
    "clip_text_model": ClipMatcher,
    "instructed-qformer": Blip2Matcher,
}
"""Class of the matcher, by the kind of the text encoder's config."""


class RetrievalModel(nn.Module):
    """A model that compares pictures with texts: a vision encoder and a matcher."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = build_vision(config.vision)
        self.matcher = MATCHERS[config.text.kind](config)
