"""BLIP-2's first stage: queries that learn to see what a text says (Li et al., arXiv 2301.12597, section 3.1).

Three losses of one picture and its text, added with equal weights, the picture encoder being frozen:

    itc   contrast: the pair's own picture and text are nearest (mask: unimodal)
    itm   matching: a pair is told from one with a drawn, hard negative (mask: bidirectional)
    itg   generation: the text is written behind the queries' keys and values (mask: multimodal causal)

The formulas are the paper's and LAVIS' (blip2_qformer.py). Where this departs from LAVIS, several processes take the
step that one would take on all their rows: features are gathered with gradient, and itg is averaged over the tokens
of all ranks. A batch of one works, and so does a run without a process group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.model.bridges.draft import DraftConfig, TextSide, WordHead
from blip2edge.model.layers import KeyValue
from blip2edge.model.masks import attention_mask, mask_bias
from blip2edge.model.retrieval import RetrievalConfig, RetrievalModel
from blip2edge.training.loading.batches import IGNORED, TextBatch
from blip2edge.training.loading.loader import PictureBatch
from blip2edge.training.loop.optim import freeze
from blip2edge.training.phases.distributed import gather, gather_padded, mean_over_ranks, rank_and_size

LABEL_SMOOTHING = 0.1
TEMPERATURE = 0.07  # at the start; learned as it is, without exp or clamp

Draw = Callable[[Tensor], Tensor]
"""From weights ``[B, N]``, rows summing to 1, to a drawn column a row, int64 ``[B]``."""


def draw_negative(weights: Tensor) -> Tensor:
    """A column a row, by its weights, from torch's own generator."""
    return torch.multinomial(weights, 1)[:, 0]


def query_text_similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Cosines: of a picture's queries, the nearest to the text counts.

    Args:
        image_features: ``[B, Q, F]`` of length 1.
        text_features: ``[N, F]`` of length 1.

    Returns:
        float32 ``[B, N]``, under autocast too.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        products = torch.einsum("bqf,nf->bnq", image_features.float(), text_features.float())
    return products.max(dim=-1).values


def itc_loss(image_to_text: Tensor, text_to_image: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy both ways, with label smoothing; averaged.

    A row's target is shared by all columns of the same picture; a :data:`LABEL_SMOOTHING` of it is spread over all.

    Args:
        image_to_text: ``[B, N]``, query_text_similarity over the temperature, of this rank's pictures and all texts.
        text_to_image: ``[B, N]``, of this rank's texts and all pictures.
        same: bool ``[B, N]``, whether row and column have the same picture.

    Returns:
        A scalar.
    """
    targets = same.to(image_to_text.dtype)
    targets = targets / targets.sum(dim=1, keepdim=True)
    targets = (1 - LABEL_SMOOTHING) * targets + LABEL_SMOOTHING / targets.shape[1]
    return (F.cross_entropy(image_to_text, targets) + F.cross_entropy(text_to_image, targets)) / 2


def itm_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy of "apart" and "together" over pairs and their negatives.

    Args:
        logits: ``[3, B, 2]``: of each pair; of its text with another picture; of its picture with another text.
        counted: bool ``[B]``: whether there was another picture to draw. A row without one counts 0, as there is
            nothing to tell apart.

    Returns:
        A scalar, the mean over ``3 * B``.
    """
    rows = logits.shape[1]
    labels = torch.tensor([1, 0, 0], device=logits.device)[:, None].expand(3, rows)
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(3, rows)
    return (losses * counted).sum() / (3 * rows)


def itg_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Shifted cross-entropy with label smoothing, averaged over the tokens of all ranks.

    Args:
        logits: ``[B, T, V]``, behind each token of a text.
        labels: int64 ``[B, T]``, the same text, ``IGNORED`` where it is padding.

    Returns:
        A scalar; the mean over the ranks is the mean over all their tokens.
    """
    wanted = labels[:, 1:]
    total = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        wanted.flatten(),
        ignore_index=IGNORED,
        label_smoothing=LABEL_SMOOTHING,
        reduction="sum",
    )
    return total / mean_over_ranks((wanted != IGNORED).sum()).clamp(min=1)


def text_loss(side: TextSide, key_values: list[KeyValue], texts: TextBatch, dec_token_id: int) -> Tensor:
    """:func:`itg_loss` of texts written behind the queries: of the first stage, and of the second that keeps it.

    Args:
        side: The modules; in the second stage ``model.draft.text_side(model.bridge.qformer)``.
        key_values: The queries' own, from the same ``qformer.read(image_embeds)`` that gave the visual tokens.
        texts: What is to be written; their first token is replaced by [DEC].
        dec_token_id: [DEC].

    Returns:
        A scalar.
    """
    input_ids = texts.input_ids.clone()
    input_ids[:, 0] = dec_token_id
    queries = key_values[0][0].shape[2]
    mask = attention_mask("itg", queries, texts.attention_mask)[:, queries:]  # [B, T, Q + T]
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    bias = mask_bias(mask, side.words.weight.dtype)
    logits, _ = side.write(input_ids, places, bias, key_values)  # [B, T, V]
    return itg_loss(logits, input_ids.masked_fill(texts.attention_mask == 0, IGNORED))


class Stage1Model(RetrievalModel):
    """What is trained: the model that compares pictures with texts, a word head, and the temperature.

    Args:
        config: Of the family ``blip-2-itm``; ``config.text.vocab_size`` counts [DEC].
        draft: The special tokens, and the same vocabulary.
    """

    def __init__(self, config: RetrievalConfig, draft: DraftConfig) -> None:
        super().__init__(config)
        text: Any = config.text
        self.draft_config = draft
        self.head = WordHead(text, text.vocab_size)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))

    def text_side(self) -> TextSide:
        """The modules that write a text."""
        qformer: Any = self.matcher.qformer
        layers = [(layer.self_attention, layer.text_feed_forward) for layer in qformer.layers]
        return TextSide(
            qformer.word_embeddings,
            qformer.position_embeddings,
            qformer.norm,
            qformer.dropout,
            layers,
            self.head,
        )

    def forward(
        self, image_embeds: Tensor, texts: TextBatch, draw: Draw = draw_negative
    ) -> dict[str, Tensor]:
        """The three losses of captioned pictures.

        Call the module, not its parts: under DistributedDataParallel that is what synchronises gradients. B must be
        the same on every rank.

        Args:
            image_embeds: ``[B, P, Dv]``, what ``model.vision(pixel_values)`` gives, or a cache of it.
            texts: One a picture.
            draw: Chooses the hard negatives, first of a picture for each text, then of a text for each picture;
                columns count over all ranks.

        Returns:
            ``itc``, ``itm`` and ``itg``, scalars; their sum is the loss of the first stage.
        """
        matcher: Any = self.matcher
        queries, key_values = matcher.qformer.read(image_embeds)
        image_features = matcher.unit(matcher.image_projection(queries))  # [B, Q, F]
        text_features = matcher.text_embeds(texts.input_ids, texts.attention_mask)  # [B, F]
        image_to_text = (
            query_text_similarity(image_features, gather(text_features)) / self.temperature
        )  # [B, N]
        text_to_image = query_text_similarity(gather(image_features), text_features).t() / self.temperature
        same = _same_picture(texts, image_to_text.shape[1])
        logits, counted = self._matched(image_embeds, texts, (image_to_text, text_to_image), same, draw)
        return {
            "itc": itc_loss(image_to_text, text_to_image, same),
            "itm": itm_loss(logits, counted),
            "itg": text_loss(self.text_side(), key_values, texts, self.draft_config.dec_token_id),
        }

    def _matched(
        self,
        image_embeds: Tensor,
        texts: TextBatch,
        scores: tuple[Tensor, Tensor],
        same: Tensor,
        draw: Draw,
    ) -> tuple[Tensor, Tensor]:
        """Draws negatives and reads the pairs; what :func:`itm_loss` takes."""
        with torch.no_grad():
            counted = (~same).any(dim=1)  # [B]
            hidden = same & counted[:, None]  # a row without a negative keeps its weights, and does not count
            image_to_text, text_to_image = (
                score.masked_fill(hidden, -torch.inf).softmax(dim=1) for score in scores
            )
            other_images, other_texts = draw(text_to_image), draw(image_to_text)
        all_ids = gather_padded(texts.input_ids, self.draft_config.pad_token_id)
        all_masks = gather_padded(texts.attention_mask, 0)
        missing = all_ids.shape[1] - texts.input_ids.shape[1]
        ids = F.pad(texts.input_ids, (0, missing), value=self.draft_config.pad_token_id)
        mask = F.pad(texts.attention_mask, (0, missing))
        logits = self.matcher.match(
            torch.cat([image_embeds, gather(image_embeds)[other_images], image_embeds]),
            torch.cat([ids, ids, all_ids[other_texts]]),
            torch.cat([mask, mask, all_masks[other_texts]]),
        )
        return logits.view(3, len(ids), 2), counted


def _same_picture(texts: TextBatch, columns: int) -> Tensor:
    """bool ``[B, N]``: whether this rank's row and any rank's column have the same picture."""
    rows = len(texts.input_ids)
    if texts.pictures is not None:
        return texts.pictures[:, None] == gather(texts.pictures)[None, :]
    first = rank_and_size()[0] * rows
    numbers = torch.arange(columns, device=texts.input_ids.device)
    return numbers[first : first + rows, None] == numbers[None, :]


def prepare_stage1(model: Stage1Model) -> None:
    """Puts the model into training mode with a frozen picture encoder."""
    model.train()
    freeze(model.vision)


class RepresentationStage(nn.Module):
    """Stage 1 with a weight for each loss. The picture encoder is frozen.

    Args:
        model: Trained in place, except for its picture encoder.
        weights: Weights of "itc", "itm" and "itg".
    """

    def __init__(self, model: Stage1Model, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model = model
        self._weights = dict(weights)
        prepare_stage1(model)

    def forward(self, batch: PictureBatch) -> dict[str, Tensor]:
        """The three losses, and `loss`, their weighted sum."""
        losses: dict[str, Tensor] = self.model(batch.image_embeds, batch.texts)
        total = torch.stack([self._weights[name] * loss for name, loss in losses.items()]).sum()
        return {**losses, "loss": total}

    def gauges(self) -> dict[str, float]:
        """The learned temperature."""
        return {"temperature": float(self.model.temperature.detach())}
