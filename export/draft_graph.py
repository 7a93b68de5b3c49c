"""Builds the graph of the draft model: the text head of the Q-Former (``model/bridges/text_head.py``).

input_ids [B,S]          new tokens; the text begins with [DEC]
attention_mask [B,P+S]   1 for a valid slot; the first Q slots are the query tokens
text_positions [B,S]     positions in the text, 0 for [DEC]
logits_indices [B,K]     indices of the tokens that need logits
past_key_values.{i}.{key,value} [B,H,P,d]   the bridge's queries.{i}.{key,value}, then keys/values of earlier tokens
→ logits [B,K,V], present.{i}.{key,value} [B,H,P+S,d]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from blip2edge.bundle.schema import DRAFT, QUERIES, Axis, CacheSpec, DraftSpec, GraphSpec, TensorSpec
from blip2edge.export.axes import MAX_BATCH, queries_dim
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig, DraftConfig, QFormerConfig
from blip2edge.model.layers import causal_bias


class DraftGraph(nn.Module):
    """The module that is traced for the draft model: maps ``input_ids`` and the KV cache to logits and a longer cache.

    The cache begins with the keys and values of the query tokens.
    """

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.bridge = model.bridge
        self.draft = model.draft

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        text_positions: Tensor,
        logits_indices: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """Runs the text head; the docstring of this module lists the inputs and outputs.

        The cache is a flat list: for each layer the key, then the value.
        """
        if self.draft is None:
            raise ValueError("the model has no draft")
        side = self.draft.text_side(self.bridge.qformer)
        before = list(zip(past[::2], past[1::2], strict=True))
        bias = causal_bias(attention_mask, input_ids.shape[1], past[0].dtype)
        logits, presents = side.write(input_ids, text_positions, bias, before, logits_indices)
        return (logits, *(tensor for pair in presents for tensor in pair))


def _parts(config: CaptionerConfig) -> tuple[DraftConfig, QFormerConfig]:
    if config.draft is None or not isinstance(config.bridge, QFormerConfig):
        raise ValueError("the checkpoint has no draft")
    return config.draft, config.bridge


def draft_cache(config: CaptionerConfig) -> CacheSpec:
    """Returns the sizes of the draft model's KV cache, which holds the query tokens and the text."""
    _, qformer = _parts(config)
    return CacheSpec(qformer.num_layers, qformer.num_heads, qformer.hidden_size // qformer.num_heads)


def query_outputs(config: CaptionerConfig) -> list[TensorSpec]:
    """Describes the outputs of the bridge that only a draft model needs: keys and values of the query tokens.

    The list is empty if the checkpoint has no draft model.
    """
    if config.draft is None:
        return []
    cache = draft_cache(config)
    dims = (Axis("batch", 1, 1, MAX_BATCH), cache.num_heads, queries_dim(config), cache.head_dim)
    return [TensorSpec(name, "float32", dims) for name in cache.names(QUERIES)]


def draft_spec(config: CaptionerConfig) -> GraphSpec:
    """Describes the inputs and outputs of the draft model's graph: names, dtypes and axes.

    The docstring of this module lists them.
    """
    draft, qformer = _parts(config)
    cache, queries, longest = draft_cache(config), qformer.num_query_tokens, draft.max_positions
    batch, asked = Axis("batch", 1, 1, MAX_BATCH), Axis("asked", 1, 1, longest)
    past = Axis("past", config.elastic or queries, min(queries + 8, queries + longest - 1), queries + longest - 1)
    steps = Axis("steps", 1, 1, longest)
    inputs = [
        TensorSpec("input_ids", "int64", (batch, steps)),
        TensorSpec("attention_mask", "int64", (batch, past + steps)),
        TensorSpec("text_positions", "int64", (batch, steps)),
        TensorSpec("logits_indices", "int64", (batch, asked)),
    ]
    heads, width = cache.num_heads, cache.head_dim
    inputs += [TensorSpec(name, "float32", (batch, heads, past, width)) for name in cache.past_names()]
    outputs = [TensorSpec("logits", "float32", (batch, asked, draft.vocab_size))]
    outputs += [TensorSpec(name, "float32", (batch, heads, past + steps, width)) for name in cache.present_names()]
    return GraphSpec(DRAFT, tuple(inputs), tuple(outputs))


def draft_of(config: Any) -> DraftSpec | None:
    """Returns the manifest's record of the draft model; None if the checkpoint has no draft model."""
    draft = getattr(config, "draft", None)
    if draft is None:
        return None
    return DraftSpec(
        **vars(draft_cache(config)),
        dec_token_id=draft.dec_token_id,
        end_token_id=draft.end_token_id,
        max_positions=draft.max_positions,
    )
