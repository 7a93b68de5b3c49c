"""Weight tables of BLIP-2, InstructBLIP and LLaVA: vision encoders and bridges."""

from __future__ import annotations

from blip2edge.model.weights.rules import Rule, under

BLIP2_VISION = (
    Rule("class_embedding", "embeddings.class_embedding"),
    Rule("position_embedding", "embeddings.position_embedding"),
    Rule("patch_embedding", "embeddings.patch_embedding"),
    Rule("post_norm", "post_layernorm"),
    Rule("layers.*.norm1", "encoder.layers.*.layer_norm1"),
    Rule("layers.*.norm2", "encoder.layers.*.layer_norm2"),
    Rule("layers.*.attention", "encoder.layers.*.self_attn"),
    Rule("layers.*.mlp", "encoder.layers.*.mlp"),
)

CLIP_VISION = (
    Rule("class_embedding", "embeddings.class_embedding"),
    Rule("position_embedding", "embeddings.position_embedding.weight"),
    Rule("patch_embedding", "embeddings.patch_embedding"),
    Rule("pre_norm", "pre_layrnorm"),
    Rule("post_norm", "post_layernorm"),
    Rule("layers.*.norm1", "encoder.layers.*.layer_norm1"),
    Rule("layers.*.norm2", "encoder.layers.*.layer_norm2"),
    Rule(
        "layers.*.attention.qkv",
        tuple(f"encoder.layers.*.self_attn.{part}_proj" for part in ("q", "k", "v")),
    ),
    Rule("layers.*.attention.projection", "encoder.layers.*.self_attn.out_proj"),
    Rule("layers.*.mlp", "encoder.layers.*.mlp"),
)

EFFICIENTNET_LITE = tuple(Rule(part, part) for part in ("stem", "blocks", "head"))

LLAVA = (
    Rule("bridge.fc1", "multi_modal_projector.linear_1"),
    Rule("bridge.fc2", "multi_modal_projector.linear_2"),
)

QFORMER_ATTENTION = (
    Rule("query", "attention.query"),
    Rule("key", "attention.key"),
    Rule("value", "attention.value"),
    Rule("dense", "output.dense"),
    Rule("norm", "output.LayerNorm"),
)

BLIP2_QFORMER = (
    Rule("norm", "layernorm"),
    *under("layers.*.self_attention.", "encoder.layer.*.attention.", QFORMER_ATTENTION),
    *under("layers.*.cross_attention.", "encoder.layer.*.crossattention.", QFORMER_ATTENTION),
    Rule("layers.*.feed_forward.up", "encoder.layer.*.intermediate_query.dense"),
    Rule("layers.*.feed_forward.down", "encoder.layer.*.output_query.dense"),
    Rule("layers.*.feed_forward.norm", "encoder.layer.*.output_query.LayerNorm"),
)

INSTRUCTBLIP_QFORMER = (
    *(rule for rule in BLIP2_QFORMER if rule.ours != "norm"),
    Rule("norm", "embeddings.layernorm"),
    Rule("word_embeddings", "embeddings.word_embeddings"),
    Rule("position_embeddings", "embeddings.position_embeddings"),
    Rule("layers.*.text_feed_forward.up", "encoder.layer.*.intermediate.dense"),
    Rule("layers.*.text_feed_forward.down", "encoder.layer.*.output.dense"),
    Rule("layers.*.text_feed_forward.norm", "encoder.layer.*.output.LayerNorm"),
)

BLIP2 = (
    *under("vision.", "vision_model.", BLIP2_VISION),
    Rule("bridge.qformer.query_tokens", "query_tokens"),
    *under("bridge.qformer.", "qformer.", BLIP2_QFORMER),
    Rule("bridge.projection", "language_projection"),
)

INSTRUCTBLIP = (
    *under("vision.", "vision_model.", BLIP2_VISION),
    Rule("bridge.qformer.query_tokens", "query_tokens"),
    *under("bridge.qformer.", "qformer.", INSTRUCTBLIP_QFORMER),
    Rule("bridge.projection", "language_projection"),
)
