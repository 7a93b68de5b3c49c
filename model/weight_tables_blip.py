"""Which tensor is which in BLIP and its descendants for retrieval."""

from __future__ import annotations

from blip2edge.model.weight_tables import BLIP2_VISION, QFORMER_ATTENTION
from blip2edge.model.weights import Rule, under

BERT_ATTENTION = tuple(
    Rule(rule.ours, tuple(path.replace("attention.", "self.") for path in rule.sources()))
    for rule in QFORMER_ATTENTION
)

BERT = (
    Rule("embed_tokens", "embeddings.word_embeddings"),
    Rule("embeddings.positions", "embeddings.position_embeddings"),
    Rule("embeddings.norm", "embeddings.LayerNorm"),
    *under("layers.*.self_attention.", "encoder.layer.*.attention.", BERT_ATTENTION),
    *under("layers.*.cross_attention.", "encoder.layer.*.crossattention.", BERT_ATTENTION),
    Rule("layers.*.feed_forward.up", "encoder.layer.*.intermediate.dense"),
    Rule("layers.*.feed_forward.down", "encoder.layer.*.output.dense"),
    Rule("layers.*.feed_forward.norm", "encoder.layer.*.output.LayerNorm"),
)
"""A text model of BLIP."""

BLIP_DECODER = (
    *under("", "text_decoder.bert.", BERT),
    *under("encoder.", "text_encoder.", BERT),
    Rule("head", "text_decoder.cls.predictions.decoder"),
    Rule("head.bias", "text_decoder.cls.predictions.bias"),
    Rule("head.dense", "text_decoder.cls.predictions.transform.dense"),
    Rule("head.norm", "text_decoder.cls.predictions.transform.LayerNorm"),
)
"""The decoder of captions, or of answers behind the encoder of questions."""

BLIP_VISION = under("vision.", "vision_model.", BLIP2_VISION)
