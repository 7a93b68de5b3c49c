"""What is tried on a graph: lists of passes, the fastest of which is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from blip2edge.bundle.schema import DECODER, CacheSpec
from blip2edge.optimization.graph import clean, prepare
from blip2edge.optimization.passes.activations import fuse_activations
from blip2edge.optimization.passes.attention import fuse_attention
from blip2edge.optimization.passes.blocks import use_block_kernels
from blip2edge.optimization.passes.integers import quantised_products, use_dynamic_ranges, use_recorded_ranges
from blip2edge.optimization.passes.norms import fuse_norms
from blip2edge.optimization.passes.pointwise import use_pointwise_convolutions
from blip2edge.optimization.passes.shared_cache import share_cache


@dataclass(frozen=True)
class Context:
    """What a pass may have to know: the decoder's cache and the longest context."""

    cache: CacheSpec | None
    max_positions: int


Pass = Callable[[ir.Model, Context], object]

PASSES: dict[str, Pass] = {
    "block kernels": lambda model, _: use_block_kernels(model),
    "block kernels for columns": lambda model, _: use_block_kernels(model, columns_too=True),
    "dynamic ranges": lambda model, _: use_dynamic_ranges(model),
    "recorded ranges": lambda model, _: use_recorded_ranges(model),
    "fused attention": lambda model, _: fuse_attention(model),
    "shared cache": lambda model, context: (
        context.cache is not None and share_cache(model, context.cache, context.max_positions)
    ),
    "fused activations": lambda model, _: fuse_activations(model),
    "fused norms": lambda model, _: fuse_norms(model),
    "pointwise convolutions": lambda model, _: use_pointwise_convolutions(model),
    "narrowing convolutions": lambda model, _: use_pointwise_convolutions(model, narrowing=True),
}
"""Each returns something false where it found nothing to do."""


@dataclass(frozen=True)
class Recipe:
    """Passes in order.

    Attributes:
        passes: Keys of :data:`PASSES`.
        needs: Passes among them without which it is not worth trying.
    """

    passes: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def layout(self) -> bool:
        """Whether weights are laid out for the processor when the graph is loaded."""
        return any(name.endswith("convolutions") for name in self.passes)

    @property
    def one_by_one(self) -> bool:
        """Whether rows of a batch would share a range, so that they have to be run one at a time."""
        return "dynamic ranges" in self.passes


_WHOLE = ("block kernels", "fused attention", "fused activations")
FLOAT = (
    Recipe((*_WHOLE, "narrowing convolutions")),
    Recipe((*_WHOLE, "pointwise convolutions")),
    Recipe(_WHOLE),
    Recipe(("block kernels", "fused activations")),
)
"""Norms stay as they are: fused with the residual they are slower on long sequences (0.8 ms for ``[197, 768]`` where
an addition and a LayerNormalization take 0.3, ONNX Runtime 1.31), and faster for a single token."""

INTEGER = (
    Recipe(("dynamic ranges", "block kernels", "fused attention", "fused activations"), ("dynamic ranges",)),
    Recipe(
        ("recorded ranges", "block kernels", "fused attention", "fused activations"), ("recorded ranges",)
    ),
)

_SHARED = ("shared cache", "fused norms", "fused activations")
DECODERS = (
    Recipe(
        ("block kernels", "shared cache", "fused activations", "pointwise convolutions"), ("shared cache",)
    ),
    Recipe(("block kernels", *_SHARED), ("shared cache",)),
    Recipe(("block kernels", "shared cache", "fused activations"), ("shared cache",)),
    Recipe(("block kernels", "fused activations", "pointwise convolutions")),
    Recipe(("block kernels", "fused activations")),
)
INTEGER_DECODERS = (
    Recipe(("block kernels for columns", *_SHARED), ("shared cache",)),
    Recipe(("recorded ranges", "block kernels", *_SHARED), ("shared cache",)),
    Recipe(("block kernels for columns", "fused activations")),
)
"""A decoder's ranges are recorded ones or a row's own: what a caption says may not hang on the rest of its batch."""


def recipes_for(graph: str, model: ir.Model) -> Sequence[Recipe]:
    """What to try on a graph, likeliest first."""
    integers = bool(quantised_products(model))
    if graph == DECODER:
        return INTEGER_DECODERS if integers else DECODERS
    return (*INTEGER, *FLOAT) if integers else FLOAT


def cook(model: ir.Model, recipe: Recipe, context: Context) -> tuple[str, ...] | None:
    """Applies a recipe.

    Args:
        model: A portable graph; changed in place.
        recipe: The passes.
        context: What they may have to know.

    Returns:
        The passes that found something; None where one that is needed did not.
    """
    prepare(model)
    done: list[str] = []
    for name in recipe.passes:
        if PASSES[name](model, context):
            done.append(name)
        elif name in recipe.needs:
            return None
    model.graph.sort()
    clean(model)
    return tuple(done)
