"""Weight tables of the language models that any bridge can feed: OPT, Llama and similar models, T5."""

from __future__ import annotations

from blip2edge.model.weights.rules import Rule, under

OPT = (
    Rule("embed_tokens", "model.decoder.embed_tokens"),
    Rule("embed_positions", "model.decoder.embed_positions"),
    Rule("project_in", "model.decoder.project_in"),
    Rule("project_out", "model.decoder.project_out"),
    Rule("final_norm", "model.decoder.final_layer_norm"),
    Rule("head", "lm_head"),
    Rule("layers.*", "model.decoder.layers.*"),
    Rule("layers.*.final_norm", "model.decoder.layers.*.final_layer_norm"),
    Rule("layers.*.attention_norm", "model.decoder.layers.*.self_attn_layer_norm"),
    Rule("layers.*.attention.query", "model.decoder.layers.*.self_attn.q_proj"),
    Rule("layers.*.attention.key", "model.decoder.layers.*.self_attn.k_proj"),
    Rule("layers.*.attention.value", "model.decoder.layers.*.self_attn.v_proj"),
    Rule("layers.*.attention.out", "model.decoder.layers.*.self_attn.out_proj"),
)

OPT_TIES = (("lm_head.weight", "model.decoder.embed_tokens.weight"),)

LLAMA_LAYER = (
    Rule("attention_norm", "input_layernorm"),
    Rule("attention.query", "self_attn.q_proj"),
    Rule("attention.key", "self_attn.k_proj"),
    Rule("attention.value", "self_attn.v_proj"),
    Rule("attention.out", "self_attn.o_proj"),
    Rule("attention.query_norm", "self_attn.q_norm"),
    Rule("attention.key_norm", "self_attn.k_norm"),
    Rule("feed_forward_norm", "post_attention_layernorm"),
    Rule("feed_forward.gate", "mlp.gate_proj"),
    Rule("feed_forward.up", "mlp.up_proj"),
    Rule("feed_forward.down", "mlp.down_proj"),
)

LLAMA = (
    Rule("embed_tokens", "model.embed_tokens"),
    *under("layers.*.", "model.layers.*.", LLAMA_LAYER),
    Rule("final_norm", "model.norm"),
    Rule("head", "lm_head"),
)

LLAMA_TIES = (("lm_head.weight", "model.embed_tokens.weight"),)

T5_TIES = (
    ("encoder.embed_tokens.weight", "shared.weight"),
    ("decoder.embed_tokens.weight", "shared.weight"),
    ("lm_head.weight", "shared.weight"),
)

T5_ATTENTION = (Rule("query", "q"), Rule("key", "k"), Rule("value", "v"), Rule("out", "o"))


def t5_rules(gated: bool) -> tuple[Rule, ...]:
    """Makes the rules for the tensors of T5; a gated feed-forward has other names for its first matrices."""
    feed_forward = (Rule("gate", "wi_0"), Rule("up", "wi_1" if gated else "wi"), Rule("down", "wo"))
    return (
        Rule("embed_tokens", "shared"),
        Rule("head", "lm_head"),
        Rule("encoder.final_norm", "encoder.final_layer_norm"),
        Rule("encoder.relative.table", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        Rule("encoder.layers.*.attention_norm", "encoder.block.*.layer.0.layer_norm"),
        *under("encoder.layers.*.attention.", "encoder.block.*.layer.0.SelfAttention.", T5_ATTENTION),
        Rule("encoder.layers.*.feed_forward_norm", "encoder.block.*.layer.1.layer_norm"),
        *under("encoder.layers.*.feed_forward.", "encoder.block.*.layer.1.DenseReluDense.", feed_forward),
        Rule("final_norm", "decoder.final_layer_norm"),
        Rule("relative.table", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        Rule("layers.*.attention_norm", "decoder.block.*.layer.0.layer_norm"),
        *under("layers.*.attention.", "decoder.block.*.layer.0.SelfAttention.", T5_ATTENTION),
        Rule("layers.*.cross_norm", "decoder.block.*.layer.1.layer_norm"),
        *under("layers.*.cross_attention.", "decoder.block.*.layer.1.EncDecAttention.", T5_ATTENTION),
        Rule("layers.*.feed_forward_norm", "decoder.block.*.layer.2.layer_norm"),
        *under("layers.*.feed_forward.", "decoder.block.*.layer.2.DenseReluDense.", feed_forward),
    )
