"""Computes the losses of stage 2 and of instruction tuning: the bridge is trained through a frozen language model.

Li et al., arXiv 2301.12597, section 3.3: picture encoder and language model are frozen, the visual tokens come before
the text, and the loss is computed only on the text after the prompt. In instruction tuning, the prompt is also an input
of the Q-Former (Dai et al., arXiv 2305.06500, section 2.3). MiniGPT-4 (arXiv 2304.10592) trains only the projection.
Flamingo (arXiv 2204.14198) adds gated layers to the language model, and trains only these layers of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.errors import ConfigError
from blip2edge.model.bridges.instruct import InstructedQFormer
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import LEARNED_QUERIES, CaptionerConfig
from blip2edge.training.loading.batches import IGNORED, CaptionBatch
from blip2edge.training.loading.loader import PictureBatch
from blip2edge.training.loop.optim import freeze
from blip2edge.training.loop.sharding import whole_tensor
from blip2edge.training.phase_config import Stage2Phase
from blip2edge.training.phases.distributed import mean_over_ranks
from blip2edge.training.phases.stage1 import text_loss
from blip2edge.training.setup.lora import MARK

TRAINED: Mapping[str, tuple[str, ...]] = {
    "qformer": ("bridge.",),
    "projection": ("bridge.projection.",),
    "mlp": ("bridge.",),
    "perceiver": ("bridge.",),
    "pool": ("bridge.",),
    "flamingo": ("bridge.", "language.cross_layers."),
}
"""Trained parameters for each value of the key `bridge`, as prefixes of the model's parameter names."""

PROJECTIONS: Mapping[str, str] = {
    "qformer": "projection",
    "instructed-qformer": "projection",
    "mlp": "fc2",
    "pool": "projection",
    "perceiver": "projection",
}
"""Name of the last layer of each kind of bridge, whose output the language model reads."""


def caption_loss(language: nn.Module, visual_tokens: Tensor, batch: CaptionBatch, pictures: int = 1) -> Tensor:
    """Computes the cross-entropy of captions, given their pictures.

    The value equals that of `labels=…` in transformers: labels are shifted by one, and the mean is over all labels,
    of all processes, except the ignored labels.

    Args:
        language: Any language model of `model/language/registry.py`.
        visual_tokens: The bridge's output, float [B, Q, D]; [B, N * Q, D] if a sample has N pictures, in order.
        batch: The texts of the B samples.
        pictures: N, the number of pictures of a sample; above 1 only for a language model with cross-attention.

    Returns:
        A scalar.
    """
    config: Any = language.config
    if config.is_encoder_decoder:
        return _encoder_decoder_loss(language, visual_tokens, batch)
    if config.cross is not None:
        return _cross_loss(language, visual_tokens, batch, pictures)
    return _prefix_loss(language, visual_tokens, batch)


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes the cross-entropy of the logits [B, K, V] of K positions, given the labels of these positions [B, K]."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / mean_over_ranks((labels != IGNORED).sum()).clamp(min=1)


def _prefix_loss(language: Any, visual_tokens: Tensor, batch: CaptionBatch) -> Tensor:
    """Computes the loss of a decoder whose input is the visual tokens followed by the token embeddings."""
    rows, count = visual_tokens.shape[:2]
    before = language.embed(batch.before_ids.expand(rows, -1))  # [B, N, D]
    text = language.embed(batch.input_ids)  # [B, S, D]
    embeds = torch.cat([before, visual_tokens.to(text.dtype), text], dim=1)
    start = before.shape[1] + count
    mask = torch.cat([batch.attention_mask.new_ones(rows, start), batch.attention_mask], dim=1)
    # Padding is on the right, so positions count up without a gap.
    positions = torch.arange(embeds.shape[1], device=embeds.device).expand(rows, -1)
    predicting = positions[:, start:-1]  # all positions of the text but the last, which has no next token
    logits, _ = language(embeds, mask, positions, predicting)  # [B, S - 1, V]
    return _token_loss(logits, batch.labels[:, 1:])


def _encoder_decoder_loss(language: Any, visual_tokens: Tensor, batch: CaptionBatch) -> Tensor:
    """Computes the loss of an encoder-decoder: visual tokens and prompt go into the encoder, captions come out."""
    rows, count = visual_tokens.shape[:2]
    text = language.embed(batch.input_ids)  # [B, S, D]
    mask = torch.cat([batch.attention_mask.new_ones(rows, count), batch.attention_mask], dim=1)
    states = language.encode(torch.cat([visual_tokens.to(text.dtype), text], dim=1), mask)
    decoder_ids = batch.decoder_ids
    if decoder_ids is None:
        raise ValueError("a batch for an encoder-decoder model needs decoder_ids")
    positions = torch.arange(decoder_ids.shape[1], device=decoder_ids.device).expand(rows, -1)
    logits, _ = language(
        language.embed(decoder_ids),
        torch.ones_like(decoder_ids),
        positions,
        cross=language.cross_key_values(states),
        cross_attention_mask=mask,
    )
    return _token_loss(logits, batch.labels)


def _cross_loss(language: Any, visual_tokens: Tensor, batch: CaptionBatch, pictures: int) -> Tensor:
    """Computes the loss of a decoder with cross-attention; each token attends to the visual tokens of one picture."""
    rows, count = visual_tokens.shape[:2]
    mask = batch.attention_mask if batch.picture_mask is None else batch.picture_mask
    owner = torch.arange(count, device=visual_tokens.device) // (count // pictures) + 1  # the picture of a visual token
    positions = torch.arange(batch.input_ids.shape[1], device=visual_tokens.device).expand(rows, -1)
    logits, _ = language(
        language.embed(batch.input_ids),
        batch.attention_mask,
        positions,
        positions[:, :-1],
        cross=language.cross_key_values(visual_tokens),
        cross_attention_mask=(mask[:, :, None] == owner).long(),
    )
    return _token_loss(logits, batch.labels[:, 1:])


def is_trained(name: str, bridge: str, *, language: bool = False, vision: bool = False) -> bool:
    """Returns whether stage 2 trains a parameter of the captioner; parameters that LoRA added are always trained.

    Args:
        name: Name of the captioner's parameter.
        bridge: Value of the recipe's key `bridge`.
        language: Whether the language model is trained too.
        vision: Whether the picture encoder is trained too.
    """
    trained = name.startswith((*TRAINED[bridge], "draft.")) or MARK in name
    return trained or (language and name.startswith("language.")) or (vision and name.startswith("vision."))


class GenerativeStage(nn.Module):
    """The module of stage 2 and of instruction tuning: the trained bridge and the frozen language model.

    Args:
        model: The captioner. Its modules are shared, not copied; the picture encoder is used only if it is trained.
        bridge: Value of the recipe's key `bridge`.
        itg_weight: Weight of the loss of the Q-Former's own text head; if 0, the head is not trained.
        unfreeze_language: Whether the language model is trained too.
        unfreeze_vision: Whether the picture encoder is trained too; the batches then hold pixel values.
        elastic: Function from the number of a step to the number of queries that the step uses; None: all queries.

    Raises:
        ConfigError: `itg_weight` is above 0, and the model has no text head.
    """

    def __init__(
        self,
        model: CaptionerModel,
        bridge: str = "qformer",
        itg_weight: float = 0.0,
        *,
        unfreeze_language: bool = False,
        unfreeze_vision: bool = False,
        elastic: ElasticDraw | None = None,
    ) -> None:
        super().__init__()
        if itg_weight and model.draft is None:
            raise ConfigError(
                "itg_weight is above 0, but the model has no text head",
                "run stage1 first (stage1.steps, or model.bridge_from), with bridge = 'qformer'",
            )
        freeze(model)
        self.bridge, self.language = model.bridge, model.language
        self.draft = model.draft if itg_weight else None
        self.vision = model.vision if unfreeze_vision else None
        self.itg_weight = itg_weight
        self._elastic, self._queries = elastic, 0
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained(name, bridge, language=unfreeze_language, vision=unfreeze_vision))
        qformer = getattr(model.bridge, "qformer", None)
        if isinstance(qformer, InstructedQFormer):  # it gets no gradient, which several processes would wait for
            qformer.layers[-1].text_feed_forward.requires_grad_(False)
        self._bridge = bridge
        self._unfrozen = unfreeze_language
        self.train()

    def train(self, mode: bool = True) -> GenerativeStage:
        """Sets the training mode of the trained modules. Frozen modules stay in eval mode, without dropout."""
        super().train(mode)
        if not self._unfrozen:
            self.language.eval()
        if self._bridge == "projection":
            self.bridge.eval()
        return self

    def begin_step(self, step: int) -> None:
        """Draws the number of queries of a step, if it varies (elastic training); call it before the forward pass."""
        if self._elastic is not None:
            self._queries = self._elastic(step)

    def forward(self, batch: PictureBatch) -> dict[str, Tensor]:
        """Computes the losses of a batch: `lm`, `itg` if the text head is trained, and `loss`, their weighted sum."""
        bridge: Any = self.bridge
        if batch.captions is None:
            raise ValueError("a batch of stage 2 needs captions")
        image_embeds = batch.image_embeds if self.vision is None else self.vision(batch.image_embeds)
        queries: dict[str, Tensor] = {}
        if self._queries:
            queries["query_ids"] = torch.arange(self._queries, device=image_embeds.device)[None]
        if self.draft is None or batch.texts is None:
            visual_tokens = bridge(image_embeds, *(batch.instruction or ()), **queries)
            visual_tokens = visual_tokens.unflatten(0, (-1, batch.pictures)).flatten(1, 2)
            loss = caption_loss(self.language, visual_tokens, batch.captions, batch.pictures)
            return {"lm": loss, "loss": loss}
        states, key_values = bridge.qformer.read(image_embeds, **queries)
        loss = caption_loss(self.language, bridge.projection(states), batch.captions)
        side = self.draft.text_side(bridge.qformer)
        own = text_loss(side, key_values, batch.texts, self.draft.config.dec_token_id)
        return {"lm": loss, "itg": own, "loss": loss + self.itg_weight * own}

    def gauges(self) -> dict[str, float]:
        """Returns values for the log: the last step's number of queries, if it varies, and mean |tanh| of each gate."""
        found = {"queries": float(self._queries)} if self._queries else {}
        for name, parameter in self.language.named_parameters():
            if name.endswith("_gate"):
                _, number, kind = name.split(".")
                found[f"gate.{number}.{kind}"] = float(torch.tanh(whole_tensor(parameter.detach())).abs().mean())
        return found


@dataclass(frozen=True)
class ElasticDraw:
    """Draws the number of queries of each step, log-uniformly from ``least`` to ``most``.

    Small numbers are drawn more often: the first queries have to hold most of the picture, so they get most of the
    steps. The drawn number depends only on seed and step. So all processes, and a resumed run, draw equal numbers.
    """

    seed: int
    least: int
    most: int

    def __call__(self, step: int) -> int:
        """Returns the number of queries that a step uses."""
        share = np.random.default_rng([self.seed, step]).random()
        return min(self.most, int(self.least * ((self.most + 1) / self.least) ** share))


def elastic_draw(config: CaptionerConfig, phase: Stage2Phase, seed: int) -> ElasticDraw | None:
    """Makes the function that draws the number of queries of each step; None if the phase always uses all queries.

    Raises:
        ConfigError: The bridge has no learned queries, or its number of queries is not above `elastic_min`.
    """
    if not phase.elastic:
        return None
    kind, most = config.bridge.kind, config.bridge.num_visual_tokens
    if kind not in LEARNED_QUERIES:
        raise ConfigError(
            f"[{phase.section}] elastic is true, but the bridge of kind {kind!r} has no learned queries",
            "leave elastic out, or set bridge to qformer, projection, perceiver, pool or flamingo",
        )
    if phase.elastic_min >= most:
        raise ConfigError(
            f"[{phase.section}] elastic_min must be below {most}, the number of queries, not {phase.elastic_min}",
            "give a smaller elastic_min, or leave elastic out to train with all queries",
        )
    return ElasticDraw(seed, phase.elastic_min, most)


def match_scale(model: CaptionerModel) -> None:
    """Scales a new projection so that visual tokens are as large as token embeddings.

    The Q-Former ends in a LayerNorm, so the outputs of a new projection have values of about 1. The values of token
    embeddings are a few hundredths. Without this scaling, the position embeddings are too small beside the visual
    tokens, and a frozen language model cannot tell the positions of the visual tokens apart. On the scenes, after 600
    steps, the loss is 0.05 with this scaling and 0.4 without.

    Args:
        model: A captioner whose projection was drawn with N(0, 1/fan_in); changed in place.
    """
    name, language = PROJECTIONS.get(model.config.bridge.kind), model.config.language
    has_cross_attention = language.cross is not None and not language.is_encoder_decoder
    if name is None or has_cross_attention:
        return
    table = model.language.get_parameter("embed_tokens.weight").detach()
    projection = model.bridge.get_submodule(name)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.mul_(table.float().pow(2).mean().sqrt())
