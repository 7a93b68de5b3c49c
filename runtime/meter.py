"""How much memory a process takes: what it alone holds, not the files it has mapped."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
INTERVAL = 0.02  # seconds between two looks


def resident_bytes() -> int:
    """Anonymous and shared memory of this process now, in bytes; 0 where the system does not tell."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(value.split()[0]) * 1024 for value in fields.values())


class MemoryMeter:
    """Samples :func:`resident_bytes` while it is entered; ``peak`` is the largest value seen."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryMeter:  # noqa: PYI034  (typing.Self is not in Python 3.10)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, resident_bytes())
