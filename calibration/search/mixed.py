"""Mixes two formats in the decoder's graph: most layers in INT4, the most sensitive ones in INT8 or floating point."""

from __future__ import annotations

import math
import shutil

from blip2edge.bundle.schema import DECODER
from blip2edge.calibration.formats import GraphFormat, NumberFormat
from blip2edge.calibration.search.choices import LANGUAGE, PartChoice
from blip2edge.calibration.search.measure import Workload
from blip2edge.calibration.search.sensitivity import LAYER, QuantizedLayer, group_by_layer, with_rounded_weights

SHARES = (1 / 8, 1 / 3)
"""Shares of the layers that get the wider format."""


def mixed_choices(work: Workload, base: PartChoice, wide: NumberFormat) -> list[PartChoice]:
    """Measures the sensitivity of each layer of the decoder, and gives the most sensitive layers a wider format.

    Args:
        work: The pictures, and the graphs in all formats.
        base: The format of the language model in INT4.
        wide: The format of the most sensitive layers.

    Returns:
        A format of the language model for each of :data:`SHARES`; an empty list for a decoder of one layer.
    """
    ranking = _ranking(work, base)
    found = []
    for count in dict.fromkeys(math.ceil(share * len(ranking)) for share in SHARES):
        if count < len(ranking):
            patterns = tuple((_pattern(layer), wide) for layer in ranking[:count])
            note = f"{count} of {len(ranking)} layers in {wide}"
            found.append(PartChoice(LANGUAGE, GraphFormat(base.form.whole, patterns), note))
    return found


def _ranking(work: Workload, base: PartChoice) -> list[QuantizedLayer]:
    """Measures how much the next token changes if only one layer of the decoder is in the format ``base``.

    Returns:
        The layers, the one with the largest change first.
    """
    variants = work.variants
    layers = group_by_layer(DECODER, list(variants.made(DECODER, base.form).summary.matrices))
    source = work.context.parent.file(work.context.parent.graph(DECODER).spec.file)
    readable = work.journal.scratch / "layers"  # onnx_ir refuses the files of bundles that share them
    shutil.rmtree(readable, ignore_errors=True)
    losses: dict[str, float] = {}
    for done, layer in enumerate(layers):
        work.context.progress("sensitivity", done, len(layers))

        def measure(layer: QuantizedLayer = layer) -> float:
            if not readable.exists():
                shutil.copytree(variants.graph(DECODER, base.form), readable)
            return work.meter.measure(layer, with_rounded_weights(source, readable / source.name, layer)).loss

        losses[layer.name] = work.journal.value(f"layer-{base.form.whole.kind}-{layer.name}", measure)
    return sorted(layers, key=lambda layer: -losses[layer.name])


def _pattern(layer: QuantizedLayer) -> str:
    """Returns the pattern that matches the names of a layer's matrices."""
    return f"{layer.name}.*" if LAYER.match(f"{layer.name}.x") and layer.weights != (layer.name,) else layer.name
