"""Cores that two threads share: work that each would spread over all of them goes one at a time.

Two pools of threads that each are as many as the cores wait for each other at every operator, and a stream of pictures
then takes longer than one picture after the other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that serves in the order in which it was asked for, so that a loop that takes it again waits its turn."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A turn: from when all who came before are done, to the end of the block."""
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
