"""Makes seeded random inputs for any graph of a bundle, and runs a fixed sequence of decode steps on any decoder.

With these inputs, `optimize` compares an optimized graph with the exported graph, and `certify` compares a backend's
outputs with the recorded outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import CROSS_MASK, QUERY_IDS, Axis, GraphSpec, TensorSpec
from blip2edge.runtime.decoding.state import Decoder

SEED = 6
ROWS = 2
LENGTHS = {"source": 9, "instruction": 6, "text": 7, "past": 4, "steps": 3, "asked": 2}
"""Lengths of the random inputs' axes, by name. A length is clipped to the range that the graph allows for the axis. An
axis without an entry gets the usual length that the graph's description has (``opt``)."""

VOCABULARY = 16
"""Random token ids are below this number, so that every vocabulary contains them."""

DRAWN = 17
"""Number of random token ids that :func:`decode` draws for a row. Only ten of them are used. If fewer were drawn, the
ids would differ from those with which the outputs in older bundles were recorded."""

Arrays = dict[str, Array]


def draw_inputs(spec: GraphSpec, upstream: Mapping[str, Array]) -> Arrays:
    """Draws random inputs of a graph, a batch of two rows.

    Args:
        spec: The graph's inputs and outputs.
        upstream: Outputs of the graphs that run before this graph, by name. If an input has the name of such an output,
            the output is used.
    """
    rng, lengths = np.random.default_rng(SEED), _lengths(spec)
    drawn: Arrays = {}
    for tensor in spec.inputs:
        shape = [dim if isinstance(dim, int) else dim.value(lengths) for dim in tensor.dims]
        if tensor.name == "pixel_values":
            drawn[tensor.name] = draw_pixels(tensor, rng)
        elif tensor.name in upstream:
            drawn[tensor.name] = upstream[tensor.name]
        elif tensor.name in ("logits_indices", QUERY_IDS):
            drawn[tensor.name] = np.tile(np.arange(shape[1]), (shape[0], 1))
        elif tensor.name.endswith("mask"):
            drawn[tensor.name] = np.ones(shape, np.int64)
            drawn[tensor.name][-1, ..., -1] = 0
        elif tensor.dtype == "int64":
            drawn[tensor.name] = rng.integers(0, VOCABULARY, shape)
        else:
            drawn[tensor.name] = rng.standard_normal(shape).astype(NUMPY_DTYPES[tensor.dtype])
    return drawn


def draw_pixels(spec: TensorSpec, rng: np.random.Generator) -> Array:
    """Draws two test pictures ``[2, 3, H, W]``: smooth colours with noise, about as bright as preprocessed images."""
    _, channels, height, width = (dim if isinstance(dim, int) else ROWS for dim in spec.dims)
    coarse = rng.standard_normal((ROWS, channels, 5, 5))
    rows, columns = np.linspace(0, 4, height), np.linspace(0, 4, width)
    smooth = np.apply_along_axis(lambda line: np.interp(rows, np.arange(5), line), 2, coarse)
    smooth = np.apply_along_axis(lambda line: np.interp(columns, np.arange(5), line), 3, smooth)
    noisy = smooth + 0.1 * rng.standard_normal(smooth.shape)
    return np.asarray(noisy, NUMPY_DTYPES[spec.dtype])


def draw_cross_inputs(spec: GraphSpec, upstream: Mapping[str, Array]) -> Arrays:
    """Draws keys, values and mask of a decoder's cross-attention; empty for a decoder without cross-attention.

    Args:
        spec: The decoder's inputs and outputs.
        upstream: Outputs of the graphs that run before the decoder, by name; used where an input has the same name.
    """
    drawn = draw_inputs(spec, upstream)
    inputs = {name: array for name, array in drawn.items() if name.startswith("cross.")}
    if inputs and CROSS_MASK in drawn:
        keys = next(iter(inputs.values())).shape[2]
        shape = drawn[CROSS_MASK].shape[:-1]
        mask = np.ones((*shape, keys), np.int64)
        mask[-1, ..., -1] = 0
        inputs[CROSS_MASK] = mask
    return inputs


def decode(decoder: Decoder, context: Mapping[str, Array]) -> Arrays:
    """Runs a decoder once with every kind of step that generation needs.

    The steps are: prefill of two prompts of different lengths, a step with one token, a step with three tokens,
    truncation of the KV cache, exchange of the two rows, and a step with one token.

    Args:
        decoder: The decoder.
        context: Keys, values and mask from :func:`draw_cross_inputs`.

    Returns:
        Logits by the name of the step: ``prefill``, ``step``, ``extend`` (three tokens), ``after``.
    """
    rng = np.random.default_rng(SEED)
    table = decoder.table
    ids = rng.integers(0, table.num_rows, (ROWS, DRAWN))
    prompts = [table.rows(ids[0, :5]), table.rows(ids[1, :3])]
    logits, state = decoder.prefill(prompts, for_steps(context, 5))
    outputs = {"prefill": logits, "step": state.step(ids[:, 5])}
    before = state.lengths
    outputs["extend"] = state.extend(ids[:, 6:9])
    state.truncate(before + np.array([1, 2], np.int64))
    state.select(np.array([1, 0]))
    outputs["after"] = state.step(ids[:, 9])
    return outputs


def for_steps(context: Mapping[str, Array], steps: int) -> Arrays:
    """Returns the inputs of cross-attention for a step with ``steps`` new tokens.

    If the mask has an axis for the new tokens, its last row is repeated ``steps`` times.
    """
    made = dict(context)
    mask = made.get(CROSS_MASK)
    if mask is not None and mask.ndim == 3:
        made[CROSS_MASK] = np.repeat(mask[:, -1:], steps, axis=1)
    return made


def _lengths(spec: GraphSpec) -> dict[str, int]:
    """Chooses a length for each axis of a graph's inputs; leaves out axes that are sums, such as ``past + steps``."""
    axes = [dim for tensor in spec.inputs for dim in tensor.dims if not isinstance(dim, int)]
    return {axis.name: _length(axis) for axis in axes if " + " not in axis.name}


def _length(axis: Axis) -> int:
    return ROWS if axis.name == "batch" else min(max(LENGTHS.get(axis.name, axis.opt), axis.min), axis.max)
