"""A decode step of ``cuda-decoder`` in ``plan``: which models and boards have one, and its bytes by hand."""

from __future__ import annotations

import pytest

from blip2edge.runtime.bench.devices import DEVICES
from blip2edge.runtime.bench.kernel_steps import kernel_steps
from blip2edge.runtime.bench.plan import PlanOptions
from blip2edge.shapes.families import published_config, shape_of


@pytest.mark.parametrize(
    ("model", "device", "count"),
    [
        ("Salesforce/blip2-opt-2.7b", "thor", 3),
        ("llava-hf/llava-1.5-7b-hf", "thor", 3),
        ("Salesforce/blip2-opt-2.7b", "raspberry-pi-5-8gb", 0),
        ("Salesforce/blip2-flan-t5-xl", "thor", 0),
    ],
)
def test_steps_in_kernels_where_there_are_kernels(model: str, device: str, count: int) -> None:
    shape = shape_of(published_config(model))
    steps = kernel_steps(shape, DEVICES[device], PlanOptions(new_tokens=31))
    assert len(steps) == count
    if (
        "opt" in model and count
    ):  # 32 layers of 12 D^2 weights, the head, positions and norms in two bytes, and the cache
        weights = 32 * 12 * 2560**2 + 2560 * 50272
        tokens = 32 + 8 + 1 + 15
        least = 2 * weights + 2 * 32 * 2560 * tokens * 2
        assert least < steps[0].bytes < 1.01 * least
