"""What the miniature has instead of EVA-CLIP and OPT's web text: two short pretraining phases.

The real parts of a BLIP-2 come trained. These two phases make small ones that are good for the same
reasons: a picture encoder whose patches know what lies on them and where (dense, object-level labels),
and a language model that already lets a prefix steer it. Both see the training scenes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.model.opt import OPTDecoder
from blip2edge.model.vit import VisionTransformer
from blip2edge.training.batches import IGNORED, CaptionBatch
from blip2edge.training.config import LanguagePhase
from blip2edge.training.scenes import (
    COLOURS,
    PICTURE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    coverage,
)
from blip2edge.training.stages import prefixed_loss

_COLOURS, _RELATIONS = list(COLOURS), list(RELATIONS)
_OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}
ROLES = 3  # nothing, the object named first, the other one
CLASSES = (ROLES, len(COLOURS), len(SHAPES), len(SIZES), len(RELATIONS))
SHAPE = 2  # index of the shape in CLASSES
BOX = 3  # centre of the object from that of the patch (x, y), and its radius


@dataclass(frozen=True)
class DenseLabels:
    """What every patch has to tell.

    Args:
        classes: int64 [B, N, 5]: role, colour, shape, size and relation to the other object, as in
            `CLASSES`; `IGNORED` where no object lies (the role is 0 there).
        box: float32 [B, N, 3] in units of the picture's side.
    """

    classes: Tensor
    box: Tensor


def _object_labels(thing: SceneObject, role: int, relation: str) -> list[int]:
    """The five classes of a patch that this object covers."""
    indices = (_COLOURS.index(thing.colour), SHAPES.index(thing.shape), SIZES.index(thing.size))
    return [role, *indices, _RELATIONS.index(relation)]


def dense_labels(batch: Sequence[Scene], patch: int) -> DenseLabels:
    """Labels of all patches of some scenes.

    Args:
        batch: B scenes.
        patch: Side of a patch in pixels.

    Returns:
        Labels for N = (64 / patch)² patches, without the class token.
    """
    side = PICTURE_SIZE // patch
    classes = np.full((len(batch), side * side, len(CLASSES)), IGNORED, dtype=np.int64)
    classes[:, :, 0] = 0
    box = np.zeros((len(batch), side * side, BOX), dtype=np.float32)
    middle = (np.stack(np.meshgrid(*[np.arange(side)] * 2), axis=-1).reshape(-1, 2) + 0.5) * patch
    for row, scene in enumerate(batch):
        opposite = _OPPOSITE[scene.relation]
        for role, (thing, relation) in enumerate(
            ((scene.first, scene.relation), (scene.second, opposite)), 1
        ):
            covered = coverage(thing, patch)
            classes[row, covered] = _object_labels(thing, role, relation)
            box[row, covered, :2] = (np.array([thing.x, thing.y]) - middle[covered]) / PICTURE_SIZE
            box[row, covered, 2] = thing.radius / PICTURE_SIZE
    return DenseLabels(torch.from_numpy(classes), torch.from_numpy(box))


def dense_loss(outputs: Tensor, labels: DenseLabels, shape_weight: float = 1.0) -> Tensor:
    """Cross-entropy of the five classes plus the distance of the box.

    Args:
        outputs: float32 [B, N, sum(CLASSES) + BOX], a linear head's answer for every patch.
        labels: What it should have been.
        shape_weight: Factor on the shape's part: the one label that no single patch can tell.

    Returns:
        A scalar: patches without an object count for the role only.
    """
    parts = torch.split(outputs, [*CLASSES, BOX], dim=-1)
    loss = torch.zeros((), dtype=outputs.dtype)
    for index, logits in enumerate(parts[:-1]):
        part = F.cross_entropy(
            logits.flatten(0, 1), labels.classes[:, :, index].flatten(), ignore_index=IGNORED
        )
        loss = loss + (shape_weight * part if index == SHAPE else part)
    covered = labels.classes[:, :, 0] > 0
    return loss + 4.0 * F.l1_loss(parts[-1][covered], labels.box[covered])


def make_dense_head(width: int) -> nn.Linear:
    """The head that pretraining puts on the picture encoder, and drops at the end."""
    return nn.Linear(width, sum(CLASSES) + BOX)


def vision_loss(
    vision: VisionTransformer, head: nn.Linear, shape_weight: float = 1.0
) -> Callable[[tuple[Tensor, DenseLabels]], Tensor]:
    """The loss of the picture encoder's pretraining.

    Args:
        vision: Trained; its class token gives no loss.
        head: From `make_dense_head`.
        shape_weight: As for `dense_loss`.

    Returns:
        From (pixel_values [B, 3, H, W], labels) to the dense loss.
    """

    def loss(batch: tuple[Tensor, DenseLabels]) -> Tensor:
        pixel_values, labels = batch
        return dense_loss(head(vision(pixel_values)[:, 1:]), labels, shape_weight)

    return loss


def _prefix(language: OPTDecoder, batch: CaptionBatch, phase: LanguagePhase, draw: torch.Generator) -> Tensor:
    """Slots before the text: keywords with noise on them, or noise alone.

    Args:
        language: Its token table is what the keywords are looked up in.
        batch: Has the keywords' ids.
        phase: Shares and noise.
        draw: Source of chance.

    Returns:
        [B, Q, D].
    """
    words = language.embed(batch.keyword_ids)  # [B, Q, D]
    scale = words.detach().pow(2).mean().sqrt()
    noise = torch.randn(words.shape, generator=draw) * scale
    hinted = torch.rand(words.shape[0], 1, 1, generator=draw) < phase.prefix_share
    return torch.where(hinted, words + phase.prefix_noise * noise, noise)


def language_loss(
    language: OPTDecoder, phase: LanguagePhase, draw: torch.Generator
) -> Callable[[CaptionBatch], Tensor]:
    """The loss of the language model's pretraining.

    A frozen language model that saw bare captions only cannot be steered by visual tokens afterwards; one
    that read most captions behind their seven keywords can.

    Args:
        language: Trained.
        phase: Shares and noise of the prefix.
        draw: Source of chance for both.

    Returns:
        From a batch to the mean cross-entropy of the caption's tokens, the end token included.
    """

    def loss(batch: CaptionBatch) -> Tensor:
        prefix = _prefix(language, batch, phase, draw)
        return prefixed_loss(language, prefix, batch)

    return loss
