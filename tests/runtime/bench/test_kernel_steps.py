"""A decode step of ``cuda-decoder`` in ``plan``: which models and boards have one, and its bytes by hand."""

from __future__ import annotations

import pytest

from blip2edge.runtime.bench import kernel_steps as module
from blip2edge.runtime.bench.devices import DEVICES
from blip2edge.runtime.bench.kernel_steps import KernelStep, kernel_steps
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


def steps_of(device: str, **given: int) -> tuple[KernelStep, ...]:
    shape = shape_of(published_config("Salesforce/blip2-opt-2.7b"))
    return kernel_steps(shape, DEVICES[device], PlanOptions(**given))


def test_a_step_reads_its_bytes_and_waits_for_its_launches() -> None:
    launches = 7 * 32 + 3
    for step in steps_of("l4"):
        assert step.launches == launches
        assert step.step_ms == pytest.approx(step.least_ms / 0.75 + launches * 2e-3)
    fp16, _, int4 = steps_of("rtx-4090")
    assert (int4.step_ms - launches * 2e-3) / int4.step_ms > 0.5  # launches matter most with small weights
    assert launches * 2e-3 / int4.step_ms > 2 * launches * 2e-3 / fp16.step_ms


def test_the_prompt_takes_its_operations_or_the_reading_of_the_weights() -> None:
    """OPT-2.7b by hand: 12 D^2 weights a layer and the head's one row."""
    matrices, width = 32 * 12 * 2560**2, 2560
    (step, *_) = steps_of("thor", prompt_tokens=200)
    assert step.prefill_tokens == 232
    products = (2 * matrices * 256 + 2 * width * 50272) / (517e12 / 2 * 0.25)
    reading = 4 * (2 * matrices + 2 * width * 50272) / (273e9 * 0.75)
    attention = 4 * 32 * width * 232**2 / (8e12 * 0.6)
    assert reading > products
    assert step.prefill_ms == pytest.approx((reading + attention + step.launches * 2e-6) * 1e3, rel=0.01)
    (orin, *_) = steps_of("orin-nano-8gb", prompt_tokens=200)
    products = (2 * matrices * 256 + 2 * width * 50272) / (DEVICES["orin-nano-8gb"].rate("fp16") * 0.25)
    attention = 4 * 32 * width * 232**2 / (DEVICES["orin-nano-8gb"].rate("fp32") * 0.6)
    assert orin.prefill_ms == pytest.approx((products + attention + step.launches * 2e-6) * 1e3, rel=0.01)


def test_tiles_of_64_tokens_and_sums_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    few, most, more = (steps_of("rtx-4060", prompt_tokens=tokens)[2].prefill_ms for tokens in (1, 32, 33))
    assert most == pytest.approx(few, rel=0.01)  # 33 and 64 tokens
    assert more > 1.9 * most
    monkeypatch.setattr(module, "HALF_RATE", ())
    assert steps_of("rtx-4060", prompt_tokens=33)[2].prefill_ms < 0.75 * more
