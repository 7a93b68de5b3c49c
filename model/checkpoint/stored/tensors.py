"""Reads the tensors of a directory's safetensors files, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from blip2edge.bundle.fields import is_file_name
from blip2edge.errors import CheckpointError
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.checkpoint.stored.layouts import INDEX, WEIGHTS, no_weights
from blip2edge.reading import reading

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The dtypes that a weight can have, by safetensors' names. Tensors of other dtypes are quantised, or no weights."""

DTYPE_NAMES = {"I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}


class TensorFiles:
    """The tensors of a directory's safetensors files, mapped into memory and read one by one.

    Args:
        directory: The directory of the files.
        rename: Function that converts a tensor's name in the files to the name in the weight tables.

    Attributes:
        shapes: Shapes by name.
        dtypes: dtypes by name, as safetensors writes them: ``F32``, ``BF16``, ``I8``.

    Raises:
        CheckpointError: There are no weights, a shard is missing, a file is truncated, or a name occurs twice.
    """

    def __init__(self, directory: Path, rename: Callable[[str], str] = str) -> None:
        self.directory = directory
        self._files = ExitStack()
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in shards(directory):
            self.add(path, rename)

    def add(self, path: Path, rename: Callable[[str], str]) -> None:
        """Maps a further file into memory, and adds its tensors under their new names.

        Raises:
            CheckpointError: The file is missing or truncated, or two of its tensors get the same name.
        """
        file = self._files.enter_context(open_safetensors(path))
        stored_as: dict[str, str] = {}
        for stored in file.keys():  # noqa: SIM118  (a safe_open handle, which does not iterate)
            name = rename(stored)
            if name in stored_as:
                raise CheckpointError(
                    f"{path} holds one tensor under two names, {stored_as[name]} and {stored}",
                    "save it again with one version of transformers",
                )
            stored_as[name] = stored
            part = file.get_slice(stored)
            self.put(name, tuple(part.get_shape()), partial(_stored, file, stored, part.get_dtype()))
            self.dtypes[name] = part.get_dtype()

    def put(self, name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> None:
        """Adds a tensor, or replaces the tensor of this name.

        Args:
            name: Name of the tensor in the weight tables.
            shape: Shape of the tensor.
            read: Function that returns the tensor; called at each read.
        """
        self._readers[name] = read
        self.shapes[name] = shape
        self.dtypes.pop(name, None)

    def alias(self, name: str, other: str) -> None:
        """Makes ``name`` another name of the tensor ``other``."""
        self.put(name, self.shapes[other], self._readers[other])

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Returns the function that reads the tensor ``name``.

        The function returns the same tensor even if :meth:`put` replaces the tensor of this name later.
        """
        return self._readers[name]

    def read(self, names: Iterable[str]) -> Tensor:
        """Reads the tensors ``names`` and concatenates them along dimension 0.

        If there is only one name, the result is a view of the mapped file if possible.

        Raises:
            CheckpointError: A tensor has a dtype that no parameter can have.
        """
        parts = [self._readers[name]() for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def same(self, one: str, other: str) -> bool:
        """Returns whether ``one`` and ``other`` are names of the same stored tensor. No weight is read."""
        return self._readers[one] is self._readers[other]

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same values; if their dtypes differ, both are cast to float32 first."""
        if self.same(one, other):
            return True
        if self.shapes[one] != self.shapes[other]:
            return False
        first, second = self.read([one]), self.read([other])
        if first.dtype == second.dtype:
            return torch.equal(first, second)
        rows = zip(torch.split(first, 1024), torch.split(second, 1024), strict=True)
        return all(torch.equal(a.float(), b.float()) for a, b in rows)

    def lay_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces each tensor of the files whose name is in ``tensors`` by the tensor in ``tensors``."""
        for name, tensor in tensors.items():
            self.put(name, tuple(tensor.shape), partial(_itself, tensor))

    def folder(self) -> Path:
        """Makes an empty temporary folder, which :meth:`close` removes."""
        return Path(self._files.enter_context(TemporaryDirectory()))

    def close(self) -> None:
        """Unmaps the files."""
        self._readers.clear()
        self._files.close()


def open_safetensors(path: Path) -> Any:
    """Maps a safetensors file into memory.

    Raises:
        CheckpointError: The file is missing or truncated.
    """
    with reading(path, "a whole safetensors file", CheckpointError, "copy or download it again"):
        return safe_open(path, framework="pt")


def _stored(file: Any, name: str, dtype: str) -> Tensor:
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"the tensor {name} is stored as {dtype_name(dtype)}, but weights must be in floating point",
            "save the checkpoint in float32, float16 or bfloat16",
        )
    with reading(name, "a tensor", CheckpointError, "copy or download the file again"):
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def dtype_name(dtype: str) -> str:
    """Returns the usual name of a safetensors dtype: ``int8`` for ``I8``, ``float8_e4m3`` for ``F8_E4M3``."""
    return DTYPE_NAMES.get(dtype, dtype.lower().replace("f8", "float8").replace("f4", "float4"))


def shards(directory: Path) -> list[Path]:
    """Returns the safetensors files of a directory.

    Raises:
        CheckpointError: The directory has no safetensors files, its index is broken, or a shard is missing.
    """
    index = directory / INDEX
    single = directory / WEIGHTS
    if single.is_file():
        return [single]
    if not index.is_file():
        raise no_weights(directory)
    weight_map = read_checkpoint_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files", "copy or download it again")
    outside = [name for name in weight_map.values() if not is_file_name(name)]
    if outside:
        raise CheckpointError(
            f"{index}: expected names of files in the same directory, got {outside[0]!r:.60}",
            "copy or download it again",
        )
    files = [directory / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{directory} lacks {', '.join(missing)}", "copy or download the missing shards")
    return files
