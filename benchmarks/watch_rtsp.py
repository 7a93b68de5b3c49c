"""Runs ``blip2edge watch`` on a generated RTSP stream that is interrupted, and measures how ``watch`` recovers.

    python benchmarks/watch_rtsp.py BUNDLE --json benchmarks/results/watch-rtsp.json

The server is GStreamer's (Debian: gstreamer1.0-plugins-ugly gir1.2-gst-rtsp-server-1.0 python3-gi). It shows the
pictures of examples/pictures in turn as H.264. There are two kinds of interruptions:

- killed: the server is killed, and started again after some seconds; connections are reset.
- stalled: the server is stopped (SIGSTOP) and continues later; connections stay open, as if a cable was pulled.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reporting import ROOT, bundle_path, parser_of, write_result

from blip2edge.cli import run_script

PICTURES = ROOT / "examples" / "pictures"
SERVER = """
import sys, gi
gi.require_version("Gst", "1.0"); gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer(); server.set_service(sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory(); factory.set_launch(sys.argv[2]); factory.set_shared(True)
server.get_mount_points().add_factory("/camera", factory)
assert server.attach(None); GLib.MainLoop().run()
"""
LAUNCH = (
    f"( multifilesrc location={PICTURES}/scene-%d.png start-index=1 stop-index=6 loop=true "
    "caps=image/png,framerate=(fraction)1/1 ! pngdec ! videoconvert ! videoscale ! videorate "
    "! video/x-raw,format=I420,width=256,height=256,framerate=10/1 ! x264enc tune=zerolatency key-int-max=10 "
    "! rtph264pay name=pay0 pt=96 )"
)
PATIENCE_S = 90.0


def start_server(port: int) -> subprocess.Popen[bytes]:
    """Starts the RTSP server, and waits until it listens."""
    process = subprocess.Popen(["/usr/bin/python3", "-c", SERVER, str(port), LAUNCH])
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(
                f"error: the RTSP server has ended with status {process.returncode} (its message is above); it needs "
                "gstreamer1.0-plugins-ugly gir1.2-gst-rtsp-server-1.0 python3-gi of Debian"
            )
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise SystemExit("error: the RTSP server does not listen; see --help for its packages")


@dataclass
class Watch:
    """A running ``blip2edge watch``: the times and texts of its captions, and its messages."""

    process: subprocess.Popen[str]
    captions: queue.Queue[tuple[float, dict[str, Any]]] = field(default_factory=queue.Queue)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.readers = [
            threading.Thread(target=read, daemon=True) for read in (self._read_captions, self._read_messages)
        ]
        for reader in self.readers:
            reader.start()

    def _read_captions(self) -> None:
        for line in self.process.stdout or ():
            self.captions.put((time.monotonic(), json.loads(line)))

    def _read_messages(self) -> None:
        for line in self.process.stderr or ():
            self.messages.append(line.strip())

    def take(self, count: int) -> list[tuple[float, dict[str, Any]]]:
        """Returns the next ``count`` captions, each with its time."""
        return [self._next() for _ in range(count)]

    def _next(self) -> tuple[float, dict[str, Any]]:
        """Returns the next caption; raises SystemExit with the messages of ``watch`` if none comes."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            ended = self.process.poll() is not None
            for reader in self.readers if ended else ():  # the last captions and messages
                reader.join(PATIENCE_S)
            try:
                return self.captions.get(timeout=0.5)
            except queue.Empty:
                if ended or time.monotonic() > deadline:
                    what = f"has ended with status {self.process.returncode}" if ended else "gives no captions"
                    raise SystemExit("\n".join([f"error: watch {what}; its messages:", *self.messages])) from None

    def drain(self) -> int:
        """Removes the captions that have arrived; returns their number."""
        count = 0
        while not self.captions.empty():
            self.captions.get()
            count += 1
        return count


def cut(watch: Watch, server: subprocess.Popen[bytes], port: int, kind: str, seconds: float) -> tuple[Any, Any]:
    """Kills or stops the RTSP server, and starts it again after some seconds.

    Returns the server that runs afterwards, and the measured values.
    """
    before = len(watch.messages)
    watch.drain()
    if kind == "killed":
        server.kill()
        server.wait()
    else:
        server.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    watch.drain()
    time.sleep(seconds - 1.0)
    during = watch.drain()
    if kind == "killed":
        server = start_server(port)
    else:
        server.send_signal(signal.SIGCONT)
    back = time.monotonic()
    (first, _), *_ = watch.take(5)
    return server, {
        "cut": kind,
        "seconds": seconds,
        "captions_during_the_cut": during,
        "seconds_until_the_next_caption": round(first - back, 2),
        "messages": watch.messages[before:],
    }


def main() -> None:
    """Kills or stops the RTSP server several times while ``watch`` runs, and writes the measured values."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument(
        "--seconds",
        type=float,
        nargs="+",
        default=[2.0, 8.0],
        help="seconds from each kill of the server to its new start",
    )
    parser.add_argument(
        "--stall", type=float, default=14.0, help="seconds for which the server is stopped; above two timeouts of 5 s"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start_server(port)
    words = ["watch", f"rtsp://127.0.0.1:{port}/camera", "-b", str(options.bundle), "--threads", "1", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "blip2edge", *words, "--max-fps", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    watch = Watch(process)
    try:
        started = watch.take(30)[5:]  # the first ones are slower
        rate = (len(started) - 1) / (started[-1][0] - started[0][0])
        cuts = []
        for kind, seconds in [*(("killed", seconds) for seconds in options.seconds), ("stalled", options.stall)]:
            server, measured = cut(watch, server, port, kind, seconds)
            cuts.append(measured)
            print(json.dumps(measured), flush=True)
        texts = {caption["text"] for _, caption in watch.take(30)}
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(PATIENCE_S)
        server.kill()
    write_result(
        options.json,
        server="GStreamer's RTSP server, H.264, 256 x 256, 10 frames a second",
        captions_a_second=round(rate, 2),
        cuts=cuts,
        texts_afterwards=sorted(texts),
        exit_status=status,
    )
    print(f"{rate:.2f} captions a second, limit 5; {len(texts)} different captions after the cuts; status {status}")


if __name__ == "__main__":
    run_script(main)
