"""Lists the recipes, which are sequences of passes.

``pipeline.py`` tries each recipe on a graph and keeps the fastest result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from blip2edge.bundle.schema import DECODER, CacheSpec
from blip2edge.optimization.graph import clean, prepare
from blip2edge.optimization.passes.activations import fuse_activations, fuse_tanh_gelus
from blip2edge.optimization.passes.attention import fuse_attention
from blip2edge.optimization.passes.blocks import use_block_kernels
from blip2edge.optimization.passes.half import dequantize, halve, keep_residuals, widen
from blip2edge.optimization.passes.heads import fuse_heads
from blip2edge.optimization.passes.integers import quantised_products, use_dynamic_ranges, use_recorded_ranges
from blip2edge.optimization.passes.norms import fuse_norms, fuse_rms_norms
from blip2edge.optimization.passes.pointwise import use_pointwise_convolutions
from blip2edge.optimization.passes.shared_cache import share_cache


@dataclass(frozen=True)
class PassContext:
    """Facts about the model that the passes need.

    Attributes:
        cache: The decoder's KV cache; None if there is no decoder.
        max_positions: The longest context in tokens.
        encoder_decoder: Whether the language model has a text encoder; T5's residuals overflow FP16.
    """

    cache: CacheSpec | None
    max_positions: int
    encoder_decoder: bool = False


NOT_INT8, HALF = "weights in FP16 in place of INT8", "FP16"

Pass = Callable[[ir.Model, PassContext], object]

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
    "computed in FP32": lambda model, _: widen(model),
    "block kernels for CUDA": lambda model, _: use_block_kernels(model, accuracy=0, fused_bias=False),
    NOT_INT8: lambda model, _: dequantize(model),
    "fused heads": lambda model, _: fuse_heads(model),
    "fused root-mean-square norms": lambda model, _: fuse_rms_norms(model),
    "fused tanh GELU": lambda model, _: fuse_tanh_gelus(model),
    "residuals in FP32": lambda model, context: context.encoder_decoder and keep_residuals(model),
    HALF: lambda model, _: halve(model),
}
"""The passes, by the names that recipes use. A pass returns a false value if it changes nothing in the graph."""


@dataclass(frozen=True)
class Recipe:
    """A sequence of optimization passes to try on a graph.

    Attributes:
        passes: Names of the passes in their order, keys of :data:`PASSES`.
        needs: Names of the passes that must change the graph; if one of them does not, the recipe is not used.
    """

    passes: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def layout(self) -> bool:
        """Whether weights are prepacked for the processor when the graph is loaded."""
        return any(name.endswith("convolutions") for name in self.passes)

    @property
    def one_by_one(self) -> bool:
        """Whether rows of a batch must be run separately, because a dynamic range covers all rows of a tensor."""
        return "dynamic ranges" in self.passes


_WHOLE = ("block kernels", "fused attention", "fused activations")
FLOAT = (
    Recipe((*_WHOLE, "narrowing convolutions")),
    Recipe((*_WHOLE, "pointwise convolutions")),
    Recipe(_WHOLE),
    Recipe(("block kernels", "fused activations")),
)
"""Recipes for graphs in floating point, except decoders.

They do not fuse a norm with the residual before it. The fused node is faster for a single token, but slower on long
sequences: 0.8 ms for ``[197, 768]``, where an addition and a LayerNormalization take 0.3 ms (ONNX Runtime 1.31).
"""

INTEGER = (
    Recipe(("dynamic ranges", "block kernels", "fused attention", "fused activations"), ("dynamic ranges",)),
    Recipe(("recorded ranges", "block kernels", "fused attention", "fused activations"), ("recorded ranges",)),
)

_SHARED = ("shared cache", "fused norms", "fused activations")
DECODERS = (
    Recipe(("block kernels", "shared cache", "fused activations", "pointwise convolutions"), ("shared cache",)),
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
"""Recipes for decoders with INT8 activations.

The range of an activation is the recorded range, or is computed for each row. It is never computed over all rows,
because a caption must not depend on the other rows of its batch.
"""


_PREPARED = ("computed in FP32", "block kernels for CUDA", NOT_INT8)
_FUSED = (
    *("fused attention", "fused heads", "fused root-mean-square norms", "residuals in FP32", "fused norms"),
    *("fused activations", "fused tanh GELU"),
)
CUDA = (Recipe((*_PREPARED, *_FUSED)),)
CUDA_DECODERS = (Recipe((*_PREPARED, "shared cache", *_FUSED), ("shared cache",)), *CUDA)
"""Recipes for decoders with the CUDA provider; the first recipe that applies is used, because nothing is measured.

The graph is changed to FP16 afterwards. The provider has no fused kernel for INT8 activations, so graphs with INT8
activations get FP16 weights.
"""


def recipes_for(graph: str, model: ir.Model) -> Sequence[Recipe]:
    """Returns the recipes to try on the graph of this name; the recipe that is fastest most often is first."""
    integers = bool(quantised_products(model))
    if graph == DECODER:
        return INTEGER_DECODERS if integers else DECODERS
    return (*INTEGER, *FLOAT) if integers else FLOAT


def apply_recipe(model: ir.Model, recipe: Recipe, context: PassContext) -> tuple[str, ...] | None:
    """Applies the passes of a recipe to a graph.

    Args:
        model: An exported (not optimized) graph; changed in place.
        recipe: The recipe.
        context: Facts about the model that the passes need.

    Returns:
        Names of the passes that changed the graph; None if a pass of ``needs`` did not change it.
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
