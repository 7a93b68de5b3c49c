"""Loads the ``.onnx`` files of bundles with onnx_ir, and checks that the weights are in the files that they name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from blip2edge.bundle.fields import is_file_name
from blip2edge.errors import BundleError
from blip2edge.reading import reading

MAX_GRAPH = 1 << 31  # bytes: protobuf's own limit
VALUES_PER_BYTE = 8  # of the densest dtype


def load_graph(path: Path) -> ir.Model:
    """Loads a graph; weights in a data file stay on the disk.

    Args:
        path: The ``.onnx`` file.

    Raises:
        BundleError: The file is no ONNX graph, or its weights are incomplete or in another directory.
    """
    with reading(path, "an ONNX graph", BundleError, "copy the bundle again, or export the checkpoint again"):
        if path.stat().st_size > MAX_GRAPH:
            raise ValueError(f"expected at most {MAX_GRAPH} bytes, got more")
        model = ir.load(path)
        for tensor in _tensors(model):
            _check_tensor(tensor, path)
        return model


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yields the tensors of a graph and of its subgraphs: initializers and attributes."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()


def _check_tensor(tensor: ir.TensorProtocol, path: Path) -> None:
    """Raises ValueError if the values of a tensor are incomplete, or are in a file outside the graph's directory."""
    if isinstance(tensor, ir.ExternalTensor):
        location, start = str(tensor.location), tensor.offset or 0
        if not is_file_name(location):
            raise ValueError(f"expected the weight {tensor.name} in a file of its directory, got {location!r:.60}")
        length = tensor.nbytes if tensor.length is None else tensor.length
        size = (path.parent / location).stat().st_size
        if start < 0 or length != tensor.nbytes or start + length > size:
            raise ValueError(
                f"the weight {tensor.name} of {tensor.nbytes} bytes is not whole in {location}: the file has {size} "
                f"bytes, and the graph places the weight at byte {start} with {length} bytes"
            )
    else:
        if tensor.size > VALUES_PER_BYTE * path.stat().st_size:
            raise ValueError(f"the tensor {tensor.name} has {tensor.size} values by its shape: too many")
        tensor.numpy()  # raises where the values do not fill the shape
