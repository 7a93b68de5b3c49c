"""A lock that threads acquire in the order of their requests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class FairLock:
    """A lock that threads acquire in the order of their requests.

    With an ordinary lock, a thread that acquires the lock in a loop can keep all other threads waiting.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Acquires the lock, and releases it at the end of the ``with`` block."""
        mark = object()
        with self._changed:
            self._line.append(mark)
            self._changed.wait_for(lambda: self._line[0] is mark)
        try:
            yield
        finally:
            with self._changed:
                self._line.popleft()
                self._changed.notify_all()
