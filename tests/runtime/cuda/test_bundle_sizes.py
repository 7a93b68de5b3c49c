"""What is read from the decoder of a bundle: its layout or the reason why it has none, and the bytes of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.errors import BundleError
from blip2edge.graph_files import load_graph
from blip2edge.optimization.cuda_kernels.layout import layout_of_graph


def test_a_four_bit_head_of_odd_width_is_refused_with_the_remedy(bundle_of: Callable[[str, str], Path]) -> None:
    bundle = Bundle.open(bundle_of("opt", "int4"))
    graph, cache = load_graph(bundle.file(f"{DECODER}.onnx")), bundle.manifest.cache
    assert cache is not None
    width = 120
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and width in tensor.shape.numpy():
            shape = ir.Shape([width - 1 if size == width else size for size in tensor.shape.numpy()])
            value.const_value = ir.ExternalTensor(
                tensor.location,
                tensor.offset,
                None,
                tensor.dtype,
                shape=shape,
                name=tensor.name,
                base_dir=tensor.base_dir,
            )
            value.shape = shape
    with pytest.raises(BundleError, match=f"the weight of the head has rows of {width - 1} 4-bit values") as caught:
        layout_of_graph(graph, cache, bundle.manifest.max_positions)
    assert "OPT or Llama kind" not in str(caught.value)
    assert "--format 'decoder:*head*=int8'" in str(caught.value)
