"""Stage 2 and instruction tuning: the bridge learns through a frozen language model.

Li et al., arXiv 2301.12597, section 3.3: picture encoder and language model are frozen, the projected query outputs
stand before the text, and only the text behind the prompt gives loss. In instruction tuning the prompt enters the
Q-Former as well (Dai et al., arXiv 2305.06500, section 2.3). MiniGPT-4 (arXiv 2304.10592) trains the projection
alone; Flamingo (arXiv 2204.14198) adds gated layers to the language model, which then are all of it that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.errors import ConfigError
from blip2edge.model.captioner import CaptionerModel
from blip2edge.training.loading.batches import IGNORED, CaptionBatch
from blip2edge.training.loading.loader import PictureBatch
from blip2edge.training.loop.optim import freeze
from blip2edge.training.phases.distributed import mean_over_ranks
from blip2edge.training.phases.stage1 import text_loss

TRAINED: Mapping[str, tuple[str, ...]] = {
    "qformer": ("bridge.",),
    "projection": ("bridge.projection.",),
    "mlp": ("bridge.",),
    "perceiver": ("bridge.",),
    "pool": ("bridge.",),
    "flamingo": ("bridge.", "language.cross_layers."),
}
"""What each choice of the key `bridge` trains: beginnings of the model's parameter names."""

PROJECTIONS: Mapping[str, str] = {
    "qformer": "projection",
    "instructed-qformer": "projection",
    "mlp": "fc2",
    "pool": "projection",
    "perceiver": "projection",
}
"""The last layer of each kind of bridge: what speaks to the language model."""


def caption_loss(language: nn.Module, visual_tokens: Tensor, batch: CaptionBatch) -> Tensor:
    """Cross-entropy of captions whose picture is known.

    Equal to `labels=…` of transformers' classes: labels are shifted by one, and the mean is over the labels that
    count; over several processes, over those of all of them.

    Args:
        language: Any language model of `model/language/registry.py`.
        visual_tokens: float [B, Q, D].
        batch: The texts.

    Returns:
        A scalar.
    """
    config: Any = language.config
    if config.is_encoder_decoder:
        return _encoder_decoder_loss(language, visual_tokens, batch)
    if config.cross is not None:
        return _cross_loss(language, visual_tokens, batch)
    return _prefix_loss(language, visual_tokens, batch)


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K, V] and labels int64 [B, K] that stand side by side."""
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / mean_over_ranks((labels != IGNORED).sum()).clamp(min=1)


def _prefix_loss(language: Any, visual_tokens: Tensor, batch: CaptionBatch) -> Tensor:
    """A decoder that reads the visual tokens as if they were words."""
    rows, slots = visual_tokens.shape[:2]
    before = language.embed(batch.before_ids.expand(rows, -1))  # [B, N, D]
    text = language.embed(batch.input_ids)  # [B, S, D]
    embeds = torch.cat([before, visual_tokens.to(text.dtype), text], dim=1)
    start = before.shape[1] + slots
    mask = torch.cat([batch.attention_mask.new_ones(rows, start), batch.attention_mask], dim=1)
    # Padding is on the right: no gap before a token.
    positions = torch.arange(embeds.shape[1], device=embeds.device).expand(rows, -1)
    asked = positions[:, start:-1]  # the last slot predicts nothing
    logits, _ = language(embeds, mask, positions, asked)  # [B, S - 1, V]
    return _token_loss(logits, batch.labels[:, 1:])


def _encoder_decoder_loss(language: Any, visual_tokens: Tensor, batch: CaptionBatch) -> Tensor:
    """The encoder reads visual tokens and prompt, the decoder writes the caption."""
    rows, slots = visual_tokens.shape[:2]
    text = language.embed(batch.input_ids)  # [B, S, D]
    seen = torch.cat([batch.attention_mask.new_ones(rows, slots), batch.attention_mask], dim=1)
    states = language.encode(torch.cat([visual_tokens.to(text.dtype), text], dim=1), seen)
    written = batch.decoder_ids
    if written is None:
        raise ValueError("a batch for an encoder-decoder model has decoder_ids")
    positions = torch.arange(written.shape[1], device=written.device).expand(rows, -1)
    cross = language.cross_key_values(states)
    logits, _ = language(
        language.embed(written),
        torch.ones_like(written),
        positions,
        cross=cross,
        cross_attention_mask=seen,
    )
    return _token_loss(logits, batch.labels)


def _cross_loss(language: Any, visual_tokens: Tensor, batch: CaptionBatch) -> Tensor:
    """A decoder that looks at the visual tokens from between its layers."""
    rows, slots = visual_tokens.shape[:2]
    looks = batch.attention_mask if batch.looks is None else batch.looks
    positions = torch.arange(batch.input_ids.shape[1], device=visual_tokens.device).expand(rows, -1)
    logits, _ = language(
        language.embed(batch.input_ids),
        batch.attention_mask,
        positions,
        positions[:, :-1],
        cross=language.cross_key_values(visual_tokens),
        cross_attention_mask=looks[:, :, None].expand(-1, -1, slots),
    )
    return _token_loss(logits, batch.labels[:, 1:])


def is_trained(name: str, bridge: str, *, language: bool = False) -> bool:
    """Whether a parameter of the model is trained.

    Args:
        name: Of the captioner's parameter.
        bridge: The key of the recipe.
        language: The language model is trained too.
    """
    return name.startswith((*TRAINED[bridge], "draft.")) or (language and name.startswith("language."))


class GenerativeStage(nn.Module):
    """What stage 2 and instruction tuning train, with the frozen language model that the loss comes through.

    Args:
        model: Its parts are shared, not copied; the picture encoder is not used.
        bridge: The key of the recipe.
        itg_weight: Factor on the loss of the Q-Former's own text head; 0 leaves the head alone.
        unfreeze_language: Train the language model too.

    Raises:
        ConfigError: The text head is asked for, and the model has none.
    """

    def __init__(
        self,
        model: CaptionerModel,
        bridge: str = "qformer",
        itg_weight: float = 0.0,
        *,
        unfreeze_language: bool = False,
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
        self.itg_weight = itg_weight
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained(name, bridge, language=unfreeze_language))
        self._bridge = bridge
        self._unfrozen = unfreeze_language
        self.train()

    def train(self, mode: bool = True) -> GenerativeStage:
        """Dropout is for what is trained: a frozen part answers as it will when it is used."""
        super().train(mode)
        if not self._unfrozen:
            self.language.eval()
        if self._bridge == "projection":
            self.bridge.eval()
        return self

    def forward(self, batch: PictureBatch) -> dict[str, Tensor]:
        """The losses of a batch: `lm`, `itg` where the text head is kept, and `loss`, their weighted sum."""
        bridge: Any = self.bridge
        if batch.captions is None:
            raise ValueError("a batch of stage 2 has captions")
        if self.draft is None or batch.texts is None:
            visual_tokens = bridge(batch.image_embeds, *(batch.instruction or ()))
            loss = caption_loss(self.language, visual_tokens, batch.captions)
            return {"lm": loss, "loss": loss}
        queries, key_values = bridge.qformer.read(batch.image_embeds)
        loss = caption_loss(self.language, bridge.projection(queries), batch.captions)
        side = self.draft.text_side(bridge.qformer)
        own = text_loss(side, key_values, batch.texts, self.draft.config.dec_token_id)
        return {"lm": loss, "itg": own, "loss": loss + self.itg_weight * own}

    def gauges(self) -> dict[str, float]:
        """The gates of a Flamingo, as the tanh that multiplies what a layer adds; nothing for other models."""
        found = {}
        for name, parameter in self.language.named_parameters():
            if name.endswith("_gate"):
                _, number, kind = name.split(".")
                found[f"gate.{number}.{kind}"] = float(torch.tanh(parameter.detach()).abs().mean())
        return found


def match_scale(model: CaptionerModel) -> None:
    """Scales a fresh projection so that visual tokens start as large as words.

    The Q-Former ends in a LayerNorm, so a freshly drawn projection gives values of size 1 where words have a
    few hundredths: they drown the position embeddings, and a frozen language model cannot tell its visual
    tokens apart. On the scenes at 600 steps this is a loss of 0.05 instead of 0.4.

    Args:
        model: Its projection was drawn with N(0, 1/fan_in); changed in place.
    """
    name, language = PROJECTIONS.get(model.config.bridge.kind), model.config.language
    looks_between = language.cross is not None and not language.is_encoder_decoder
    if name is None or looks_between:
        return
    table = model.language.get_parameter("embed_tokens.weight").detach()
    projection = model.bridge.get_submodule(name)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.mul_(table.float().pow(2).mean().sqrt())
