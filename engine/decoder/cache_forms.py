"""Chooses the kind of KV cache for a decoder's engine: ``in-place`` if the TensorRT version allows it, or ``constant``.

``constant``: each step copies the cache, whose shape never changes. ``in-place``: each step only writes the new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from blip2edge.bundle.schema import CacheSpec, GraphSpec
from blip2edge.engine.adapt import adapt
from blip2edge.engine.decoder.constant_shape import constant_shape_spec, to_constant_shape
from blip2edge.engine.decoder.in_place import in_place_spec, to_in_place
from blip2edge.engine.operators import ParserVersion
from blip2edge.engine.support import check_graph
from blip2edge.errors import EngineError, option
from blip2edge.graph_files import load_graph
from blip2edge.runtime.backends.engine_files import CONSTANT, IN_PLACE

AUTO = "auto"


@dataclass(frozen=True)
class CacheForm:
    """The two functions that convert an exported decoder to one kind of KV cache of constant capacity.

    Attributes:
        describe: Returns inputs and outputs of the converted decoder. Arguments: inputs and outputs of the exported
            decoder, the KV cache, and the capacity in slots.
        rewrite: Converts the exported graph itself. Arguments: the graph, the KV cache, the capacity in slots, and the
            name of the graph's file for errors.
    """

    describe: Callable[[GraphSpec, CacheSpec, int], GraphSpec]
    rewrite: Callable[[ir.Model, CacheSpec, int, str], None]


FORMS: Mapping[str, CacheForm] = {
    CONSTANT: CacheForm(constant_shape_spec, lambda model, cache, _, name: to_constant_shape(model, cache, name)),
    IN_PLACE: CacheForm(in_place_spec, to_in_place),
}


def choose_form(wanted: str, path: Path, cache: CacheSpec, version: ParserVersion) -> tuple[str, str]:
    """Chooses the kind of KV cache for the engine of a decoder.

    Args:
        wanted: The value of ``--decoder``. ``auto`` means ``in-place`` if TensorRT and the graph allow this, else
            ``constant``.
        path: The file of the exported decoder.
        cache: KV cache of the decoder.
        version: The TensorRT version that will parse the graph.

    Returns:
        The kind of KV cache, and why ``auto`` did not choose ``in-place`` (empty in all other cases).

    Raises:
        EngineError: ``wanted`` is ``in-place``, but this TensorRT version or this graph does not allow it.
    """
    if wanted not in (AUTO, IN_PLACE):
        return wanted, ""
    try:
        _check_in_place(path, cache, version)
    except EngineError as error:
        if wanted == IN_PLACE:
            raise
        return CONSTANT, error.problem
    return IN_PLACE, ""


def _check_in_place(path: Path, cache: CacheSpec, version: ParserVersion) -> None:
    """Raises EngineError if this TensorRT version cannot update the decoder's cache in place."""
    constant = f"build with {option('decoder')} {CONSTANT}"
    if version.types_of("TensorScatter") is None:
        raise EngineError(f"{version.name} cannot update a KV cache in place, TensorRT 10.15 and newer can", constant)
    model = load_graph(path)
    to_in_place(model, cache, 2, path.name)
    adapt(model)
    findings = check_graph(model, version)
    if findings:
        first = findings[0]
        raise EngineError(f"{version.name} does not support {first.operator} of {path.name}: {first.problem}", constant)
