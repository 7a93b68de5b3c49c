"""Computes the sizes of language models from their ``text_config``; keys and defaults as in transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blip2edge.bundle.schema import CROSS_KV, DECODER, TEXT_ENCODER
from blip2edge.errors import UnsupportedModelError
from blip2edge.shapes.model_shape import AttentionProducts, CacheShape, ModelPart, WeightMatrix
from blip2edge.shapes.parts import BASE, ROOT, Sizes, attention, feed_forward

OPT = {"vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
       "max_position_embeddings": 2048}  # fmt: skip
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "max_position_embeddings": 2048}  # fmt: skip
QWEN = {**LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
        "num_key_value_heads": 32}  # fmt: skip
LLAMAS: Mapping[str, Mapping[str, int]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
}
T5 = {"vocab_size": 32128, "d_model": 512, "d_ff": 2048, "d_kv": 64, "num_heads": 8, "num_layers": 6,
      "relative_attention_num_buckets": 32}  # fmt: skip
BERT = {**BASE, "vocab_size": 30524, "num_attention_heads": 8, "max_position_embeddings": 512}
T5_CONTEXT = 2048  # tokens; T5 itself has no limit


@dataclass(frozen=True)
class LanguageShape:
    """The sizes of a language model; :class:`ModelShape` describes the attributes of the same names."""

    parts: tuple[ModelPart, ...]
    cache: CacheShape
    max_positions: int
    table: tuple[int, int]
    tied: bool
    width: int


def opt(values: Any, _: bool | None = None) -> LanguageShape:
    """Returns the sizes of an OPT; OPT-350m has a narrower token table and norms after the blocks."""
    f = Sizes("text_config", values, OPT)
    width, layers, heads = f["hidden_size"], f["num_hidden_layers"], f["num_attention_heads"]
    narrow, positions, vocabulary = f.get("word_embed_proj_dim", width), f["max_position_embeddings"], f["vocab_size"]
    bias, affine = f.flag("enable_bias", True), f.flag("layer_norm_elementwise_affine", True)
    last = f.flag("do_layer_norm_before", True) and not f.flag("_remove_final_layer_norm", False)
    ends: tuple[WeightMatrix, ...] = ()
    if narrow != width:
        ends = (WeightMatrix("table to states", narrow, width, "steps"), WeightMatrix("states to head", width, narrow,
                "asked"))  # fmt: skip
    decoder = ModelPart(
        DECODER,
        (
            *ends,
            *attention(layers, width, width, "steps", bias=bias),
            *feed_forward(layers, width, f["ffn_dim"], "steps", bias=bias),
            WeightMatrix("head", narrow, vocabulary, "asked"),
        ),
        (AttentionProducts(width, heads, "steps", "context", layers),),
        (positions + 2) * width + (2 * width * (2 * layers + last) if affine else 0),
        kernels=narrow == width and last,
    )
    cache = CacheShape(layers, heads, width // heads)
    return LanguageShape((decoder,), cache, positions, (vocabulary, narrow), f.flag("tie_word_embeddings", True), width)


def llama(values: Any, tied: bool | None = None, kind: str = "llama") -> LanguageShape:
    """Returns the sizes of a Llama, Mistral, Qwen2 or Qwen3.

    ``tied``: whether the head is the token table; None to read this from the config.
    """
    f = Sizes("text_config", values, LLAMAS[kind])
    width, layers, heads = f["hidden_size"], f["num_hidden_layers"], f["num_attention_heads"]
    head = f.get("head_dim", width // heads)
    shared = f.get("num_key_value_heads", heads) if f.values.get("num_key_value_heads", 0) is not None else heads
    bias = kind in ("llama", "qwen3") and f.flag("attention_bias", False)
    vocabulary = f["vocab_size"]
    decoder = ModelPart(
        DECODER,
        (
            *attention(layers, width, heads * head, "steps", kv=shared * head, bias=bias or kind == "qwen2",
                       out_bias=bias),
            *feed_forward(layers, width, f["intermediate_size"], "steps", gated=True,
                          bias=kind == "llama" and f.flag("mlp_bias", False)),
            WeightMatrix("head", width, vocabulary, "asked"),
        ),
        (AttentionProducts(heads * head, heads, "steps", "context", layers),),
        width * (2 * layers + 1) + (2 * head * layers if kind == "qwen3" else 0),
        kernels=kind != "qwen3",
    )  # fmt: skip
    tied = f.flag("tie_word_embeddings", False) if tied is None else tied
    cache = CacheShape(layers, shared, head)
    return LanguageShape((decoder,), cache, f["max_position_embeddings"], (vocabulary, width), tied, width)


def t5(values: Any, _: bool | None = None) -> LanguageShape:
    """Returns the sizes of a T5 or Flan-T5: text encoder, keys and values of the cross-attention, decoder.

    T5's attention has a relative bias, so the optimized copy fuses neither the attention nor the norms and gates.
    """
    f = Sizes("text_config", values, T5)
    width, inner, heads, head, encoders = (f[key] for key in ("d_model", "d_ff", "num_heads", "d_kv", "num_layers"))
    layers, gated = f.get("num_decoder_layers", encoders), str(f.values.get("feed_forward_proj")).startswith("gated")
    channels, bias_table, vocabulary = heads * head, f["relative_attention_num_buckets"] * heads, f["vocab_size"]
    encoder = ModelPart(
        TEXT_ENCODER,
        (
            *attention(encoders, width, channels, "encoder"),
            *feed_forward(encoders, width, inner, "encoder", gated=gated),
        ),
        (AttentionProducts(channels, heads, "encoder", "encoder", encoders),),
        bias_table + width * (2 * encoders + 1),
        operators=6,
    )
    queries, keys, out = attention(layers, width, channels, "steps", keys=(width, "source"))
    decoder = ModelPart(
        DECODER,
        (
            *attention(layers, width, channels, "steps"),
            queries,
            out,
            *feed_forward(layers, width, inner, "steps", gated=gated),
            WeightMatrix("head", width, vocabulary, "asked"),
        ),
        (
            AttentionProducts(channels, heads, "steps", "context", layers),
            AttentionProducts(channels, heads, "steps", "source", layers),
        ),
        bias_table + width * (3 * layers + 1),
        operators=9,
    )
    parts = (encoder, ModelPart(CROSS_KV, (keys,), operators=4), decoder)
    cache = CacheShape(layers, heads, head, cross=layers * channels)
    tied = f.flag("tie_word_embeddings", True)
    return LanguageShape(parts, cache, T5_CONTEXT, (vocabulary, width), tied, width)


def bert_layers(
    layers: int, width: int, inner: int, heads: int, rows: str, cross: tuple[int, str]
) -> tuple[tuple[WeightMatrix, ...], tuple[AttentionProducts, ...], int]:
    """Returns the matrices, the attentions, and the number of norm parameters of BLIP's text layers.

    ``cross`` describes the states that the layers cross-attend to: their width, and the key of their number in
    :data:`TokenCounts`.
    """
    context = "context" if rows == "steps" else rows
    matrices = (
        *attention(layers, width, width, rows, bias=True),
        *attention(layers, width, width, rows, keys=cross, bias=True),
        *feed_forward(layers, width, inner, rows, bias=True),
    )
    products = (
        AttentionProducts(width, heads, rows, context, layers),
        AttentionProducts(width, heads, rows, cross[1], layers),
    )
    return matrices, products, 2 * width * (3 * layers + 1)


def bert(values: Any, picture: int, *, reads_question: bool = False) -> LanguageShape:
    """Returns the sizes of BLIP's text decoder; for VQA, also those of its question encoder.

    ``picture``: width of the picture's embeddings.
    """
    f = Sizes("text_config", values, BERT)
    sizes = (f["num_hidden_layers"], f["hidden_size"], f["intermediate_size"], f["num_attention_heads"])
    layers, width, _, heads = sizes
    vocabulary, positions = f["vocab_size"], f["max_position_embeddings"]
    parts: list[ModelPart] = []
    if reads_question:
        matrices, products, norms = bert_layers(*sizes, "encoder", (picture, "embeds"))
        tables = (vocabulary + positions) * width
        parts.append(ModelPart(TEXT_ENCODER, matrices, products, tables + norms))
    source = width if reads_question else picture
    matrices, products, norms = bert_layers(*sizes, "steps", (source, "source"))
    keys = tuple(matrix for matrix in matrices if matrix.rows == "source")
    ends = (WeightMatrix("transform", width, width, "asked", 1, True), WeightMatrix("head", width, vocabulary, "asked",
            1, True))  # fmt: skip
    rest = tuple(matrix for matrix in matrices if matrix.rows != "source")
    parts += [
        ModelPart(CROSS_KV, keys, operators=4),
        ModelPart(DECODER, (*rest, *ends), products, positions * width + norms + 2 * width, operators=5),
    ]
    cache = CacheShape(layers, heads, width // heads, cross=layers * width)
    tied = f.flag("tie_word_embeddings", True)
    return LanguageShape(tuple(parts), cache, positions, (vocabulary, width), tied, width)


def flamingo(values: Any, source: int) -> LanguageShape:
    """Returns the sizes of a Llama with gated cross-attention layers (Idefics).

    ``source``: width of the states that the gated layers attend to.
    """
    f = Sizes(ROOT, values, {**LLAMA, "cross_layer_interval": 1})
    plain = llama({**values, "num_key_value_heads": None, "attention_bias": False, "mlp_bias": False})
    width, layers = f["hidden_size"], f["num_hidden_layers"] // f["cross_layer_interval"]
    channels, heads = plain.cache.heads * plain.cache.head_dim, plain.cache.heads
    queries, keys, out = attention(layers, width, channels, "steps", keys=(source, "source"))
    gates = 2 * (width if f.values.get("alpha_type") == "vector" else 1)
    norms = 2 * width + (2 * plain.cache.head_dim if f.flag("qk_layer_norms", False) else 0)
    rows = plain.table[0] + f.count("additional_vocab_size")
    (decoder,) = plain.parts
    matrices = (
        *(WeightMatrix("head", width, rows, "asked") if one.name == "head" else one for one in decoder.matrices),
        queries,
        out,
        *feed_forward(layers, width, f["intermediate_size"], "steps", gated=True),
    )
    products = (*decoder.attentions, AttentionProducts(channels, heads, "steps", "source", layers))
    decoder = ModelPart(DECODER, matrices, products, decoder.vectors + layers * (gates + norms), operators=8)
    cache = CacheShape(plain.cache.layers, heads, plain.cache.head_dim, cross=layers * channels)
    parts = (ModelPart(CROSS_KV, (keys,), operators=6), decoder)
    return LanguageShape(parts, cache, plain.max_positions, (rows, width), plain.tied, width)


LANGUAGES: Mapping[str, Callable[..., LanguageShape]] = {
    "opt": opt,
    "t5": t5,
    **{kind: lambda values, tied=None, kind=kind: llama(values, tied, kind) for kind in LLAMAS},
}
"""Function that reads the sizes of a language model from its ``text_config``, by ``model_type``."""


def bridged_shape(values: Any, default: str, tied: bool | None = None) -> LanguageShape:
    """Reads the sizes of the language model from a ``text_config``.

    ``default`` is used if ``text_config`` has no ``model_type``.

    Raises:
        UnsupportedModelError: The ``model_type`` is not supported.
    """
    section = Sizes("text_config", values, {})
    kind = section.values.get("model_type", default)
    if not isinstance(kind, str) or kind not in LANGUAGES:
        raise UnsupportedModelError(
            f"the language model is of type {kind!r}, which is not supported", f"supported: {', '.join(LANGUAGES)}"
        )
    return LANGUAGES[kind](section.values, tied)
