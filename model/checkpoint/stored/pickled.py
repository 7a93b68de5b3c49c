"""Reads pickled files of tensors. No code in them is executed."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blip2edge.errors import CheckpointError, one_line, some
from blip2edge.reading import reading

if TYPE_CHECKING:
    from typing_extensions import Self

_GLOBAL = re.compile(r"GLOBAL (\S+)")


class Ignored:
    """Stands for an object of a pickled file, if the object is no tensor; the content of the object is dropped."""

    def __new__(cls, *_: Any) -> Self:
        """Creates the object; the arguments of the replaced class are ignored."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def read_pickled(path: Path) -> dict[str, Any]:
    """Reads the top-level mapping of a file that ``torch.save`` wrote; tensors are mapped into memory if possible.

    Objects of other classes than torch's (``argparse.Namespace``, numpy's scalars, OmegaConf's configs) become
    :class:`Ignored`: their classes are not imported.

    Raises:
        CheckpointError: The file is broken, holds objects that cannot be skipped, or does not hold a mapping.
    """
    others: list[str] = []
    with reading(path, "a file of tensors", CheckpointError, explain=lambda error: _unreadable(path, error, others)):
        zipped = zipfile.is_zipfile(path)
        if zipped:  # only the names of the classes are read here
            _check_zip(path)
            others += sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with torch.serialization.safe_globals([(Ignored, name) for name in others]):
            if zipped:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                with _BoundedReader(path) as file:
                    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'{path} is no checkpoint of LAVIS: expected {{"model": tensors by name}}, found {type(content).__name__}',
            save_again(path),
        )
    return {str(name): value for name, value in content.items()}


class _BoundedReader(io.BufferedReader):
    """A file reader that reserves no more memory than the file's size, even if the file declares a longer string."""

    def __init__(self, path: Path) -> None:
        self._size = path.stat().st_size
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, self._size))


def _check_zip(path: Path) -> None:
    """Raises ValueError for a compressed archive.

    ``torch.save`` does not compress, and a small compressed file could need any amount of memory.
    """
    with zipfile.ZipFile(path) as archive:
        packed = [file for file in archive.infolist() if file.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{packed[0].filename!r:.60} in the archive is compressed, which torch.save does not do")


def save_again(path: Path) -> str:
    """Returns the advice for a file that holds more than tensors: a line of Python that saves only the tensors."""
    return f'save its tensors alone where it was trained: torch.save({{"model": model.state_dict()}}, "{path.name}")'


def _unreadable(path: Path, error: Exception, others: list[str]) -> CheckpointError:
    """Makes the error for a file that torch cannot load, without the advice in torch's message.

    Args:
        path: The file.
        error: torch's error.
        others: Classes in the file that are not torch's.
    """
    found = _GLOBAL.search(str(error))
    classes = [found[1].rstrip(".")] if found else others
    problem = f"{path} cannot be read as a file of tensors"
    if classes:
        return CheckpointError(
            f"{problem}: it holds objects of {some(classes)}, whose code is not run", save_again(path)
        )
    if isinstance(error, pickle.UnpicklingError):
        return CheckpointError(
            f"{problem}: it is no file of torch.save, or holds more than tensors",
            f"copy or download it again, or {save_again(path)}",
        )
    reason = one_line(error)
    return CheckpointError(f"{path} cannot be read as a file of tensors ({reason})", "copy or download it again")
