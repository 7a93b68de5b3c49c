"""Counts the layers of an engine by precision, to show whether INT8 was used.

The engine inspector returns a JSON list of layers, each with the formats of the layer's tensors ("Row major linear FP16
format", "Int8 NC/32HW32"); see "Engine Inspector" in NVIDIA's TensorRT documentation. The first tensor with a known
format (inputs first, then outputs) gives the layer's precision.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

KINDS = (
    ("int4", r"int4"),
    ("int8", r"int8"),
    ("fp8", r"fp8"),
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"fp16|half|float16"),
    ("fp32", r"fp32|float"),
    ("integers", r"int32|int64|bool"),
)


def count_precisions(information: str) -> dict[str, int]:
    """Counts the layers of an engine by precision, the most frequent first.

    Args:
        information: JSON text about the whole engine from TensorRT's engine inspector.
    """
    layers = json.loads(information).get("Layers", [])
    return dict(Counter(_precision(layer) for layer in layers).most_common())


def _precision(layer: Any) -> str:
    if not isinstance(layer, dict):  # built without details: only a name
        return "unknown"
    for tensor in [*layer.get("Inputs", ()), *layer.get("Outputs", ())]:
        text = str(tensor.get("Format/Datatype", "")).lower()
        for kind, pattern in KINDS:
            if re.search(pattern, text):
                return kind
    return "unknown"
