"""Weight tables of Idefics, transformers' Flamingo."""

from __future__ import annotations

from blip2edge.model.weights.language import LLAMA, LLAMA_LAYER, LLAMA_TIES
from blip2edge.model.weights.rules import Rule, under

ADDITIONAL = (
    Rule("embed_tokens", ("model.embed_tokens", "model.embed_tokens.additional_embedding")),
    Rule("head", ("lm_head", "lm_head.additional_fc")),
)
"""Names of token table and head, each followed by a tensor with the additional rows."""

IDEFICS_TIES = (
    *LLAMA_TIES,
    ("lm_head.additional_fc.weight", "model.embed_tokens.additional_embedding.weight"),
)

GATED_LAYER = (
    *(rule for rule in LLAMA_LAYER if not rule.ours.startswith("attention.")),
    Rule("attention.query", "cross_attn.q_proj"),
    Rule("attention.key", "cross_attn.k_proj"),
    Rule("attention.value", "cross_attn.v_proj"),
    Rule("attention.out", "cross_attn.o_proj"),
    Rule("attention.query_norm", "cross_attn.q_layer_norm"),
    Rule("attention.key_norm", "cross_attn.k_layer_norm"),
    Rule("attention_gate", "alpha_cross_attn"),
    Rule("feed_forward_gate", "alpha_dense"),
)

PERCEIVER = (
    Rule("latents", "latents"),
    Rule("norm", "layer_norm"),
    Rule("layers.*.attention.context_norm", "blocks.*.0.context_layer_norm"),
    Rule("layers.*.attention.latents_norm", "blocks.*.0.latents_layer_norm"),
    Rule("layers.*.attention.query_norm", "blocks.*.0.q_layer_norm"),
    Rule("layers.*.attention.key_norm", "blocks.*.0.k_layer_norm"),
    Rule("layers.*.attention.query", "blocks.*.0.q_proj"),
    Rule("layers.*.attention.key", "blocks.*.0.k_proj"),
    Rule("layers.*.attention.value", "blocks.*.0.v_proj"),
    Rule("layers.*.attention.out", "blocks.*.0.output_proj"),
    Rule("layers.*.feed_forward.norm", "blocks.*.1.ln"),
    Rule("layers.*.feed_forward.up", "blocks.*.1.fc"),
    Rule("layers.*.feed_forward.down", "blocks.*.1.c_proj"),
)


def flamingo_rules(rows: int, additional: int) -> tuple[Rule, ...]:
    """Makes the rules for the tensors of the Flamingo decoder in an Idefics checkpoint.

    Args:
        rows: Number of rows of the original Llama's token table.
        additional: Number of additional rows after those; 0 if the checkpoint has none.
    """
    gated = under("cross_layers.*.", "model.gated_cross_attn_layers.*.", GATED_LAYER)
    if not additional:
        return (*LLAMA, *gated)
    own = {rule.ours: Rule(rule.ours, rule.theirs, (rows, additional)) for rule in ADDITIONAL}
    return (*(own.get(rule.ours, rule) for rule in LLAMA), *gated)
