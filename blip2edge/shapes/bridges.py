"""Computes the sizes of a model with each of four kinds of bridge; vision encoder and language model stay the same."""

from __future__ import annotations

from collections.abc import Mapping

from blip2edge.bundle.schema import VISION
from blip2edge.shapes.model_shape import ModelShape
from blip2edge.shapes.parts import mlp, perceiver, pool, qformer

TRADE_OFFS: Mapping[str, str] = {
    "qformer": "most quality for each token: its queries are pretrained with texts (stage 1)",
    "mlp": "every patch keeps its place, best for small things and text in pictures; most tokens",
    "perceiver": "trained with the language model alone; more latents than a Q-Former has queries",
    "pool": "one layer: fewest parameters and operations; least quality for each token",
}


def with_bridges(shape: ModelShape) -> dict[str, ModelShape]:
    """Returns the sizes of the model with each kind of bridge, by the name of the kind.

    The model's own bridge stays as it is; the other bridges have the sizes of the published models. The result is empty
    if the decoder cross-attends to the picture, because then the bridge cannot be replaced alone.
    """
    vision = shape.part(VISION)
    if vision is None or shape.slots == 0:
        return {}
    encoder, output = vision.matrices[0].outputs, shape.table[1]
    made = {
        "qformer": (qformer({}, encoder, 32, shape.width), 32),
        "mlp": (mlp(encoder, output), 0),
        "perceiver": (perceiver({}, encoder, output), 64),
        "pool": (pool({}, encoder, output), 32),
    }
    own = "qformer" if shape.bridge == "instructed-qformer" else shape.bridge
    return {
        kind: shape if kind == own else shape.with_bridge(kind, part, queries) for kind, (part, queries) in made.items()
    }
