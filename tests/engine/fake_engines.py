"""Simulates a machine with the GPU of ``fake_gpu.py``, and makes engines for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.engine.operators import VERSIONS
from blip2edge.engine.prepare import capacity_of, plans_of
from blip2edge.engine.profiles import profiles_of
from blip2edge.runtime.backends.engine_files import CONSTANT, EngineRecord, EngineSet, fingerprint
from blip2edge.runtime.backends.probe import Driver, Gpu
from blip2edge.runtime.tensorrt import backend as tensorrt_backend
from tests.engine.fake_gpu import VERSION, FakeCuda, fake_tensorrt, write_fake_engine


class Patcher(Protocol):
    """What ``pytest.MonkeyPatch`` and :class:`tests.engine.host_engines.Patches` have in common."""

    def setattr(self, *arguments: Any) -> None:
        """Replaces an attribute: an object, a name and a value, or a dotted name and a value."""


DRIVER = Driver("12.6", (Gpu("Orin", 87),))


def write_engines(
    path: Path, root: Path, capacity: int | None = None, max_rows: int | None = None, decoder: str = CONSTANT
) -> Path:
    """A bundle's engines, as ``build`` writes them but for their contents."""
    bundle = Bundle.open(path)
    directory = root / "x"
    directory.mkdir(parents=True)
    records = {}
    for plan in plans_of(bundle, VERSIONS["rtx"], capacity=capacity, most_rows=max_rows, decoder=decoder):
        model = plan.model()
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        ir.save(model, directory / f"{plan.name}.onnx")
        profiles = [dict(profile.shapes(plan.spec)) for profile in profiles_of(plan.spec, plan.prompt)]
        names = tuple(profile.name for profile in profiles_of(plan.spec, plan.prompt))
        file = directory / f"{plan.name}.engine"
        write_fake_engine(file, directory / f"{plan.name}.onnx", plan.spec, profiles)
        records[plan.name] = EngineRecord(plan.spec, FileRecord.of(file), "fp32", names, 0.0, (), {}, None, plan.form)
    mark = fingerprint("tensorrt", VERSION, bundle.sha256, ())
    slots = capacity_of(bundle.manifest, capacity)
    EngineSet(mark.to_json(), ("--capacity", str(slots)), slots, records, directory).write()
    return directory


def plug_in(monkeypatch: Patcher, integrated: bool = False, streamed: bool = True) -> tuple[FakeCuda, Any]:
    """Puts the stand-ins in the places of the driver, CUDA and TensorRT."""
    cuda = FakeCuda(integrated)
    trt = fake_tensorrt(cuda, VERSION, streamed)
    monkeypatch.setattr("blip2edge.runtime.backends.probe.nvidia_driver", lambda: DRIVER)
    monkeypatch.setattr(tensorrt_backend, "load_cuda", lambda: cuda)
    monkeypatch.setattr(tensorrt_backend, "load_tensorrt", lambda target: trt)
    return cuda, trt
