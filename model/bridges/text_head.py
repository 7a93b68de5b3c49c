"""The text head of the Q-Former, used as draft model: a small captioner from image-grounded text generation (ITG).

A text follows the queries. Its first token is [DEC]; a token attends to the queries' keys and values and to the
tokens before it, and the word head gives the logits of the next token (Li et al., arXiv 2301.12597, section 3.1).
Self-attention and the first norm are shared with the Q-Former. The text head has its own token table, position table,
feed-forward and word head. A checkpoint stores them in separate files, ``draft.safetensors`` and ``draft.json``, which
transformers ignores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.model.bert_blocks import BertFeedForward
from blip2edge.model.bridges.qformer import QFormerLayer
from blip2edge.model.config import DraftConfig, QFormerConfig
from blip2edge.model.layers import ACTIVATIONS, KeyValue, gather_positions, stack
from blip2edge.model.weights.rules import Rule

DRAFT_FILE = "draft.safetensors"
DRAFT_CONFIG = "draft.json"
DRAFT_PREFIX = "draft."
"""Prefix of the text head's parameter names in the model.

The tensors of ``draft.safetensors`` have no prefix; they get this one when they are read.
"""


class WordHead(nn.Module):
    """Maps states to logits: a linear layer, an activation and a norm, then the token embedding table as output matrix.

    This is BERT's output layer (arXiv 1810.04805); LAVIS calls it ``cls``.
    """

    def __init__(self, config: QFormerConfig, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Maps the states of K tokens, ``[B, K, D]``, to logits ``[B, K, V]``.

        The output matrix is the token table ``[V, D]``.
        """
        x = self.norm(self.activation(self.dense(x)))
        return x @ table.t() + self.bias


class TextSide(NamedTuple):
    """The modules that generate a text after the queries; some are shared with the Q-Former.

    Attributes:
        words: Token table.
        positions: Position table; [DEC], the first token, has position 0.
        norm: The norm before the first layer, shared with the queries.
        dropout: Dropout after the norm.
        layers: The Q-Former's layers, whose self-attention the text shares, each with the text's feed-forward.
        head: Maps states to logits.
    """

    words: nn.Embedding
    positions: nn.Embedding
    norm: nn.LayerNorm
    dropout: nn.Dropout
    layers: Sequence[tuple[QFormerLayer, BertFeedForward]]
    head: WordHead

    def write(
        self,
        input_ids: Tensor,
        positions: Tensor,
        bias: Tensor,
        past: Iterable[KeyValue],
        logits_indices: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Runs the layers on the next tokens of a text.

        Args:
            input_ids: Token ids, int64 ``[B, S]``; the first token of a text is [DEC].
            positions: Positions of the tokens, int64 ``[B, S]`` or ``[S]``, 0 for [DEC].
            bias: Added to the scores, broadcastable to ``[B, H, S, P + S]``.
            past: For each layer, keys and values ``[B, H, P, d]`` of the queries and the earlier tokens.
            logits_indices: int64 ``[B, K]``, indices of the tokens to compute logits for; None for all S.

        Returns:
            Logits ``[B, K, V]``, and keys and values ``[B, H, P + S, d]`` of each layer.
        """
        x = self.dropout(self.norm(self._embed(input_ids) + self.positions(positions)))
        presents: list[KeyValue] = []
        for (layer, feed_forward), before in zip(self.layers, past, strict=True):
            x, present = layer.write(x, before, bias, feed_forward)
            presents.append(present)
        return self.head(gather_positions(x, logits_indices), self.words.weight), presents

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Maps token ids, int64 ``[B, S]``, to embeddings ``[B, S, D]``."""
        if not torch.compiler.is_exporting():
            return F.embedding(input_ids, self.words.weight)
        # Columns of the transposed table, which is the head's matrix, so that a graph holds the table once.
        columns = self.words.weight.t().index_select(1, input_ids.flatten())  # [D, B * S]
        return columns.t().reshape(*input_ids.shape, -1)


class TextHead(nn.Module):
    """The text head's own modules, without the modules that it shares with the Q-Former."""

    def __init__(self, config: DraftConfig, qformer: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, qformer.hidden_size)
        self.positions = nn.Embedding(config.max_positions, qformer.hidden_size)
        self.feed_forwards = stack(BertFeedForward(qformer) for _ in range(qformer.num_layers))
        self.head = WordHead(qformer, config.vocab_size)

    def text_side(self, qformer: Any) -> TextSide:
        """Combines the text head's own modules with the shared modules of ``qformer`` (``model.bridge.qformer``)."""
        layers = list(zip(qformer.layers, self.feed_forwards, strict=True))
        return TextSide(self.words, self.positions, qformer.norm, qformer.dropout, layers, self.head)


TEXT_HEAD_RULES = (
    Rule("words", "embeddings.word_embeddings"),
    Rule("positions", "embeddings.position_embeddings"),
    Rule("feed_forwards.*.up", "qformer.encoder.layer.*.intermediate.dense"),
    Rule("feed_forwards.*.down", "qformer.encoder.layer.*.output.dense"),
    Rule("feed_forwards.*.norm", "qformer.encoder.layer.*.output.LayerNorm"),
    Rule("head.dense", "cls.predictions.transform.dense"),
    Rule("head.norm", "cls.predictions.transform.LayerNorm"),
    Rule("head.bias", "cls.predictions.bias"),
)
"""Maps parameter names of :class:`TextHead` to tensor names in ``draft.safetensors``.

The file uses the names of transformers' ``Blip2ForImageTextRetrieval``, and LAVIS' names for the word head.
"""


def write_draft(directory: Path, tensors: Mapping[str, Tensor], config: DraftConfig) -> None:
    """Writes the text head as a draft model: ``draft.safetensors`` and ``draft.json``.

    Args:
        directory: Directory of the checkpoint.
        tensors: Tensors of the text head, by their names in the file; see :data:`TEXT_HEAD_RULES`.
        config: Sizes and special tokens of the text head.
    """
    save_file(dict(tensors), directory / DRAFT_FILE, metadata={"format": "pt"})
    text = json.dumps(config.to_json(), indent=2) + "\n"
    (directory / DRAFT_CONFIG).write_text(text, encoding="utf-8")
