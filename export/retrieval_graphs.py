"""The graphs of a matching model, which compares pictures with texts.

Each graph has a spec of its inputs and outputs, and a torch module to trace:

    image_embeds [B,P,Dv]                     → image_features [B,K,F], K unit vectors for each picture
    input_ids, attention_mask [B,S]           → text_embeds [B,F], a unit vector for each text
    image_embeds, input_ids, attention_mask   → probability [B] of a match, match_logits [B,2] (no match, match)

The cosine of a picture and a text is the largest dot product of ``text_embeds`` with the K ``image_features``.
"""

from __future__ import annotations

from torch import Tensor, nn

from blip2edge.bundle.schema import IMAGE_FEATURES, MATCH, TEXT_EMBEDS, Axis, GraphSpec, TensorSpec
from blip2edge.export.axes import batch_axis, image_embeds
from blip2edge.model.retrieval import RetrievalConfig, RetrievalModel

TEXT_STACKS = ("matcher.encoder.layers", "matcher.qformer.layers", "matcher.text.layers")
"""Possible module paths of the text encoder's list of layers; a model has one of these."""


class ImageFeaturesGraph(nn.Module):
    """The module that is traced for ``image_features``: maps patch embeddings to K unit vectors for each picture."""

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        self.matcher = model.matcher

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Maps ``image_embeds [B, P, Dv]`` to ``image_features [B, K, F]``."""
        return self.matcher.image_features(image_embeds)


class TextEmbedsGraph(nn.Module):
    """The module that is traced for ``text_embeds``: maps token ids and their mask to one unit vector for each text."""

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        self.matcher = model.matcher

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Maps ids and mask, int64 ``[B, S]`` each, to ``text_embeds [B, F]``."""
        return self.matcher.text_embeds(input_ids, attention_mask)


class MatchGraph(nn.Module):
    """The module that is traced for ``match``: maps pairs of picture and text to match probabilities and logits."""

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        self.matcher = model.matcher

    def forward(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the match probability ``[B]`` and the logits ``[B, 2]`` of pairs of picture and text.

        Args:
            image_embeds: ``[B, P, Dv]``.
            input_ids: Token ids of the texts, int64 ``[B, S]``.
            attention_mask: int64 ``[B, S]``.
        """
        logits = self.matcher.match(image_embeds, input_ids, attention_mask)
        return logits.softmax(dim=-1)[:, 1], logits


def text_tensors(config: RetrievalConfig) -> tuple[TensorSpec, TensorSpec]:
    """Describes the tensors of texts: token ids and attention mask, int64 ``[B, S]`` each."""
    longest = config.max_positions
    dims = (batch_axis(), Axis("text", 1, min(16, longest), longest))
    return TensorSpec("input_ids", "int64", dims), TensorSpec("attention_mask", "int64", dims)


def image_features_spec(config: RetrievalConfig) -> GraphSpec:
    """Describes the inputs and outputs of :class:`ImageFeaturesGraph`."""
    features = TensorSpec("image_features", "float32", (batch_axis(), config.num_features, config.embed_dim))
    return GraphSpec(IMAGE_FEATURES, (image_embeds(config),), (features,))


def text_embeds_spec(config: RetrievalConfig) -> GraphSpec:
    """Describes the inputs and outputs of :class:`TextEmbedsGraph`."""
    embeds = TensorSpec("text_embeds", "float32", (batch_axis(), config.embed_dim))
    return GraphSpec(TEXT_EMBEDS, text_tensors(config), (embeds,))


def match_spec(config: RetrievalConfig) -> GraphSpec:
    """Describes the inputs and outputs of :class:`MatchGraph`."""
    scores = (
        TensorSpec("probability", "float32", (batch_axis(),)),
        TensorSpec("match_logits", "float32", (batch_axis(), 2)),
    )
    return GraphSpec(MATCH, (image_embeds(config), *text_tensors(config)), scores)
