"""Waits for what other threads do."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 30.0  # that no test should need


def until(is_true: Callable[[], object]) -> None:
    """Waits until something is true.

    Raises:
        AssertionError: It is not true after :data:`PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
