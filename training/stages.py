"""The losses of the two stages. This version has stage 2: the language model's.

Stage 2 (Li et al., arXiv 2301.12597, section 3.3): the picture encoder and the language model are frozen,
the projected query outputs stand before the text, and the bridge learns through the frozen language model.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.model.captioner import CaptionerModel
from blip2edge.training.batches import IGNORED, CaptionBatch
from blip2edge.training.optim import freeze


def prefixed_loss(language: nn.Module, prefix: Tensor, batch: CaptionBatch) -> Tensor:
    """Cross-entropy of captions behind a prefix of embeddings.

    Equal to `Blip2ForConditionalGeneration(labels=…)` of transformers: labels are shifted by one, and the
    mean is over the labels that count.

    Args:
        language: A decoder-only language model.
        prefix: float [B, Q, D]: visual tokens, or what pretraining puts in their place.
        batch: The texts.

    Returns:
        A scalar.
    """
    rows, slots = prefix.shape[:2]
    embeds = torch.cat([prefix, language.embed(batch.input_ids)], dim=1)  # type: ignore[operator]  # [B, Q+S, D]
    mask = torch.cat([batch.attention_mask.new_ones(rows, slots), batch.attention_mask], dim=1)
    positions = torch.arange(embeds.shape[1]).expand(
        rows, -1
    )  # padding is on the right: no gaps before a token
    asked = torch.arange(slots, embeds.shape[1] - 1).expand(rows, -1)  # the last slot predicts nothing
    logits, _ = language(embeds, mask, positions, asked)  # [B, S-1, V]
    return F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)


def match_scale(model: CaptionerModel) -> None:
    """Scales a fresh projection so that visual tokens start as large as words.

    The Q-Former ends in a LayerNorm, so a freshly drawn projection gives values of size 1 where words have a
    few hundredths: they drown the position embeddings, and a frozen language model cannot tell its visual
    tokens apart. On the scenes at 600 steps this is a loss of 0.05 instead of 0.4.

    Args:
        model: Its projection was drawn with N(0, 1/fan_in); changed in place.
    """
    table = model.language.get_parameter("embed_tokens.weight").detach()
    with torch.no_grad():
        model.bridge.get_parameter("projection.weight").mul_(table.pow(2).mean().sqrt())


def prepare_stage2(model: CaptionerModel) -> None:
    """Freezes the picture encoder and the language model, and leaves the bridge to be trained.

    Args:
        model: Changed in place.
    """
    freeze(model.vision)
    freeze(model.language)
    model.bridge.requires_grad_(True)
    model.bridge.train()


def stage2_loss(model: CaptionerModel, pixel_values: Tensor, batch: CaptionBatch) -> Tensor:
    """The stage-2 loss of some captioned pictures.

    Args:
        model: Prepared by `prepare_stage2`.
        pixel_values: float32 [B, 3, H, W].
        batch: The captions.

    Returns:
        A scalar whose gradient reaches the bridge only.
    """
    with torch.no_grad():
        image_embeds = model.vision(pixel_values)  # [B, P, Dv]
    return prefixed_loss(model.language, model.bridge(image_embeds), batch)


def tensor_hashes(module: nn.Module) -> dict[str, str]:
    """A SHA-256 of every tensor of a part: what "frozen" can be checked with.

    Args:
        module: Any.

    Returns:
        From names to hexadecimal digests of the raw bytes.
    """
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in module.state_dict().items()
    }
