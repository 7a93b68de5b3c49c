"""A Chromium without a window, driven over its debugging pipe (no further package is needed)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_S = 60.0

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--remote-debugging-pipe", "--disable-dev-shm-usage"),
)

KEYS = {"Tab": 9, "Enter": 13}
"""Codes of keys for :meth:`Page.press`."""


class Pipe:
    """The connection to a browser.

    Args:
        commands: File descriptor to which commands are written.
        events: File descriptor from which answers and events are read.
    """

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = commands, events
        self._rest, self._number = b"", 0

    def call(self, session: str, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Runs a command of the DevTools protocol and returns its result; events are ignored."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
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


class Page:
    """A page of the browser with cookies and storage of its own.

    Args:
        pipe: The browser.
    """

    def __init__(self, pipe: Pipe) -> None:
        self._pipe, self._session = pipe, ""
        self._context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    @contextmanager
    def another(self) -> Iterator[Page]:
        """Another page of the same browser, which is closed at the end."""
        page = Page(self._pipe)
        try:
            yield page
        finally:
            self._pipe.call("", "Target.disposeBrowserContext", {"browserContextId": page._context})

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Runs a command of the DevTools protocol on this page and returns its result."""
        return self._pipe.call(self._session, method, parameters)

    def value(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str) -> Any:
        """Waits until an expression is true, and returns it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.value(script)):
            assert time.monotonic() < deadline, (script, self.value("document.body.innerText"))
            time.sleep(0.02)
        return value

    def open(self, address: str, loaded: str = "true") -> None:
        """Opens an address, and waits until it is loaded and an expression is true."""
        self.call("Page.navigate", url=address)
        plain = json.dumps(address.partition("#")[0])
        self.until(f"location.href.startsWith({plain}) && document.readyState === 'complete' && {loaded}")

    def choose(self, selector: str, files: Iterable[Path]) -> None:
        """Chooses files in a file input."""
        node = self.call("DOM.getDocument")["root"]["nodeId"]
        field = self.call("DOM.querySelector", nodeId=node, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=field, files=[str(file) for file in files])

    def press(self, key: str) -> None:
        """Presses a key of :data:`KEYS`."""
        text = {"text": "\r"} if key == "Enter" else {}
        named: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def screenshot(self) -> bytes:
        """The visible part of the page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


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
        yield Page(Pipe(commands, events))
    finally:
        os.close(commands)
        os.close(events)
        process.kill()
        process.wait()


def fake_camera(path: Path, picture: Any) -> tuple[str, ...]:
    """Flags of a browser whose camera shows a picture.

    Args:
        path: Where its frame is written, with the suffix ``.y4m``.
        picture: A Pillow picture with even sides.
    """
    width, height = picture.size
    luma, *chroma = picture.convert("YCbCr").split()
    planes = [luma, *(plane.resize((width // 2, height // 2)) for plane in chroma)]
    head = f"YUV4MPEG2 W{width} H{height} F10:1 Ip A1:1 C420jpeg\nFRAME\n"
    path.write_bytes(head.encode() + b"".join(plane.tobytes() for plane in planes))
    camera = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    return (*camera, f"--use-file-for-fake-video-capture={path}")
