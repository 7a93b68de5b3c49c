"""The backends ``tensorrt`` and ``rtx``, which run a bundle's engines.

The code is tested with a simulation of CUDA and TensorRT on the CPU. It was not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.bundle.token_table import TokenTable
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import BackendError, option
from blip2edge.runtime.backends import probe
from blip2edge.runtime.backends.base import Session, closed_graph
from blip2edge.runtime.backends.engine_files import (
    STEP,
    EngineRecord,
    EngineSet,
    engine_folders,
    find_engines,
    fingerprint,
    no_engines,
)
from blip2edge.runtime.tensorrt.cuda import Cuda, load_cuda
from blip2edge.runtime.tensorrt.kv_cache import DeviceDecoder
from blip2edge.runtime.tensorrt.session import Device, TrtSession, load_tensorrt
from blip2edge.runtime.tensorrt.workspace import Engines

KERNELS = "kernels"
"""Folder in the user's cache for the kernels that TensorRT for RTX compiles. They are machine code whose hash is not
recorded, so they are never stored in a bundle, which may come from another machine."""


class EngineOpener:
    """Opens a bundle's engines, after checking that this machine can run them.

    Args:
        bundle: An opened bundle.
        target: ``tensorrt`` or ``rtx``.

    Raises:
        EngineError: TensorRT is missing or too old, there is no GPU, or the engines were built for another machine.
        BackendError: There is no driver, or cuda-python is missing.
    """

    def __init__(self, bundle: Bundle, target: str) -> None:
        if not engine_folders(bundle):
            raise no_engines(bundle, target)
        trt = load_tensorrt(target)
        driver = probe.nvidia_driver()  # first: without a driver, opening an engine can end the process
        if not driver.version:
            other = f"use {option('backend')} cpu"
            if bundle.manifest.engines_of:
                other = "use the bundle that the engines were built from, with its graphs"
            raise BackendError(
                f"there is no working NVIDIA driver here ({driver.problem})",
                f"run these engines on a machine with an NVIDIA GPU, or {other}; see `blip2edge doctor`",
            )
        here = fingerprint(target, str(trt.__version__), bundle.sha256, ())
        self._bundle = bundle
        self._set: EngineSet = find_engines(bundle, here)
        self._device = Device(trt, Cuda(load_cuda()), _kernels(bundle, self._set.directory.name))
        self._decoding: list[Engines] = []

    def close(self) -> None:
        """Frees the memory of the engines; close the sessions of the engines first."""
        for engines in self._decoding:
            engines.close()
        self._device.close()

    def __call__(self, graph: str) -> Session:
        """Loads a graph's engine.

        Raises:
            EngineError: There is no engine for this graph, or TensorRT cannot load it.
            BundleIntegrityError: The engine's file was changed.
        """
        record = self._set.record(graph)
        engine = self._open(graph)
        if graph != DECODER:
            return TrtSession(self._device, engine, record)
        return DecoderSession(self._device, engine, record, partial(self._engines, engine, record))

    def _engines(self, decoder: object, record: EngineRecord) -> Engines:
        """Opens the engine that chooses tokens; returns an object with this engine and the decoder's engine.

        Raises:
            BackendError: ``bundle.json`` describes no KV cache.
        """
        cache = self._bundle.manifest.cache
        if cache is None:
            raise BackendError(
                f"{self._bundle.path} has a decoder, but its bundle.json describes no KV cache",
                "export the checkpoint again",
            )
        step = self._open(STEP), self._set.record(STEP)
        engines = Engines(self._device, decoder, record, *step, cache, self._set.capacity)
        self._decoding.append(engines)
        return engines

    def _open(self, name: str) -> object:
        host_code = bool(self._set.fingerprint.get("version_compatible"))
        return self._device.open(self._set.file(name, self._bundle.checked), host_code=host_code)


def _kernels(bundle: Bundle, engines: str) -> Path | None:
    """Returns the path of the file in which the compiled kernels are stored; None without a home directory.

    ``engines``: name of the folder with the engines.
    """
    try:
        return cache_directory() / KERNELS / f"{bundle.sha256[:16]}-{engines}.cache"
    except RuntimeError:
        return None


class DecoderSession(TrtSession):
    """The loaded engine of the decoder; :meth:`decoder` adds the KV cache and the engine that chooses tokens.

    Args:
        device: The device that the engine runs on.
        engine: The deserialised engine.
        record: The engine's record in ``engine.json``.
        engines: Opens the engine that chooses tokens; returns an object with both engines.
    """

    def __init__(self, device: Device, engine: object, record: EngineRecord, engines: Callable[[], Engines]) -> None:
        super().__init__(device, engine, record, device.decoding)
        self._engines = engines

    def decoder(self, table: TokenTable) -> DeviceDecoder:
        """Makes the decoder that runs on this engine; ``table`` is the bundle's token embedding table."""
        if self.closed:
            raise closed_graph()
        return DeviceDecoder(self._engines(), table)
