"""Exports without tracing again: the graphs of one small checkpoint, kept for the session."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _outputs(model: Any) -> list[Any]:
    return [output for node in model.graph for output in node.outputs]


@pytest.fixture(scope="session")
def _traces() -> dict[Any, Any]:
    return {}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, _traces: dict[Any, Any]) -> Callable[..., Path]:
    """``export_checkpoint`` for copies of one checkpoint: a graph is traced the first time only."""
    from blip2edge.export import pipeline, to_onnx, verify

    def trace(module: Any, spec: Any) -> to_onnx.Traced:
        key = repr(module), spec
        if key not in _traces:
            _traces[key] = to_onnx.trace(module, spec)
        kept = _traces[key]
        model = kept.model.clone()
        for value in (*model.graph.inputs, *model.graph.initializers.values(), *_outputs(model)):
            value.type = copy.copy(value.type)  # a clone shares them, and a change of precision changes them
        return to_onnx.Traced(model, kept.spec, dict(kept.slots))

    monkeypatch.setattr(pipeline, "trace", trace)
    monkeypatch.setattr(verify, "trace", trace)

    def export(checkpoint: Path, output: Path, **options: Any) -> Path:
        return pipeline.export_checkpoint(checkpoint, output, **options).bundle

    return export
