"""The device over the CUDA driver, with a simulated driver: order and arguments of calls, errors, captures, closing."""

from __future__ import annotations

import inspect
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip2edge.errors import BackendError
from blip2edge.runtime.backends.probe import nvidia_driver
from blip2edge.runtime.cuda.compilation.compiler import load_nvrtc
from blip2edge.runtime.cuda.device import driver as module
from blip2edge.runtime.cuda.device.driver import DriverDevice, load_driver
from blip2edge.runtime.cuda.device.interface import KernelDevice, Run
from blip2edge.runtime.cuda.kernel import Launch
from blip2edge.runtime.cuda.steps import EmbedArguments, embed_kernel
from tests.runtime.cuda.fake_driver import CUBIN, OUT_OF_MEMORY, CUdevice_attribute, FakeDriver

KERNEL = embed_kernel("float")


def opened(**given: Any) -> tuple[FakeDriver, DriverDevice]:
    api = FakeDriver([KERNEL], **given)
    device = DriverDevice(api)
    device.load(CUBIN)
    return api, device


def embedding(device: KernelDevice, values: np.ndarray[Any, Any]) -> tuple[Launch, int]:
    """A launch that copies rows, and the address of its result."""
    source, target = (device.allocate(values.nbytes) for _ in range(2))
    before = device.allocate(4)
    device.write(source, values)
    arguments = EmbedArguments(source, None, before, target, len(values), values.shape[1], 0, 0)
    return Launch(KERNEL, (len(values), 1, 1), arguments), target


VALUES = np.arange(64, dtype=np.float32).reshape(2, 32)


def test_a_launch_runs_in_the_gpus_context_and_stream() -> None:
    api, device = opened()
    assert (device.capability, device.multiprocessors) == (87, 4)
    assert api.calls[:1] == ["cuInit"]
    assert api.calls.index("cuDevicePrimaryCtxRetain") < api.calls.index("cuStreamCreate")
    assert api.calls.index("cuModuleLoadData") < len(api.calls)
    launch, target = embedding(device, VALUES)
    device.run(launch)
    assert np.array_equal(device.read(target, VALUES.shape, np.float32), VALUES)
    device.run(launch)
    assert api.calls.count("cuModuleGetFunction") == 1
    assert api.calls[-2:] == ["cuCtxSetCurrent", "cuLaunchKernel"]
    device.close()


def test_other_threads_get_the_context_too() -> None:
    _, device = opened()
    launch, target = embedding(device, VALUES)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            device.run(launch)
            assert np.array_equal(device.read(target, VALUES.shape, np.float32), VALUES)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    device.close()


def test_the_second_run_is_captured_and_later_ones_are_one_call() -> None:
    api, device = opened()
    launch, target = embedding(device, VALUES)
    run = Run(device, [launch, launch])
    found = []
    for _ in range(3):
        del api.calls[:]
        run.start()
        found.append([name for name in api.calls if name not in ("cuCtxSetCurrent", "cuModuleGetFunction")])
    assert found[0] == ["cuLaunchKernel"] * 2
    capture = ["cuStreamBeginCapture", "cuLaunchKernel", "cuLaunchKernel", "cuStreamEndCapture"]
    assert found[1] == [*capture, "cuGraphInstantiate", "cuGraphDestroy", "cuGraphLaunch"]
    assert found[2] == ["cuGraphLaunch"]
    assert np.array_equal(device.read(target, VALUES.shape, np.float32), VALUES)
    run.close()
    assert "executable" not in api.live.values()
    device.close()


def test_a_capture_ends_after_an_error_and_the_stream_can_be_used_again() -> None:
    failing = {"cuLaunchKernel": 0}
    api, device = opened(fails=lambda name: failing.get(name, 0))
    launch, target = embedding(device, VALUES)
    failing["cuLaunchKernel"] = 1
    with pytest.raises(BackendError, match="cuLaunchKernel failed: invalid argument"):
        device.capture([launch])
    assert "graph" not in api.live.values()
    failing["cuLaunchKernel"] = 0
    device.replay(device.capture([launch]))
    assert np.array_equal(device.read(target, VALUES.shape, np.float32), VALUES)
    failing["cuGraphInstantiate"] = OUT_OF_MEMORY
    with pytest.raises(BackendError, match="cuGraphInstantiate failed"):
        device.capture([launch])
    assert "graph" not in api.live.values()
    failing["cuGraphDestroy"] = 1
    with pytest.raises(BackendError, match="cuGraphInstantiate failed"):  # not cuGraphDestroy
        device.capture([launch])
    failing.clear()
    device.close()


def test_copies_wait_for_themselves_and_their_memory_is_used_again() -> None:
    api, device = opened()
    launch, target = embedding(device, VALUES)
    device.run(launch)
    del api.calls[:]
    first = device.fetch(target, VALUES.shape, np.float32)
    second = device.fetch(target, VALUES.shape, np.float32)
    assert "cuStreamSynchronize" not in api.calls
    assert api.calls.count("cuMemAllocHost") == 2
    device.write(target, VALUES + 1)  # later work does not change what was fetched
    assert np.array_equal(first(), VALUES)
    assert np.array_equal(second(), VALUES)
    assert np.array_equal(device.fetch(target, VALUES.shape, np.float32)(), VALUES + 1)
    assert api.calls.count("cuMemAllocHost") == 2
    device.close()


def test_rows_are_copied() -> None:
    _, device = opened()
    source, target = device.allocate(64), device.allocate(96)
    device.write(source, np.arange(64, dtype=np.uint8))
    device.copy_rows(target, 24, source, 16, 10, 4)
    found = device.read(target, (4, 24), np.uint8)
    assert np.array_equal(found[:, :10], np.arange(64, dtype=np.uint8).reshape(4, 16)[:, :10])
    assert not found[:, 10:].any()
    device.close()


def test_close_frees_everything_and_only_once() -> None:
    api, device = opened()
    launch, target = embedding(device, VALUES)
    graph = device.capture([launch])
    device.fetch(target, VALUES.shape, np.float32)()
    device.close()
    assert not api.memory
    assert not api.pinned
    assert not api.live
    assert api.retained == 0
    calls = len(api.calls)
    device.close()
    device.free(target)
    device.release(graph)
    assert len(api.calls) == calls
    with pytest.raises(BackendError, match="this graph is closed"):
        device.run(launch)


FREEING = {
    "cuCtxSetCurrent": 1, "cuStreamSynchronize": 1, "cuGraphExecDestroy": 1, "cuEventDestroy": 1, "cuMemFreeHost": 1,
    "cuMemFree": 3, "cuModuleUnload": 1, "cuStreamDestroy": 2, "cuDevicePrimaryCtxRelease": 1,
}  # fmt: skip
"""The calls of closing, with how often each is called."""


def closing(*failing: str) -> tuple[FakeDriver, BackendError, list[str]]:
    """Closes a device while these calls fail; returns the error and the calls."""
    broken: set[str] = set()
    api, device = opened(fails=lambda name: name in broken)
    launch, target = embedding(device, VALUES)
    device.capture([launch])
    device.fetch(target, VALUES.shape, np.float32)()
    broken.update(failing)
    del api.calls[:]
    with pytest.raises(BackendError) as caught:
        device.close()
    calls = list(api.calls)
    device.close()  # nothing is left to do
    assert api.calls == calls
    return api, caught.value, calls


@pytest.mark.parametrize("name", list(FREEING))
def test_close_goes_on_after_a_call_that_fails_and_reports_it(name: str) -> None:
    api, error, calls = closing(name)
    assert Counter(calls) == FREEING
    more = f" (and {FREEING[name] - 1} more of the calls that free the GPU's memory)" if FREEING[name] > 1 else ""
    assert error.problem == f"{name} failed: invalid argument{more}"
    left = {"cuMemFree": 3, "cuMemFreeHost": 1, "cuDevicePrimaryCtxRelease": 1}
    assert len(api.memory) + len(api.pinned) + api.retained == left.get(name, 0)
    kinds = {"cuGraphExecDestroy": 1, "cuEventDestroy": 1, "cuModuleUnload": 1, "cuStreamDestroy": 2}
    assert len(api.live) == kinds.get(name, 0)


def test_close_reports_the_first_of_several_errors() -> None:
    _, error, _ = closing("cuStreamSynchronize", "cuMemFree")
    assert error.problem.startswith("cuStreamSynchronize failed: invalid argument (and 3 more of the calls")


@pytest.mark.parametrize("failing", [2, 3])
def test_an_error_while_something_is_freed_does_not_replace_the_first_one(failing: int) -> None:
    """A stream that cannot be made, and then nothing can be freed; the first stream goes if it can."""
    calls: Counter[str] = Counter()

    def fails(name: str) -> int:
        calls[name] += 1
        if name == "cuStreamCreate":
            return OUT_OF_MEMORY * (calls[name] == 2)
        return int(failing == 2 and name in ("cuStreamDestroy", "cuDevicePrimaryCtxRelease"))

    api = FakeDriver([KERNEL], fails=fails)
    with pytest.raises(BackendError, match="cuStreamCreate failed: out of memory"):
        DriverDevice(api)
    assert calls["cuStreamDestroy"] == calls["cuDevicePrimaryCtxRelease"] == 1
    assert bool(api.live) == bool(api.retained) == (failing == 2)


def test_a_copy_without_an_event_keeps_no_memory() -> None:
    failing = {"cuEventCreate": OUT_OF_MEMORY}
    api, device = opened(fails=lambda name: failing.get(name, 0))
    target = device.allocate(64)
    with pytest.raises(BackendError, match="cuEventCreate failed: out of memory"):
        device.fetch(target, (16,), np.float32)
    assert not api.pinned
    failing["cuMemFree"] = 1
    with pytest.raises(BackendError, match="cuMemFree failed"):
        device.free(target)
    failing.clear()
    device.close()  # frees what could not be freed before
    assert not api.memory


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("cuInit", 100, "cuInit failed: unknown error; see `blip2edge doctor`"),
        ("cuMemAlloc", OUT_OF_MEMORY, "cuMemAlloc failed: out of memory; if memory ran out, lower .*batch_size"),
        ("cuModuleLoadData", 209, "cuModuleLoadData failed: unknown error; make the copy again"),
    ],
)
def test_a_status_becomes_an_error(name: str, status: int, message: str) -> None:
    def work() -> None:
        _, device = opened(fails=lambda called: status if called == name else 0)
        device.allocate(8)

    with pytest.raises(BackendError, match=message) as caught:
        work()
    assert "\n" not in str(caught.value)


def test_a_failed_start_releases_the_context() -> None:
    api = FakeDriver([KERNEL], fails=lambda name: 2 if name == "cuStreamCreate" else 0)
    with pytest.raises(BackendError, match="cuStreamCreate failed"):
        DriverDevice(api)
    assert api.retained == 0


def test_a_kernel_that_the_cubin_lacks_is_named() -> None:
    api = FakeDriver([KERNEL])
    device = DriverDevice(api)
    device.load(CUBIN)
    launch = Launch(embed_kernel("__half"), (1, 1, 1), EmbedArguments())
    with pytest.raises(BackendError, match="cuModuleGetFunction failed: named symbol not found; make the copy again"):
        device.run(launch)
    with pytest.raises(BackendError, match="cuModuleLoadData failed"):
        device.load(b"no cubin")
    device.close()


def test_every_name_is_in_cuda_bindings_with_as_many_arguments() -> None:
    """The names that the device uses, and the simulation's signatures, against the installed package."""
    try:
        api = load_driver()
    except BackendError as error:
        pytest.skip(str(error))
    source = Path(inspect.getfile(module)).read_text()
    used = set(re.findall(r"\b_?api\.(\w+)", source))
    assert {"cuLaunchKernel", "cuGraphLaunch", "CUDA_MEMCPY2D"} <= used
    for name in used:
        assert hasattr(api, name), name
    for name in set(re.findall(r"\.(CU_\w+)", source)):
        kinds = [getattr(api, kind) for kind in used if hasattr(getattr(api, kind), "__members__")]
        assert any(name in kind.__members__ for kind in kinds), name
    for name, number in CUdevice_attribute.__members__.items():
        assert int(getattr(api.CUdevice_attribute, name)) == number
    for kind, name in (
        ("CUstream_flags", "CU_STREAM_NON_BLOCKING"),
        ("CUevent_flags", "CU_EVENT_DISABLE_TIMING"),
        ("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"),
        ("CUmemorytype", "CU_MEMORYTYPE_DEVICE"),
    ):
        assert int(getattr(getattr(api, kind), name)) == getattr(getattr(FakeDriver, kind), name)
    for name in sorted(one for one in used if one.startswith("cu")):
        (line,) = re.findall(rf"^{name}\((.*)\)", getattr(api, name).__doc__ or "", re.MULTILINE)[:1]
        wanted = len(inspect.signature(vars(FakeDriver)[name]).parameters) - 1
        assert len([part for part in line.split(",") if part.strip()]) == wanted, (name, line)
    copy = api.CUDA_MEMCPY2D()
    for field in re.findall(r"copy\.(\w+)", source):
        assert hasattr(type(copy), field), field
    copy.srcMemoryType = api.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.srcDevice, copy.WidthInBytes = 1 << 40, 3
    assert (int(copy.srcDevice), copy.WidthInBytes) == (1 << 40, 3)


def test_a_missing_package_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(BackendError, match=r"cuda-bindings is not installed .*\[cuda-decoder\]"):
        load_driver()


def test_a_library_that_does_not_load_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvrtc:
        @staticmethod
        def nvrtcVersion() -> None:  # noqa: N802 - a name of cuda-bindings, whose text this is
            raise RuntimeError(
                'Failure finding "a.so or b.so": No such file: a.so or b.so, No such file: a.so or b.so\n'
            )

    monkeypatch.setattr("importlib.import_module", lambda _: Nvrtc)
    with pytest.raises(BackendError, match="No such file") as caught:
        load_nvrtc()
    assert caught.value.problem == 'NVRTC does not load: Failure finding "a.so or b.so": No such file: a.so or b.so'


def test_cuda_bindings_takes_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call also goes to the installed package, which converts the arguments before it looks for the driver."""
    try:
        real = load_driver()
    except BackendError as error:
        pytest.skip(str(error))
    if nvidia_driver().version:
        pytest.skip("there is a driver, which would get the simulation's handles")
    api, names = FakeDriver([KERNEL]), set()

    class Both:
        def __getattr__(self, name: str) -> Any:
            simulated = getattr(api, name)
            if name == "CUDA_MEMCPY2D" or not name.startswith("cu"):
                return getattr(real, name) if name == "CUDA_MEMCPY2D" else simulated

            def call(*arguments: Any) -> Any:
                with pytest.raises(RuntimeError, match="driver library"):  # not TypeError
                    getattr(real, name)(*arguments)
                names.add(name)
                return simulated(*arguments)

            call.__name__ = name
            return call

    for kind in ("CUdevice_attribute", "CUstream_flags", "CUevent_flags", "CUstreamCaptureMode", "CUmemorytype"):
        monkeypatch.setattr(FakeDriver, kind, getattr(real, kind))
    device = DriverDevice(Both())
    device.load(CUBIN)
    launch, target = embedding(device, VALUES)
    run = Run(device, [launch])
    run.start()
    run.start()
    assert np.array_equal(device.fetch(target, VALUES.shape, np.float32)(), VALUES)
    device.copy_rows(target, 8, target + 64, 8, 4, 2)
    device.free(target)
    run.close()
    device.close()
    source = Path(inspect.getfile(module)).read_text()
    assert names == {name for name in re.findall(r"\b_?api\.(cu\w+)", source) if name != "cuGetErrorString"}
