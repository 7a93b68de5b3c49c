"""Maps the dtype names of the schema to NumPy dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.float32),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int8": np.dtype(np.int8),
    "bool": np.dtype(np.bool_),
}
"""NumPy dtype of the arrays that a session takes and returns, by the schema's name of the dtype.

NumPy has no bfloat16. Its values are passed as float32, which represents each of them exactly.
"""
