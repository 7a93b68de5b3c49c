"""Two short pretraining phases of the miniature, the small BLIP-2 that a run trains if the recipe names no checkpoint.

They replace the training of EVA-CLIP and OPT, which a real BLIP-2 takes from checkpoints. The picture encoder learns
which object covers a patch and where the object's centre is (dense labels). The language model learns to write a
caption after vectors that take the place of the visual tokens. Both phases use the training scenes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.model.language.opt import OPTDecoder
from blip2edge.model.vision.vit import VisionTransformer
from blip2edge.training.data.scenes import (
    COLOURS,
    PICTURE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    coverage,
)
from blip2edge.training.loading.batches import IGNORED, KeywordBatch
from blip2edge.training.phase_config import LanguagePhase, VisionPhase
from blip2edge.training.phases.stage2 import caption_loss

_COLOURS, _RELATIONS = list(COLOURS), list(RELATIONS)
_OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}
ROLES = 3  # no object, the object named first, the object named second
CLASSES = (ROLES, len(COLOURS), len(SHAPES), len(SIZES), len(RELATIONS))
SHAPE = 2  # index of the shape in CLASSES
BOX = 3  # numbers of a box: offset of the object's centre from the patch's centre (x, y), and radius


class DenseLabels(NamedTuple):
    """Labels for each patch of B pictures: the object at the patch, and its position.

    Attributes:
        classes: int64 [B, N, 5]: role, colour, shape, size and relation to the other object, as in `CLASSES`. If the
            patch has no object, the role is 0 and the others are `IGNORED`.
        box: float32 [B, N, 3]: offset (x, y) of the object's centre from the patch's centre, and the object's radius;
            in units of the picture's side.
    """

    classes: Tensor
    box: Tensor


def _object_labels(thing: SceneObject, role: int, relation: str) -> list[int]:
    """Returns the five class indices (see `CLASSES`) for a patch that this object covers."""
    indices = (_COLOURS.index(thing.colour), SHAPES.index(thing.shape), SIZES.index(thing.size))
    return [role, *indices, _RELATIONS.index(relation)]


def dense_labels(batch: Sequence[Scene], patch: int) -> DenseLabels:
    """Makes the labels of all patches of some scenes.

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
        for role, (thing, relation) in enumerate(((scene.first, scene.relation), (scene.second, opposite)), 1):
            covered = coverage(thing, patch)
            classes[row, covered] = _object_labels(thing, role, relation)
            box[row, covered, :2] = (np.array([thing.x, thing.y]) - middle[covered]) / PICTURE_SIZE
            box[row, covered, 2] = thing.radius / PICTURE_SIZE
    return DenseLabels(torch.from_numpy(classes), torch.from_numpy(box))


def dense_loss(outputs: Tensor, labels: DenseLabels, shape_weight: float = 1.0) -> Tensor:
    """Computes the cross-entropy of the five classes plus 4 × the L1 distance of the box.

    Args:
        outputs: float32 [B, N, sum(CLASSES) + BOX], the output of a linear head for every patch.
        labels: The labels.
        shape_weight: Weight of the loss for the object's shape, which a single patch does not show.

    Returns:
        A scalar. For a patch without an object, only the loss of the role is counted (no object, or which object).
    """
    parts = torch.split(outputs, [*CLASSES, BOX], dim=-1)
    loss = outputs.new_zeros(())
    for index, logits in enumerate(parts[:-1]):
        part = F.cross_entropy(logits.flatten(0, 1), labels.classes[:, :, index].flatten(), ignore_index=IGNORED)
        loss = loss + (shape_weight * part if index == SHAPE else part)
    covered = labels.classes[:, :, 0] > 0
    return loss + 4.0 * F.l1_loss(parts[-1][covered], labels.box[covered])


class DenseBatch(NamedTuple):
    """Scenes with the labels of their patches.

    Attributes:
        sample_ids: Names of the B samples.
        pixel_values: Preprocessed pictures, float32 [B, 3, 64, 64].
        labels: Labels of all patches.
    """

    sample_ids: tuple[str, ...]
    pixel_values: Tensor
    labels: DenseLabels

    @property
    def weight(self) -> int:
        """Returns the number of scenes in the batch."""
        return len(self.sample_ids)


class VisionPretraining(nn.Module):
    """The module for the picture encoder's pretraining: the encoder with a linear head on its patches.

    The head is not kept after the phase.

    Args:
        vision: The picture encoder, trained in place.
        phase: Section [vision] of the recipe, with the weight of the loss for the shape (``shape_weight``).
    """

    def __init__(self, vision: VisionTransformer, phase: VisionPhase) -> None:
        super().__init__()
        self.vision = vision
        self.head = nn.Linear(vision.config.hidden_size, sum(CLASSES) + BOX)
        self._shape_weight = phase.shape_weight
        self.vision.requires_grad_(True)
        self.train()

    def forward(self, batch: DenseBatch) -> dict[str, Tensor]:
        """Computes the dense loss of a batch; returns it by name."""
        outputs = self.head(self.vision(batch.pixel_values)[:, 1:])
        return {"dense": dense_loss(outputs, batch.labels, self._shape_weight)}


class LanguagePretraining(nn.Module):
    """The module for the language model's pretraining: captions follow embeddings of their seven keywords.

    If a language model is trained on captions alone and then frozen, its text does not depend on the visual tokens.
    Its text does depend on them if most captions in the training follow their keywords.

    Args:
        language: The language model, trained in place.
        phase: Section [language] of the recipe: share of captions with keywords, and noise on the keywords.
    """

    def __init__(self, language: OPTDecoder, phase: LanguagePhase) -> None:
        super().__init__()
        self.language = language
        self._phase = phase
        self.language.requires_grad_(True)
        self.train()

    def _prefix(self, keyword_ids: Tensor) -> Tensor:
        """Returns the vectors before each caption, [B, Q, D]: embeddings of the keywords plus noise, or only noise."""
        words = self.language.embed(keyword_ids)  # [B, Q, D]
        scale = words.detach().pow(2).mean().sqrt()
        noise = torch.randn_like(words) * scale
        hinted = torch.rand(words.shape[0], 1, 1, device=words.device) < self._phase.prefix_share
        return torch.where(hinted, words + self._phase.prefix_noise * noise, noise)

    def forward(self, batch: KeywordBatch) -> dict[str, Tensor]:
        """Computes the mean cross-entropy over the tokens of the captions, end token included."""
        return {"lm": caption_loss(self.language, self._prefix(batch.keyword_ids), batch.captions)}
