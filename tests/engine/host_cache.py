"""The constant-shape decoder's cache in NumPy arrays, so that its graph can be tested in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CacheSpec
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.decoding.state import stacked


class HostCache:
    """A cache in the host's memory; it follows the protocol ``FixedCache`` of ``fixed.py``.

    Args:
        session: The loaded constant-shape graph.
        cache: Its keys and values.
        capacity: C.
        dtype: Of keys and values.
        batch: Rows B.
        context: What the decoder attends to besides its text, by the inputs' names.
    """

    def __init__(
        self,
        session: Session,
        cache: CacheSpec,
        capacity: int,
        dtype: np.dtype[Any],
        batch: int,
        context: Mapping[str, Array],
    ) -> None:
        self._session = session
        self._cache = cache
        self._context = dict(context)
        shape = (batch, cache.num_heads, capacity, cache.head_dim)
        self._arrays = {name: np.zeros(shape, dtype) for name in cache.past_names()}

    def run(self, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        outputs = self._session.run({**inputs, **self._arrays, **self._context})
        names = zip(self._cache.past_names(), self._cache.present_names(), strict=True)
        self._arrays = {past: outputs[present] for past, present in names}
        logits: NDArray[np.float32] = outputs["logits"]
        return logits

    def select(self, rows: NDArray[np.int64]) -> None:
        self._arrays = {name: array[rows] for name, array in self._arrays.items()}
        self._context = {name: array[rows] for name, array in self._context.items()}

    def shift(self, row: int, by: int, length: int) -> None:
        source = slice(max(-by, 0), length)
        target = slice(max(by, 0), length + by)
        for array in self._arrays.values():
            array[row, :, target] = array[row, :, source].copy()

    def append(self, other: HostCache) -> None:
        self._arrays = {name: np.concatenate([array, other._arrays[name]]) for name, array in self._arrays.items()}
        self._context = {name: stacked(name, array, other._context[name]) for name, array in self._context.items()}
