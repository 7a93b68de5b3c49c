"""Verifies graphs that merge patches (``model/vision/token_merging.py``), and measures the effect of merging.

If two cosines differ only in the last digit, ONNX Runtime and torch may merge different pairs, and all later values
differ. So the pairs that the graph merged are made outputs of the graph, and torch merges the same pairs.
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

from blip2edge.bundle.manifest import MergingRecord
from blip2edge.bundle.schema import VISION, GraphSpec
from blip2edge.errors import ExportError, ParityError
from blip2edge.model.models import Config, Model
from blip2edge.model.retrieval import RetrievalModel
from blip2edge.model.vision.registry import build_vision
from blip2edge.model.vision.token_merging import Pairs, TokenMatching

PAIRS = "merged_pairs"
"""Name of the parity result that compares which pairs of patches the graph and torch merge."""

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 2e-2}
"""Tolerance of the merged pairs, by the graph's precision: a difference of cosines.

For each pair that the graph merged, no other pair may have a cosine in torch that is larger by more than this
difference. The cosines are computed in FP32 in every precision; only the keys differ, by the rounding in earlier
layers. The tests' models merge the same pairs in every precision. In a random ViT of 12 layers, 192 channels and 196
patches the difference was 0 in fp16 and 0.002 with bf16 weights. The tolerances of fp16 and bf16 are 5 and 10 times
0.002, to allow for deeper models.
"""

FIX = "nothing was written; report it with the checkpoint's config.json"

PICTURES = 8
SEED = 2210  # arXiv 2210.09461
INSTRUCTION = 4  # tokens of the instruction, for a bridge that reads one


@contextmanager
def with_choices(graph: Path, spec: GraphSpec) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Makes the merged pairs outputs of a graph: for each layer, the sorted patches and the partner of each patch.

    Args:
        graph: The ``.onnx`` file. A temporary file in its directory refers to the same weights.
        spec: Inputs and outputs of the graph.

    Yields:
        The file to run, and the names of the added outputs; no names if the graph merges nothing.
    """
    if spec.name != VISION:
        yield graph, ()
        return
    model = ir.load(graph)
    partners = [node.outputs[0] for node in model.graph if node.op_type == "ArgMax"]
    orders = [node.outputs[1] for node in model.graph if node.op_type == "TopK" and _ranks_scores(node)]
    if len(partners) != len(orders):
        raise ExportError(f"{spec.name} sorts patches in {len(orders)} layers, but merges them in {len(partners)}")
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
    """Returns whether a TopK node sorts patches by their cosine; other TopK nodes sort positions."""
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    return producer is not None and producer.op_type == "ReduceMax"


class GuidedMatching(TokenMatching):
    """Merges the same pairs of patches as a graph, instead of the pairs with the largest cosines in torch.

    Args:
        choices: The graph's outputs that :func:`with_choices` added: for each layer the sorted patches of set A, and
            the partner of each patch. ``model/vision/token_merging.py`` explains the sets.

    Attributes:
        shortfall: Largest amount by which the cosine of a pair that was not merged exceeds the cosine of a merged pair;
            infinite if a cosine is not finite.
    """

    def __init__(self, choices: Sequence[NDArray[Any]]) -> None:
        super().__init__()
        self._choices = iter([torch.from_numpy(np.asarray(choice)) for choice in choices])
        self._count = 0
        self.shortfall = 0.0

    def forward(self, keys: Tensor, sizes: Tensor, count: int) -> Pairs:
        """Returns the pairs that the graph merges in the next layer.

        Args:
            keys: Keys of class token and patches, as in :meth:`TokenMatching.forward`.
            sizes: Number of patches that each slot represents.
            count: Number of patches to merge.
        """
        self._count = count
        return super().forward(keys, sizes, count)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the graph's order and partners of the patches, for the next layer.

        A patch of set A can only be merged into a patch of set C, its partner.

        Args:
            scores: torch's cosines of each patch of set A with each patch of set C, ``[B, A, C]``.

        Returns:
            Indices of set A, sorted, and the partner's index for each patch of set A; int64 ``[B, A]`` each.

        Raises:
            ParityError: The graph's pairs are wrong: a patch is listed twice or not at all, or a partner is missing.
        """
        order, partner = next(self._choices), next(self._choices)
        rows, first, second = scores.shape
        every = torch.arange(first).expand(rows, first)
        if not torch.equal(order.sort(dim=1).values, every):
            raise ParityError(f"{PAIRS}: the graph's order of {first} patches does not list every patch once", FIX)
        if partner.shape != order.shape or bool(((partner < 0) | (partner >= second)).any()):
            taken_by = f"{int(partner.min())} to {int(partner.max())}"
            raise ParityError(
                f"{PAIRS}: expected patches to be merged into the patches 0 to {second - 1}, got {taken_by}", FIX
            )
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
    """Makes the vision encoder of a module merge the same pairs as a graph.

    Yields:
        The object that chooses the pairs; None if the graph merges nothing.
    """
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
    """Measures how much merging changes a model's output: cosines of the outputs with and without merging.

    Args:
        config: The model's config.
        model: The model with its weights; None if they are too large for the memory.

    Returns:
        The record, without cosines if there is no model; None if the vision encoder merges nothing.
    """
    vision: Any = config.vision
    if not vision.merge_tokens:
        return None
    plain = replace(vision, merge_tokens=0)
    record = MergingRecord(vision.merge_tokens, vision.num_embeds, plain.num_embeds)
    if model is None:
        return record
    with torch.device("meta"):
        other = build_vision(plain).eval()
    other.load_state_dict(model.vision.state_dict(), assign=True)
    pictures = smooth_pictures(vision.image_size)
    output, merged = _comparable(model, model.vision(pictures))
    _, wanted = _comparable(model, other(pictures))
    cosines = F.cosine_similarity(merged, wanted, dim=-1).mean(dim=1)  # [B]
    return replace(
        record,
        output=output,
        cosine=float(cosines.mean()),
        lowest=float(cosines.min()),
        pictures=len(pictures),
    )


def smooth_pictures(size: int) -> Tensor:
    """Makes 8 pictures of smooth colours with some noise, as bright as preprocessed ones: ``[8, 3, size, size]``."""
    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.randn(PICTURES, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def _comparable(model: Model, image_embeds: Tensor) -> tuple[str, Tensor]:
    """Computes an output whose shape is the same with and without merging; returns its name and the tensor."""
    if isinstance(model, RetrievalModel):
        return "image_features", model.matcher.image_features(image_embeds)
    if model.config.bridge.kind == "none":
        return "the class token", image_embeds[:, :1]
    longest = min(model.config.instruction_positions, INSTRUCTION)
    ids = torch.ones(len(image_embeds), longest, dtype=torch.int64)
    return "visual_tokens", model.bridge(image_embeds, *((ids, ids) if longest else ()))
