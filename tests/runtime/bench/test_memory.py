"""Memory: estimates by hand, the memory of the machine, and the check before export, calibrate and build."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blip2edge.cli.messages import flag
from blip2edge.errors import ExportError
from blip2edge.runtime.bench.devices import DEVICES
from blip2edge.runtime.bench.memory import (
    MIB,
    MachineMemory,
    MemoryNeed,
    build_memory,
    build_need,
    calibration_need,
    check_memory,
    export_need,
    machine_memory,
    run_memory,
)
from blip2edge.shapes.sources import find_shape

NEED = MemoryNeed("the export", 4_000_000_000, 6_000_000_000, "export on a machine with more memory")


def test_the_memory_of_the_machine(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text(
        "MemTotal: 8388608 kB\nMemAvailable:  2097152 kB\nSwapTotal: 2097152 kB\nSwapFree: 1048576 kB\nHugePages: 0\n"
    )
    whole = MachineMemory(2048 * MIB, 8192 * MIB, 1024 * MIB, 2048 * MIB)
    assert machine_memory(meminfo, limit) == whole
    assert (whole.free, whole.total) == (3072 * MIB, 10240 * MIB)
    limit.write_text("max\n")
    assert machine_memory(meminfo, limit) == whole
    limit.write_text(f"{1024 * MIB}\n")  # of a container
    limited = machine_memory(meminfo, limit)
    assert limited is not None
    assert limited == replace(whole, limit=1024 * MIB)
    assert (limited.free, limited.total) == (1024 * MIB, 1024 * MIB)
    assert machine_memory(tmp_path / "none", limit) is None
    meminfo.write_text("nothing known\n")
    assert machine_memory(meminfo, limit) is None


def test_needs() -> None:
    assert build_need(1 << 30, 256, "decoder").likely == (1536 + 256 + 2048) * MIB
    assert build_need(1, None, "decoder").likely == (1536 + 1024) * MIB + 2
    assert build_need(5, 1, "decoder").least == 10  # the weights twice
    sampled, full = export_need(10**8, 10**9, full=False), export_need(10**8, 10**9, full=True)
    assert (sampled.least, full.least) == (4 * 10**8, 4 * 10**9)  # one tensor, or all of them, in float32
    assert sampled.likely == 450_000_000 + round(2.2 * 4 * 10**8)
    assert full.likely == 450_000_000 + 2 * 4 * 10**9
    assert calibration_need(10**9).likely == 250_000_000 + 2 * 10**9


def test_the_export_of_the_published_sizes_is_close_to_what_was_measured() -> None:
    """benchmarks/results/export-memory-*.json: peaks of 1.11 to 1.90 GB. The largest tensors are the token tables."""
    results = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
    for name in ("blip2-opt-2.7b", "blip2-flan-t5-xl", "instructblip-vicuna-7b"):
        found = json.loads((results / f"export-memory-{name}.json").read_text())["results"][0]
        rows, width = find_shape(name)[0].table
        assert export_need(rows * width, 10**10, full=False).likely == pytest.approx(found["peak_bytes"], rel=0.2)


def test_a_command_that_fits_says_nothing() -> None:
    said: list[str] = []
    check_memory(NEED, ExportError, notify=said.append, memory=MachineMemory(7 * 10**9, 8 * 10**9))
    assert said == []


def test_a_command_that_probably_does_not_fit_warns() -> None:
    said: list[str] = []
    check_memory(NEED, ExportError, notify=said.append, memory=MachineMemory(5 * 10**9, 8 * 10**9))
    assert said == [
        "warning: the export may need about 6.0 GB of memory, and 5.0 GB are free; export on a machine with more memory"
    ]


def test_a_command_that_certainly_does_not_fit_is_refused() -> None:
    said: list[str] = []
    small = MachineMemory(10**9, 2 * 10**9)
    with pytest.raises(ExportError) as caught:
        check_memory(NEED, ExportError, notify=said.append, memory=small)
    assert caught.value.text(flag) == (
        "the export needs at least 4.0 GB of memory, and this machine has 2.0 GB with its swap; export on a machine "
        "with more memory, or try it with --anyway"
    )
    check_memory(NEED, ExportError, anyway=True, notify=said.append, memory=small)
    assert len(said) == 1  # the warning, and no error


def test_the_memory_of_a_caption_by_hand() -> None:
    """BLIP-2 with OPT-2.7b in fp16 on an Orin: two bytes a parameter, and the head's copy of the token table."""
    shape, _ = find_shape("blip2-opt-2.7b")
    found = run_memory(shape, "fp16", DEVICES["orin-nx-16gb"], 1, 8, 30)
    assert found.weights == 2 * (3_744_761_856 + 50304 * 2560)
    assert found.cache == 2 * 32 * 32 * 80 * (32 + 8 + 30) * 2  # K and V, layers, heads, width, tokens, bytes
    # The scores of the vision encoder's 16 heads before and after softmax, and four times its states.
    assert found.activations == (2 * 16 * 257 * 257 + 4 * 1408 * 257) * 2
    assert found.total == sum((found.weights, found.cache, found.activations, found.workspace))
    assert found.to_json()["run"] == found.total


def test_weights_by_precision_by_hand() -> None:
    shape, _ = find_shape("blip2-opt-2.7b")
    decoder = shape.part("decoder")
    assert decoder is not None
    matrices = 32 * (4 * 2560**2 + 2 * 2560 * 10240) + 50304 * 2560
    rest = decoder.parameters - matrices  # biases, norms and positions stay in float32
    assert decoder.bytes("int4") == matrices * (0.5 + 4 / 128) + rest * 4
    assert decoder.bytes("int8") == matrices * (1 + 4 / 64) + rest * 4
    assert decoder.bytes("fp16") == 2 * decoder.parameters
    assert shape.table_bytes("int8") == 0  # the head has it
    assert shape.table_bytes("int4") == 50304 * 2560 * (1 + 4 / 64)


def test_a_cpu_holds_fp16_in_fp32() -> None:
    shape, _ = find_shape("blip-image-captioning-base")
    pi = DEVICES["raspberry-pi-5-8gb"]
    assert run_memory(shape, "fp16", pi, 1, 8, 30) == run_memory(shape, "fp32", pi, 1, 8, 30)


def test_the_memory_of_a_build() -> None:
    shape, _ = find_shape("blip2-opt-2.7b")
    decoder = shape.part("decoder")
    assert decoder is not None
    largest = int(decoder.bytes("fp16"))
    assert build_memory(shape, "fp16", DEVICES["thor"]) == (1536 + 1024) * MIB + 2 * largest
    pi = DEVICES["raspberry-pi-5-8gb"]
    assert build_memory(shape, "fp16", pi) == pi.base + 2 * largest
