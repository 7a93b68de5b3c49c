"""Merged patches (``model/vision/token_merging.py``) at export: held to torch, compared with the model without.

Two runtimes may find different pairs the nearest where cosines differ in the last digit, and from there on every row is
another. So a graph is run with its choices as further outputs, and torch follows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.bundle.schema import VISION, GraphSpec, MergingRecord
from blip2edge.errors import ExportError, ParityError
from blip2edge.model.models import Config, Model
from blip2edge.model.retrieval import RetrievalModel
from blip2edge.model.vision.token_merging import Pairs, TokenMatching
from blip2edge.model.vision.vit import VisionTransformer

PAIRS = "merged_pairs"
"""What the parity of the choices is called."""

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 2e-2}
"""By how much nearer another pair may be, as a difference of cosines, by the graph's precision.

Cosines are computed in FP32 whatever the graph is in: what differs are the keys alone, by the rounding of the layers
before. On the tests' models they choose the same pairs in every precision; in a drawn ViT of 12 layers, 192 channels
and 196 patches the gap was 0 in fp16 and 0.002 with weights in bf16. Deeper models have five to ten times that to go.
"""

FIX = "nothing was written; report it with the checkpoint's config.json"

PICTURES = 8
SEED = 2210  # arXiv 2210.09461
INSTRUCTION = 4  # tokens, where one enters the bridge


@contextmanager
def with_choices(graph: Path, spec: GraphSpec) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A graph that gives its choices too, layer by layer: order and partners.

    Args:
        graph: The ``.onnx`` file; one beside it refers to the same weights for the while.
        spec: Its tensors.

    Yields:
        The file to run, and the outputs that were added; none where nothing is merged.
    """
    if spec.name != VISION:
        yield graph, ()
        return
    model = ir.load(graph)
    partners = [node.outputs[0] for node in model.graph if node.op_type == "ArgMax"]
    orders = [node.outputs[1] for node in model.graph if node.op_type == "TopK" and _ranks_scores(node)]
    if len(partners) != len(orders):
        raise ExportError(f"the graph {spec.name} ranks {len(orders)} layers and pairs {len(partners)}")
    chosen = [value for pair in zip(orders, partners, strict=True) for value in pair]
    if not chosen:
        yield graph, ()
        return
    for value in chosen:
        value.type = ir.TensorType(ir.DataType.INT64)
        model.graph.outputs.append(value)
    path = graph.with_name(f".choices.{graph.name.lstrip('.')}")
    try:
        ir.save(model, path)
        yield path, tuple(str(value.name) for value in chosen)
    finally:
        path.unlink(missing_ok=True)


def _ranks_scores(node: ir.Node) -> bool:
    """Whether a TopK ranks cosines, and does not sort places."""
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    return producer is not None and producer.op_type == "ReduceMax"


class GuidedMatching(TokenMatching):
    """Merges the pairs that a graph chose.

    Attributes:
        shortfall: How much nearer than a chosen pair another is at most, as a difference of cosines; infinite where a
            cosine is not finite.
    """

    def __init__(self, choices: Sequence[NDArray[Any]]) -> None:
        super().__init__()
        self._choices = iter([torch.from_numpy(np.asarray(choice)) for choice in choices])
        self._count = 0
        self.shortfall = 0.0

    def forward(self, keys: Tensor, sizes: Tensor, count: int) -> Pairs:
        """As :meth:`TokenMatching.forward`."""
        self._count = count
        return super().forward(keys, sizes, count)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The next layer's choices.

        Raises:
            ParityError: They are no choices: a patch is named twice, or not at all, or there is no such partner.
        """
        order, partner = next(self._choices), next(self._choices)
        rows, first, second = scores.shape
        every = torch.arange(first).expand(rows, first)
        if not torch.equal(order.sort(dim=1).values, every):
            raise ParityError(
                f"{PAIRS}: the graph's order of {first} patches does not name each of them once", FIX
            )
        if partner.shape != order.shape or bool(((partner < 0) | (partner >= second)).any()):
            raise ParityError(f"{PAIRS}: the graph merges into a patch that is none of {second}", FIX)
        best = scores.amax(dim=-1)  # [B, A]
        taken = torch.gather(scores, 2, partner[:, :, None])[:, :, 0]
        ranked = torch.gather(best, 1, order)
        merged, staying = order[:, : self._count], ranked[:, self._count :]
        gaps = [torch.gather(best - taken, 1, merged).max()]
        if staying.shape[1]:
            gaps.append((staying.amax(dim=1) - ranked[:, : self._count].amin(dim=1)).max())
        found = torch.stack(gaps)
        worst = float(found.max()) if bool(found.isfinite().all()) else math.inf  # max() would lose a NaN
        self.shortfall = max(self.shortfall, worst)
        return order, partner


@contextmanager
def guided(module: nn.Module, choices: Sequence[NDArray[Any]]) -> Iterator[GuidedMatching | None]:
    """Lets the vision encoder of a graph's module follow a graph's choices; None where there are none."""
    if not choices:
        yield None
        return
    vision: Any = module.vision
    own = vision.matching
    vision.matching = GuidedMatching(choices)
    try:
        yield vision.matching
    finally:
        vision.matching = own


@torch.no_grad()
def merging_of(config: Config, model: Model | None) -> MergingRecord | None:
    """What merging does to a model.

    Args:
        config: Its config.
        model: It, with its weights; None where they are too large to be held.

    Returns:
        None where it merges nothing. Without a model nothing but the counts.
    """
    vision = config.vision
    if not vision.merge_tokens:
        return None
    plain = replace(vision, merge_tokens=0)
    record = MergingRecord(vision.merge_tokens, vision.num_embeds, plain.num_embeds)
    if model is None:
        return record
    with torch.device("meta"):
        other = VisionTransformer(plain).eval()
    other.load_state_dict(model.vision.state_dict(), assign=True)
    pictures = smooth_pictures(vision.image_size)
    output, merged = _read(model, model.vision(pictures))
    _, wanted = _read(model, other(pictures))
    cosines = F.cosine_similarity(merged, wanted, dim=-1).mean(dim=1)  # [B]
    return replace(
        record,
        output=output,
        cosine=float(cosines.mean()),
        lowest=float(cosines.min()),
        pictures=len(pictures),
    )


def smooth_pictures(size: int) -> Tensor:
    """Blots of colour with some noise, as bright as preprocessed pictures are: ``[8, 3, size, size]``."""
    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.randn(PICTURES, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def _read(model: Model, image_embeds: Tensor) -> tuple[str, Tensor]:
    """What is made of a picture that does not hang on how many patches there are, and its name."""
    if isinstance(model, RetrievalModel):
        return "image_features", model.matcher.image_features(image_embeds)
    if model.config.bridge.kind == "none":
        return "the class token", image_embeds[:, :1]
    longest = min(model.config.instruction_positions, INSTRUCTION)
    ids = torch.ones(len(image_embeds), longest, dtype=torch.int64)
    return "visual_tokens", model.bridge(image_embeds, *((ids, ids) if longest else ()))
