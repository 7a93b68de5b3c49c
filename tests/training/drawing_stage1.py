"""Tiny models and batches of stage 1, and its losses computed by a slow reference after the paper."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from blip2edge.model.bridges.instruct import InstructedQFormerConfig
from blip2edge.model.config import DraftConfig, VisionConfig
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.training.loading.batches import TextBatch
from blip2edge.training.phases.stage1 import Stage1Model

CLS, SEP, PAD, DEC, VOCABULARY = 2, 3, 0, 18, 19
QUERIES, PATCHES, WIDTH = 3, 5, 8


def draw_stage1(seed: int = 0, dropout: float = 0.0) -> Stage1Model:
    """A random model in eval mode whose scores depend on their input."""
    vision = VisionConfig(8, 12, 1, 2, image_size=16, patch_size=8)
    text = InstructedQFormerConfig(
        hidden_size=12,
        intermediate_size=20,
        num_layers=3,
        num_heads=2,
        num_query_tokens=QUERIES,
        encoder_hidden_size=WIDTH,
        dropout=dropout,
        vocab_size=VOCABULARY,
        instruction_positions=16,
    )
    config = RetrievalConfig(vision, text, 6, 16, num_features=QUERIES, family="blip-2-itm")
    torch.manual_seed(seed)
    model = Stage1Model(config, DraftConfig(VOCABULARY, 16, DEC, SEP, PAD))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "temperature":
                continue
            if "embeddings" in name or "query_tokens" in name:
                parameter.normal_(0, 0.7)
            elif parameter.ndim > 1:
                parameter.normal_(0, 1.8 / parameter[0].numel() ** 0.5)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)
    return model.eval()


def draw_batch(rows: int, seed: int = 0, pictures: list[int] | None = None) -> tuple[Tensor, TextBatch]:
    """Picture embeddings and ragged texts."""
    draw = torch.Generator().manual_seed(seed)
    embeds = torch.randn(rows, PATCHES, WIDTH, generator=draw)
    ids = torch.randint(4, DEC, (rows, 7), generator=draw)
    mask = torch.ones(rows, 7, dtype=torch.int64)
    ids[:, 0] = CLS
    for row in range(rows):
        length = 7 - row % 4
        ids[row, length - 1] = SEP
        ids[row, length:], mask[row, length:] = PAD, 0
    return embeds, TextBatch(ids, mask, None if pictures is None else torch.tensor(pictures))


def slow_attention(block: Any, x: Tensor, context: Tensor, sees: list[list[bool]]) -> Tensor:
    """One row's attention with BERT's residual and norm: ``x [S, D]``, ``context [T, C]``, slot by slot."""
    heads, width = block.heads, x.shape[1] // block.heads
    rows = []
    for i, asked in enumerate(block.query(x)):
        parts = []
        for head in range(heads):
            at = slice(head * width, (head + 1) * width)
            scores = {
                j: float(asked[at] @ block.key(context[j])[at]) / math.sqrt(width)
                for j in range(len(context))
                if sees[i][j]
            }
            top = max(scores.values())
            weights = {j: math.exp(score - top) for j, score in scores.items()}
            total = sum(weights.values())
            parts.append(sum(weight / total * block.value(context[j])[at] for j, weight in weights.items()))
        rows.append(block.norm(block.dense(torch.cat(parts)) + x[i]))
    return torch.stack(rows)


def slow_feed_forward(block: Any, x: Tensor) -> Tensor:
    """BERT's feed-forward with residual and norm."""
    inner = 0.5 * block.up(x) * (1 + torch.erf(block.up(x) / math.sqrt(2)))
    return block.norm(block.down(inner) + x)


def slow_qformer(model: Stage1Model, image: Tensor, ids: list[int], task: str) -> tuple[Tensor, Tensor]:
    """Queries and text of one pair through all layers, without padding: ``[Q, D]`` and ``[T, D]``."""
    qformer: Any = model.matcher.qformer
    queries = qformer.norm(qformer.query_tokens[0])
    text = qformer.norm(
        torch.stack([qformer.word_embeddings.weight[token] + qformer.position_embeddings.weight[place]
                     for place, token in enumerate(ids)])
    )  # fmt: skip
    count = len(queries)
    total = count + len(ids)

    def may(i: int, j: int) -> bool:
        if task == "itc":
            return (i < count) == (j < count)
        if task == "itm":
            return True
        return j < count or (i >= count and j <= i)

    sees = [[may(i, j) for j in range(total)] for i in range(total)]
    everything = [[True] * len(image)] * count
    for layer in qformer.layers:
        both = torch.cat([queries, text])
        both = slow_attention(layer.self_attention, both, both, sees)
        queries, text = both[:count], both[count:]
        if layer.cross_attention is not None:
            queries = slow_attention(layer.cross_attention, queries, image, everything)
        queries = slow_feed_forward(layer.feed_forward, queries)
        text = slow_feed_forward(layer.text_feed_forward, text)
    return queries, text


def slow_similarity(model: Stage1Model, image: Tensor, ids: list[int]) -> float:
    """The best cosine of a query and the text, over the temperature."""
    matcher: Any = model.matcher
    queries, text = slow_qformer(model, image, ids, "itc")
    vector = matcher.text_projection(text[0])
    cosines = [float(query @ vector / (query.norm() * vector.norm())) for query in matcher.image_projection(queries)]
    return max(cosines) / float(model.temperature.detach())


def cross_entropy(scores: list[float], target: list[float]) -> float:
    """Of a target that sums to 1."""
    top = max(scores)
    log_total = top + math.log(sum(math.exp(score - top) for score in scores))
    return -sum(share * (score - log_total) for share, score in zip(target, scores, strict=True))


def slow_losses(
    model: Stage1Model, images: Tensor, texts: list[list[int]], pictures: list[int], draws: list[list[int]]
) -> dict[str, float]:
    """The three losses of a batch, pair by pair, as the paper says them."""
    matcher: Any = model.matcher
    rows = range(len(texts))
    scores = [[slow_similarity(model, images[i], texts[j]) for j in rows] for i in rows]
    contrast = 0.0
    for i in rows:
        twins = [j for j in rows if pictures[j] == pictures[i]]
        target = [0.9 / len(twins) * (j in twins) + 0.1 / len(texts) for j in rows]
        contrast += cross_entropy(scores[i], target) / 2
        contrast += cross_entropy([scores[j][i] for j in rows], target) / 2
    matching = 0.0
    other_images, other_texts = draws
    for i in rows:
        pairs = [(i, i, 1), (other_images[i], i, 0), (i, other_texts[i], 0)]
        for image, text, label in pairs:
            queries, _ = slow_qformer(model, images[image], texts[text], "itm")
            logits = torch.stack([matcher.match_head(query) for query in queries]).mean(dim=0)
            matching += cross_entropy(logits.tolist(), [1 - label, label])
    generation, tokens = 0.0, 0
    for i in rows:
        _, states = slow_qformer(model, images[i], [DEC, *texts[i][1:]], "itg")
        for place, following in enumerate(texts[i][1:]):
            x = model.head.dense(states[place])
            x = model.head.norm(0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
            logits = (matcher.qformer.word_embeddings.weight @ x + model.head.bias).tolist()
            target = [0.1 / VOCABULARY + 0.9 * (token == following) for token in range(VOCABULARY)]
            generation += cross_entropy(logits, target)
            tokens += 1
    count = len(texts)
    return {"itc": contrast / count, "itm": matching / (3 * count), "itg": generation / tokens}
