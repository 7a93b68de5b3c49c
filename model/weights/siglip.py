"""Weight table of SigLIP's vision encoder, by the names of published checkpoints."""

from __future__ import annotations

from blip2edge.model.weights.rules import Rule

SIGLIP_VISION = (
    Rule("position_embedding", "embeddings.position_embedding.weight"),
    Rule("patch_embedding", "embeddings.patch_embedding"),
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
