"""Stage 1 of BLIP-2: representation learning (Li et al., arXiv 2301.12597, section 3.1).

The queries of the Q-Former are trained to extract the content of a picture that its text describes. The picture encoder
is frozen. Three losses of a picture and its text are added with equal weights:

    itc   contrastive: a picture and its own text are nearest to each other (mask: unimodal)
    itm   matching: classifies whether picture and text belong together; hard negatives are drawn (mask: bidirectional)
    itg   generation: the text is generated after the queries' keys and values (mask: multimodal causal)

The formulas are those of the paper and of LAVIS (blip2_qformer.py). One thing differs from LAVIS: several processes
make the same step as one process on all their rows, because features are gathered with gradient, and itg is averaged
over the tokens of all ranks. A batch of one sample works, and a process group is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.model.bridges.text_head import TextSide, WordHead
from blip2edge.model.config import DraftConfig
from blip2edge.model.layers import KeyValue
from blip2edge.model.masks import attention_mask, mask_bias
from blip2edge.model.retrieval import RetrievalConfig, RetrievalModel
from blip2edge.training.loading.batches import IGNORED, TextBatch
from blip2edge.training.loading.loader import PictureBatch
from blip2edge.training.loop.optim import freeze
from blip2edge.training.phases.distributed import gather, gather_padded, mean_over_ranks, rank_and_size

LABEL_SMOOTHING = 0.1
TEMPERATURE = 0.07  # initial value; the parameter is the temperature itself, without exp or clamp

Draw = Callable[[Tensor], Tensor]
"""A function that draws one column for each row of weights ``[B, N]`` (rows sum to 1); returns int64 ``[B]``."""


def draw_negative(weights: Tensor) -> Tensor:
    """Draws one column for each row of `weights`, with these probabilities, from torch's global random generator.

    A row with a value that is not finite draws from all columns equally: its losses are not finite either, so the
    training loop stops with an error that names the samples.
    """
    finite = weights.isfinite().all(dim=1, keepdim=True)
    return torch.multinomial(weights.where(finite, 1.0), 1)[:, 0]


def query_text_similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Computes the cosine similarities of pictures and texts: the largest over the queries of a picture.

    Args:
        image_features: Unit vectors of the pictures' queries, ``[B, Q, F]``.
        text_features: Unit vectors of the texts, ``[N, F]``.

    Returns:
        float32 ``[B, N]``, also under autocast.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        products = torch.einsum("bqf,nf->bnq", image_features.float(), text_features.float())
    return products.max(dim=-1).values


def itc_loss(image_to_text: Tensor, text_to_image: Tensor, same: Tensor) -> Tensor:
    """Computes the contrastive loss: mean of the cross-entropies of pictures to texts and of texts to pictures.

    The target of a row is spread equally over all columns of the same picture, with :data:`LABEL_SMOOTHING`.

    Args:
        image_to_text: ``[B, N]``, similarities divided by the temperature, of this rank's pictures and all texts.
        text_to_image: ``[B, N]``, similarities divided by the temperature, of this rank's texts and all pictures.
        same: bool ``[B, N]``, whether row and column belong to the same picture.

    Returns:
        A scalar.
    """
    targets = same.to(image_to_text.dtype)
    targets = targets / targets.sum(dim=1, keepdim=True)
    targets = (1 - LABEL_SMOOTHING) * targets + LABEL_SMOOTHING / targets.shape[1]
    return (F.cross_entropy(image_to_text, targets) + F.cross_entropy(text_to_image, targets)) / 2


def itm_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """Computes the matching loss: cross-entropy of "no match" and "match" over pairs and their negatives.

    Args:
        logits: ``[3, B, 2]``, logits of: each pair of picture and text; the pair's text with a negative picture; the
            pair's picture with a negative text.
        counted: bool ``[B]``: whether a negative could be drawn for the row; other rows give loss 0.

    Returns:
        A scalar, the mean over ``3 * B``.
    """
    rows = logits.shape[1]
    labels = torch.tensor([1, 0, 0], device=logits.device)[:, None].expand(3, rows)
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(3, rows)
    return (losses * counted).sum() / (3 * rows)


def itg_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes the generation loss: cross-entropy of the next token with label smoothing, over all ranks' tokens.

    Args:
        logits: Logits after each token of a text, ``[B, T, V]``.
        labels: int64 ``[B, T]``, the tokens of the text, ``IGNORED`` at padding.

    Returns:
        A scalar; its mean over the ranks is the mean over the tokens of all ranks.
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
    """Computes :func:`itg_loss` of the text head, for texts that follow the queries.

    Used in stage 1 and, if ``itg_weight`` is above 0, in stage 2.

    Args:
        side: The modules of the text head; in stage 2 ``model.draft.text_side(model.bridge.qformer)``.
        key_values: Keys and values of the queries, from ``qformer.read(image_embeds)``.
        texts: The target texts; their first token is replaced by [DEC].
        dec_token_id: Id of [DEC].

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
    """The model of stage 1: a retrieval model, a head that predicts the next word (word head), and the temperature.

    Args:
        config: Config of the family ``blip-2-itm``; ``config.text.vocab_size`` includes [DEC].
        draft: Config of the text head: special tokens, and the same vocabulary size.
    """

    def __init__(self, config: RetrievalConfig, draft: DraftConfig) -> None:
        super().__init__(config)
        text: Any = config.text
        self.draft_config = draft
        self.head = WordHead(text, text.vocab_size)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))

    def text_side(self) -> TextSide:
        """Returns the modules that generate a text."""
        qformer: Any = self.matcher.qformer
        layers = [(layer, layer.text_feed_forward) for layer in qformer.layers]
        return TextSide(
            qformer.word_embeddings,
            qformer.position_embeddings,
            qformer.norm,
            qformer.dropout,
            layers,
            self.head,
        )

    def forward(
        self, image_embeds: Tensor, texts: TextBatch, draw: Draw = draw_negative, matching: bool = True
    ) -> dict[str, Tensor]:
        """Computes the three losses of stage 1 for captioned pictures.

        Call the module itself, not its submodules: otherwise DistributedDataParallel does not synchronise gradients.
        B must be equal on every rank.

        Args:
            image_embeds: ``[B, P, Dv]``, output of ``model.vision(pixel_values)``, computed or cached.
            texts: One text for each picture.
            draw: Draws the hard negatives: first a picture for each text, then a text for each picture. Columns are
                numbered over all ranks.
            matching: Whether the matching loss is computed, which takes more than half of the time.

        Returns:
            ``itc``, ``itm`` (if `matching`) and ``itg``, scalars; their sum is the loss of stage 1.
        """
        matcher: Any = self.matcher
        queries, key_values = matcher.qformer.read(image_embeds)
        image_features = matcher.unit(matcher.image_projection(queries))  # [B, Q, F]
        text_features = matcher.text_embeds(texts.input_ids, texts.attention_mask)  # [B, F]
        image_to_text = query_text_similarity(image_features, gather(text_features)) / self.temperature  # [B, N]
        text_to_image = query_text_similarity(gather(image_features), text_features).t() / self.temperature
        same = _same_picture(texts, image_to_text.shape[1])
        matched: dict[str, Tensor] = {}
        if matching:
            logits, counted = self._matched(image_embeds, texts, (image_to_text, text_to_image), same, draw)
            matched = {"itm": itm_loss(logits, counted)}
        return {
            "itc": itc_loss(image_to_text, text_to_image, same),
            **matched,
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
        """Draws negatives, and runs the matching head on all pairs; returns the two arguments of :func:`itm_loss`."""
        with torch.no_grad():
            counted = (~same).any(dim=1)  # [B]
            hidden = same & counted[:, None]  # a row without a negative keeps its weights and gives no loss
            image_to_text, text_to_image = (score.masked_fill(hidden, -torch.inf).softmax(dim=1) for score in scores)
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
    """Returns bool ``[B, N]``: whether text i of this rank and text j of all ranks have the same picture."""
    rows = len(texts.input_ids)
    if texts.pictures is not None:
        return texts.pictures[:, None] == gather(texts.pictures)[None, :]
    first = rank_and_size()[0] * rows
    numbers = torch.arange(columns, device=texts.input_ids.device)
    return numbers[first : first + rows, None] == numbers[None, :]


def prepare_stage1(model: Stage1Model) -> None:
    """Puts the stage-1 model into training mode, with a frozen picture encoder."""
    model.train()
    freeze(model.vision)


class RepresentationStage(nn.Module):
    """The module that stage 1 trains: computes the losses and their weighted sum.

    Args:
        model: The stage-1 model, trained in place, except for its picture encoder.
        weights: Weights of the losses "itc", "itm" and "itg". If the weight of "itm" is 0, that loss is not computed,
            and the matching head is not trained.
        vision: The picture encoder if it is trained too, else None. If it is given, the batches hold pixel values.
    """

    def __init__(self, model: Stage1Model, weights: Mapping[str, float], vision: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self._weights = dict(weights)
        self._matching = self._weights["itm"] > 0
        prepare_stage1(model)
        if not self._matching:
            freeze(model.matcher.get_submodule("match_head"))
        self.vision = None if vision is None else vision.requires_grad_(True)

    def forward(self, batch: PictureBatch) -> dict[str, Tensor]:
        """Computes the losses of a batch; returns them by name, and their weighted sum as `loss`."""
        image_embeds = batch.image_embeds if self.vision is None else self.vision(batch.image_embeds)
        losses: dict[str, Tensor] = self.model(image_embeds, batch.texts, matching=self._matching)
        total = torch.stack([self._weights[name] * loss for name, loss in losses.items()]).sum()
        return {**losses, "loss": total}

    def gauges(self) -> dict[str, float]:
        """Returns the learned temperature, for the log."""
        return {"temperature": float(self.model.temperature.detach())}
