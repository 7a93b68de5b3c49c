"""Weight tables of BLIP, and of the retrieval models BLIP-ITM, BLIP-2-ITM and CLIP."""

from __future__ import annotations

from blip2edge.model.weights.blip2 import BLIP2_VISION, CLIP_VISION, INSTRUCTBLIP_QFORMER, QFORMER_ATTENTION
from blip2edge.model.weights.rules import Rule, under

BERT_ATTENTION = tuple(
    Rule(rule.ours, tuple(path.replace("attention.", "self.") for path in rule.sources())) for rule in QFORMER_ATTENTION
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
"""Names of the tensors of one BERT: BLIP's text encoder or text decoder."""

BLIP_DECODER = (
    *under("", "text_decoder.bert.", BERT),
    *under("encoder.", "text_encoder.", BERT),
    Rule("head", "text_decoder.cls.predictions.decoder"),
    Rule("head.bias", "text_decoder.cls.predictions.decoder.bias"),
    Rule("head.dense", "text_decoder.cls.predictions.transform.dense"),
    Rule("head.norm", "text_decoder.cls.predictions.transform.LayerNorm"),
)
"""Names of the tensors of BLIP's language model: the decoder, and for VQA also the encoder of questions."""

BLIP_TIES = (
    ("text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.bias"),
    ("text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"),
)
"""Tied tensors of a BLIP checkpoint. The head's bias may be stored under both names; transformers uses the first."""

BLIP_VISION = under("vision.", "vision_model.", BLIP2_VISION)

BLIP_ITM = (
    *BLIP_VISION,
    *under("matcher.encoder.", "text_encoder.", BERT),
    Rule("matcher.image_projection", "vision_proj"),
    Rule("matcher.text_projection", "text_proj"),
    Rule("matcher.match_head", "itm_head"),
)

BLIP2_ITM = (
    Rule("matcher.qformer.query_tokens", "query_tokens"),
    *under("matcher.qformer.", "qformer.", (rule for rule in INSTRUCTBLIP_QFORMER if "layers" in rule.ours)),
    Rule("matcher.qformer.norm", "qformer.layernorm"),
    Rule("matcher.qformer.word_embeddings", "embeddings.word_embeddings"),
    Rule("matcher.qformer.position_embeddings", "embeddings.position_embeddings"),
    Rule("matcher.image_projection", "vision_projection"),
    Rule("matcher.text_projection", "text_projection"),
    Rule("matcher.match_head", "itm_head"),
)

CLIP = (
    *under("vision.", "vision_model.", CLIP_VISION),
    Rule("matcher.text.embed_tokens", "text_model.embeddings.token_embedding"),
    Rule("matcher.text.positions", "text_model.embeddings.position_embedding"),
    Rule("matcher.text.final_norm", "text_model.final_layer_norm"),
    *under("matcher.text.", "text_model.", (rule for rule in CLIP_VISION if rule.ours.startswith("layers"))),
    Rule("matcher.image_projection", "visual_projection"),
    Rule("matcher.text_projection", "text_projection"),
)
