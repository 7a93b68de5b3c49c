"""ONNX Runtime with tensors that stay on the device: what a graph gives a later one is never brought to the host.

A :class:`DeviceArray` stands for such a tensor. Taking rows and cutting slots, as decoding does at every step of a
beam search, run there as well; whatever else is asked of it brings a copy to the host.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from blip2edge.runtime.session import Array

# Two graphs of one node each on float32 [b, h, s, d], IR version 8, opset 17, made with onnx 1.23: Gather(x, rows) on
# axis 0, and Slice(x, first, end, axis). value_info writes the type and the shape's length as the bytes below.
GATHER = base64.b64decode(
    "CAg6fQohCgF4CgRyb3dzEgF5IgZHYXRoZXIqCwoEYXhpcxgAoAECEgFrWh8KAXgSGgoYCAESFAoDEgFiCgMSAWgKAxIBcwoDEgFkWhMKBHJv"
    "d3MSCwoJCAcSBQoDEgFuYh8KAXkSGgoYCAESFAoDEgFCCgMSAUgKAxIBUwoDEgFEQgQKABAR"
)
SLICE = base64.b64decode(
    "CAg6ogEKHwoBeAoFZmlyc3QKA2VuZAoEYXhpcxIBeSIFU2xpY2USAWtaHwoBeBIaChgIARIUCgMSAWIKAxIBaAoDEgFzCgMSAWRaEwoFZmly"
    "c3QSCgoICAcSBAoCCAFaEQoDZW5kEgoKCAgHEgQKAggBWhIKBGF4aXMSCgoICAcSBAoCCAFiHwoBeRIaChgIARIUCgMSAUIKAxIBSAoDEgFT"
    "CgMSAURCBAoAEBE="
)
FLOAT32_4D, FLOAT16_4D = b"\x08\x01\x12\x14", b"\x08\x0a\x12\x14"
SLOTS = 2  # the axis of [B, H, P, d] that is cut

Place = tuple[str, int]
"""A device by its name in ONNX Runtime, and its number."""


class DeviceArray:
    """A tensor ``[B, H, P, d]`` on the device.

    Args:
        value: ONNX Runtime's ``OrtValue``.
        small: Runs one of the two small graphs there.
    """

    def __init__(self, value: Any, small: Callable[[bytes, Mapping[str, Any]], Any]) -> None:
        self.value = value
        self._small = small
        self.shape: tuple[int, ...] = tuple(value.shape())
        self.ndim = len(self.shape)
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.dtype = np.dtype(kinds[value.data_type()])

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array: Array = self.value.numpy()
        return array if dtype is None else array.astype(dtype)

    def copy(self) -> Array:
        """The values on the host, to be written to."""
        return np.array(self.value.numpy())

    def __getitem__(self, key: Any) -> DeviceArray | Array:
        """Rows by their numbers, or a piece of the slots, as another tensor on the device."""
        if isinstance(key, np.ndarray) and key.ndim == 1 and key.dtype.kind in "iu":
            return self._run(GATHER, {"rows": key.astype(np.int64)})
        everything = slice(None)
        if isinstance(key, tuple) and len(key) == SLOTS + 1 and key[:SLOTS] == (everything, everything):
            first, end, step = key[SLOTS].indices(self.shape[SLOTS])
            if step == 1:
                bounds = {"first": first, "end": max(first, end), "axis": SLOTS}
                return self._run(SLICE, {name: np.array([at], np.int64) for name, at in bounds.items()})
        part: Array = self.value.numpy()[key]
        return part

    def _run(self, graph: bytes, inputs: Mapping[str, Array]) -> DeviceArray:
        if self.dtype == np.float16:
            graph = graph.replace(FLOAT32_4D, FLOAT16_4D)
        return DeviceArray(self._small(graph, {"x": self.value, **inputs}), self._small)


class BoundSession:
    """A graph whose inputs and outputs are bound where they are; it follows the session protocol.

    Args:
        onnxruntime: The package.
        path: The ``.onnx`` file.
        options: ONNX Runtime's session options.
        providers: Execution providers, best first.
        place: Where what stays is kept.
        kept: Whether an output of that name stays on the device.
    """

    def __init__(
        self,
        onnxruntime: Any,
        path: str,
        options: Any,
        providers: Sequence[Any],
        place: Place,
        kept: Callable[[str], bool],
    ) -> None:
        self._onnxruntime, self._place, self._kept = onnxruntime, place, kept
        self._session = onnxruntime.InferenceSession(path, options, providers=list(providers))
        self._providers = list(providers)
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._small = cache(self._open_small)

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """See :class:`blip2edge.runtime.session.Session`; inputs and outputs may be on the device."""
        names = list(self.output_names if outputs is None else outputs)
        binding = self._session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, DeviceArray):
                binding.bind_ortvalue_input(name, value.value)
            else:
                binding.bind_ortvalue_input(name, self._value(np.ascontiguousarray(value)))
        for name in names:
            device, number = self._place if self._kept(name) else ("cpu", 0)
            binding.bind_output(name, device, number)
        self._session.run_with_iobinding(binding)
        values = zip(names, binding.get_outputs(), strict=True)
        return {
            name: DeviceArray(value, self._run_small) if self._kept(name) else value.numpy()
            for name, value in values
        }

    def close(self) -> None:
        """See :class:`blip2edge.runtime.session.Session`."""
        del self._session
        self._small.cache_clear()

    def provider(self) -> str:
        """The provider that comes first."""
        return str(self._session.get_providers()[0])

    def _open_small(self, graph: bytes) -> Any:
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return self._onnxruntime.InferenceSession(graph, options, providers=self._providers)

    def _run_small(self, graph: bytes, inputs: Mapping[str, Any]) -> Any:
        session = self._small(graph)
        binding = session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        binding.bind_output("y", *self._place)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]
