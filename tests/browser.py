"""A Chromium without a window, driven over its debugging pipe (no further package is needed)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_S = 60.0

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--remote-debugging-pipe", "--disable-dev-shm-usage"),
)


class Page:
    """A page of the browser.

    Args:
        commands: File descriptor to which commands are written.
        events: File descriptor from which answers and events are read.
    """

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = commands, events
        self._rest, self._number, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Runs a command of the DevTools protocol and returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._events, 1 << 16)
                assert part, "the browser has ended"
                self._rest += part
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def value(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str) -> Any:
        """Waits until an expression is true, and returns it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.value(script)):
            assert time.monotonic() < deadline, self.value("document.body.innerText")
            time.sleep(0.05)
        return value


@contextmanager
def browser(profile: Path, *flags: str) -> Iterator[Page]:
    """A page of a new browser.

    Args:
        profile: An empty folder for its data.
        *flags: Further flags.
    """
    assert CHROMIUM is not None
    commands_out, commands = os.pipe()
    events, events_in = os.pipe()

    script = f'exec "$@" 3<&{commands_out} 4>&{events_in}'
    words = ["bash", "-c", script, "chromium", CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags]
    process = subprocess.Popen(
        words, pass_fds=(commands_out, events_in), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    os.close(commands_out)
    os.close(events_in)
    try:
        yield Page(commands, events)
    finally:
        os.close(commands)
        os.close(events)
        process.kill()
        process.wait()
