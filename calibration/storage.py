"""The weights of a new graph: streamed to the file beside it, a tensor at a time, and sealed on the way."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.integrity import FileRecord

LARGE = 1 << 16  # bytes from which a tensor begins on a page, so that a runtime can map it
PAGE, LINE = 4096, 64  # bytes


class TensorStore(Protocol):
    """Where a changed graph's initializers go."""

    def add(self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.TensorProtocol:
        """Takes a new tensor; what the graph refers to from now on."""
        ...

    def copy(self, name: str, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """Takes a tensor of the parent's that stays as it is."""
        ...


class Memory:
    """New tensors in the graph itself, the others where they are: for a graph that is run once and written nowhere."""

    def add(self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.TensorProtocol:
        """See :class:`TensorStore`."""
        return ir.tensor(np.asarray(array, order="C"), dtype=dtype, name=name)

    def copy(self, name: str, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """See :class:`TensorStore`."""
        del name
        return tensor


class DataFile:
    """A file of tensors that is written from front to end.

    Args:
        path: The file; it lies beside the graph that will refer to it.
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
            name: Of the initializer.
            array: Its values; of packed 4-bit types the bytes, with ``dtype`` and the logical shape given by
                :meth:`add_bytes`.
            dtype: Of the tensor; None for that of the array.

        Returns:
            The tensor that refers to its place in the file.
        """
        kind = ir.DataType.from_numpy(array.dtype) if dtype is None else dtype
        return self.add_bytes(name, np.ascontiguousarray(array).tobytes(), kind, array.shape)

    def add_bytes(
        self, name: str, data: bytes | memoryview, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.ExternalTensor:
        """Appends a tensor that is given as its bytes (little-endian, 4-bit values packed in pairs)."""
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
        """Appends a tensor that lies in another file."""
        return self.add_bytes(name, tensor.tobytes(), tensor.dtype, tuple(tensor.shape.numpy()))

    @property
    def record(self) -> FileRecord:
        """The seal of what has been written."""
        return FileRecord(self._digest.hexdigest(), self._offset)
