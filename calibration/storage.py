"""Writes the weights of a changed graph to its data file, one tensor at a time, and computes the file's hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.trust.integrity import FileRecord

LARGE = 1 << 16  # bytes from which a tensor begins on a page, so that a runtime can memory-map it
PAGE, LINE = 4096, 64  # bytes


class TensorStore(Protocol):
    """Stores the initializers of a changed graph."""

    def add(self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.TensorProtocol:
        """Stores a new tensor; returns the tensor for the changed graph.

        Args:
            name: Name of the initializer.
            array: Values of the tensor.
            dtype: Type of the tensor; None for the array's dtype.
        """
        ...

    def copy(self, name: str, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """Stores an unchanged tensor of the original graph; returns the tensor for the changed graph."""
        ...


class InMemoryStore:
    """Keeps new tensors in memory, and unchanged tensors in the original files, for a graph that is only run."""

    def add(self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.TensorProtocol:
        """Makes a tensor in memory from the values of ``array``; returns it."""
        return ir.tensor(np.asarray(array, order="C"), dtype=dtype, name=name)

    def copy(self, name: str, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """Returns the tensor unchanged: it refers to the file of the original bundle (:class:`TensorStore`)."""
        del name
        return tensor


class DataFile:
    """A file of external tensors, to which tensors are appended one after the other.

    Args:
        path: The file, in the directory of the graph that refers to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> DataFile:  # noqa: PYI034 - typing.Self is not in Python 3.10
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    def add(self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.ExternalTensor:
        """Appends a tensor.

        Args:
            name: Name of the initializer.
            array: Values of the tensor. For packed 4-bit values, use :meth:`add_bytes`.
            dtype: Type of the tensor; None for the array's dtype.

        Returns:
            A tensor that refers to the values in the file.
        """
        kind = ir.DataType.from_numpy(array.dtype) if dtype is None else dtype
        return self.add_bytes(name, np.ascontiguousarray(array).tobytes(), kind, array.shape)

    def add_bytes(
        self, name: str, data: bytes | memoryview, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.ExternalTensor:
        """Appends a tensor that is given as bytes: little-endian, two 4-bit values per byte.

        Returns:
            A tensor that refers to the bytes in the file.
        """
        padding = bytes(-self._offset % (PAGE if len(data) >= LARGE else LINE))
        for piece in (padding, data):
            self._file.write(piece)
            self._digest.update(piece)
        start = self._offset + len(padding)
        self._offset = start + len(data)
        return ir.ExternalTensor(
            self.path.name,
            start,
            len(data),
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )

    def copy(self, name: str, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        """Appends the bytes of a tensor from another file; returns a tensor that refers to this file."""
        return self.add_bytes(name, tensor.tobytes(), tensor.dtype, tuple(tensor.shape.numpy()))

    @property
    def record(self) -> FileRecord:
        """Hash and size of the bytes written so far."""
        return FileRecord(self._digest.hexdigest(), self._offset)
