"""The decoder's portable graph: the oracle of the kernels, also in ``benchmarks/gpu_kernels.py``, without pytest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Portable:
    """The portable graph in ONNX Runtime as it is: without the fused products that round activations to int8."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        names = list(outputs or self.output_names)
        given = {name: array for name, array in inputs.items() if name in self.input_names}
        return dict(zip(names, self._session.run(names, given), strict=True))

    def close(self) -> None:
        """Nothing to release."""
