"""The token table: mapped into memory, so that a step reads one row a token and nothing is loaded."""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.errors import BundleError
from blip2edge.runtime.session import NUMPY_DTYPES, Array

HEADER_LENGTH = 8  # bytes: a little-endian unsigned integer, the length of the JSON header behind it
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class TokenTable:
    """Rows of a ``[V, D]`` tensor in a safetensors file.

    The format is read here and not by the safetensors package, which a device then does not need:
    https://github.com/huggingface/safetensors, "Format".

    Args:
        path: The file.
        tensor: The tensor's name.
        dtype: dtype of what :meth:`rows` gives.

    Raises:
        BundleError: Not a safetensors file, no such tensor, or a dtype that is not float.
    """

    def __init__(self, path: Path, tensor: str, dtype: str) -> None:
        self._dtype = NUMPY_DTYPES[dtype]
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(content[:HEADER_LENGTH], "little")
            entry = json.loads(content[HEADER_LENGTH : HEADER_LENGTH + length])[tensor]
            start, end = entry["data_offsets"]
            stored = DTYPES[entry["dtype"]]
            rows, width = entry["shape"]
            offset = HEADER_LENGTH + length + start
            table = np.frombuffer(content, stored, count=(end - start) // stored.itemsize, offset=offset)
            self._table: Array = table.reshape(rows, width)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{path} is not a safetensors file with a float tensor {tensor} ({error})",
                "export the checkpoint again",
            ) from error
        self._is_bf16 = entry["dtype"] == "BF16"

    @property
    def num_rows(self) -> int:
        """V."""
        return int(self._table.shape[0])

    @property
    def width(self) -> int:
        """D."""
        return int(self._table.shape[1])

    def rows(self, token_ids: Sequence[int] | NDArray[np.int64]) -> Array:
        """The embeddings of some tokens.

        Args:
            token_ids: N ids below V.

        Returns:
            ``[N, D]``, a copy.
        """
        rows = self._table[np.asarray(token_ids, np.int64)]
        if self._is_bf16:  # the upper half of a float32
            return (rows.astype(np.uint32) << 16).view(np.float32).astype(self._dtype)
        return rows.astype(self._dtype, copy=False)
