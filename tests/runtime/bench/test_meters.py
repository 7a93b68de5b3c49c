"""Energy meters with made-up values: counters that wrap, power rails that are sampled, NVML."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest

from blip2edge.runtime.bench import meters as energy
from blip2edge.runtime.bench.meters import EnergyMeter, RailCounter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def rail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A Jetson's rails: the processor's, and the whole board's at 5 V and 2 A."""
    monkeypatch.setattr(energy, "SAMPLE", 60.0)  # the thread looks at nothing while a test runs
    chip = tmp_path / "hwmon3"
    chip.mkdir()
    for number, (name, volts, amperes) in enumerate((("VDD_CPU", 900, 100), ("VDD_IN", 5000, 2000)), 1):
        (chip / f"in{number}_label").write_text(f"{name}\n")
        (chip / f"in{number}_input").write_text(f"{volts}\n")
        (chip / f"curr{number}_input").write_text(f"{amperes}\n")
    monkeypatch.setattr(energy, "HWMON", tmp_path)
    return chip / "in2_input", chip / "curr2_input"


def test_a_rail_is_integrated_up_to_now(rail: tuple[Path, Path]) -> None:
    clock = Clock()
    counter = RailCounter(*rail, clock=clock)
    clock.now += 3.0
    assert counter() == pytest.approx(30.0)
    assert counter() == pytest.approx(30.0)  # no time has gone by
    rail[1].write_text("4000")
    clock.now += 0.5
    assert counter() == pytest.approx(40.0)
    counter.close()


def test_the_rail_is_that_of_the_whole_board(rail: tuple[Path, Path]) -> None:
    counter: Any = energy._rail()
    assert counter.watts() == pytest.approx(10.0)
    counter.close()
    rail[1].unlink()
    assert energy._rail() is None


def test_a_rail_is_sampled_until_it_is_closed(rail: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "SAMPLE", 0.001)
    before = set(threading.enumerate())
    sampled = threading.Event()
    steps = iter(range(10**9))

    def clock() -> float:
        found = float(next(steps))
        if found > 5:
            sampled.set()
        return found

    counter = RailCounter(*rail, clock=clock)
    assert sampled.wait(30)
    (thread,) = set(threading.enumerate()) - before
    counter.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_counter_that_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = tmp_path / "energy_uj"
    counter.write_text("900000")
    (tmp_path / "max_energy_range_uj").write_text("999999")
    monkeypatch.setattr(energy, "RAPL", counter)
    read: Any = energy._rapl()
    counter.write_text("950000")
    assert read() == pytest.approx(0.05)
    counter.write_text("150000")  # 50000 to the end, then 150000
    assert read() == pytest.approx(0.25)
    counter.unlink()
    assert energy._rapl() is None


class Driver:
    """What of libnvidia-ml is asked; energy in millijoules."""

    def __init__(self, broken: str = "") -> None:
        self.energy, self._broken = 5_000, broken

    def nvmlInit_v2(self) -> int:  # noqa: N802 - the driver's name
        return int(self._broken == "init")

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:  # noqa: N802 - as above
        device._obj.value = 7 + index
        return int(self._broken == "device")

    def nvmlDeviceGetTotalEnergyConsumption(self, device: ctypes.c_void_p, energy: Any) -> int:  # noqa: N802 - as above
        assert device.value == 7
        energy._obj.value = self.energy
        return int(self._broken == "energy")


def test_the_driver_counts_in_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with EnergyMeter() as meter:
        driver.energy += 12_500
    assert (meter.source, meter.joules, meter.reason) == ("NVML", 12.5, "")


@pytest.mark.parametrize("broken", ["init", "device", "energy"])
def test_a_card_that_does_not_count(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(broken))
    assert energy._nvml() is None


def test_nothing_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    monkeypatch.setattr(energy, "HWMON", tmp_path)
    monkeypatch.setattr(energy, "RAPL", tmp_path / "energy_uj")
    with EnergyMeter() as meter:
        pass
    assert meter.joules is None
    assert "no NVML" in meter.reason


def test_what_tells_is_opened_once_and_the_first_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    values = iter((2.0, 9.5))

    def make(name: str, counter: Any) -> Any:
        def made() -> Any:
            opened.append(name)
            return counter

        return made

    found = {"a": make("a", None), "b": make("b", lambda: next(values)), "c": make("c", lambda: 0.0)}
    monkeypatch.setattr(energy, "SOURCES", found)
    with EnergyMeter() as meter:
        pass
    assert (meter.source, meter.joules, opened) == ("b", 7.5, ["a", "b"])
