"""A small RTSP server (RFC 2326): one H.264 stream over TCP, its RTP packets between the requests (RFC 6184)."""

from __future__ import annotations

import base64
import socket
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

CLOCK = 90_000  # RTP ticks per second
PAYLOAD = 96


def h264_frames(pictures: Iterable[Any], rate: int) -> list[list[bytes]]:
    """Encodes pictures; each is a key frame. The NAL units of each frame, without start codes."""
    import av

    codec: Any = av.CodecContext.create("libx264", "w")
    pictures = list(pictures)
    codec.width, codec.height = pictures[0].size
    codec.pix_fmt, codec.framerate = "yuv420p", rate
    codec.options = {"tune": "zerolatency", "preset": "ultrafast", "g": "1", "slices": "1"}
    packets = [packet for picture in pictures for packet in codec.encode(av.VideoFrame.from_image(picture))]
    packets += codec.encode(None)
    return [[unit.rstrip(b"\0") for unit in bytes(packet).split(b"\0\0\1") if unit.strip(b"\0")] for packet in packets]


class RtspServer:
    """Sends frames again and again to every client, at `rate` frames a second.

    Args:
        frames: From :func:`h264_frames`.
        rate: Frames a second.
        port: 0 for any.
    """

    def __init__(self, frames: list[list[bytes]], rate: int, port: int = 0) -> None:
        self._frames, self._rate = frames, rate
        self._clients: list[socket.socket] = []
        self._ended = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listening.getsockname()[1]
        self.requests: list[str] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Ends the server and its connections."""
        self._ended.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self._clients.append(client)
            self._threads.append(threading.Thread(target=self._serve, args=(client,)))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client, client.makefile("rb") as read:
            while head := self._request(read):
                method, _, rest = head.partition(" ")
                self.requests.append(method)
                sequence = next(line for line in head.splitlines() if line.lower().startswith("cseq"))
                lines, body = [sequence], b""
                if method == "OPTIONS":
                    lines.append("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
                elif method == "DESCRIBE":
                    body = self._description().encode()
                    lines += [f"Content-Base: {rest.split()[0]}/", "Content-Type: application/sdp"]
                    lines.append(f"Content-Length: {len(body)}")
                elif method == "SETUP":
                    lines += ["Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1"]
                else:
                    lines.append("Session: 1")
                client.sendall("\r\n".join(["RTSP/1.0 200 OK", *lines, "", ""]).encode() + body)
                if method == "PLAY":
                    self._play(client)
                    return

    @staticmethod
    def _request(read: Any) -> str:
        lines: list[str] = []
        while (line := read.readline().decode().strip()) or not lines:
            if not line:
                return ""
            lines.append(line)
        return "\n".join(lines)

    def _description(self) -> str:
        """The session description; it has the first frame's parameter sets (NAL types 7 and 8)."""
        sets = [base64.b64encode(unit).decode() for unit in self._frames[0] if unit[0] & 31 in (7, 8)]
        lines = [
            *("v=0", "o=- 1 1 IN IP4 127.0.0.1", "s=test", "t=0 0", f"m=video 0 RTP/AVP {PAYLOAD}"),
            f"a=rtpmap:{PAYLOAD} H264/{CLOCK}",
            f"a=fmtp:{PAYLOAD} packetization-mode=1;sprop-parameter-sets={','.join(sets)}",
            "a=control:track1",
        ]
        return "\r\n".join([*lines, ""])

    def _play(self, client: socket.socket) -> None:
        sequence = number = 0
        while not self._ended.is_set():
            units = self._frames[number % len(self._frames)]
            for at, unit in enumerate(units):
                last = at + 1 == len(units)
                stamp = number * CLOCK // self._rate
                header = struct.pack(">BBHII", 0x80, PAYLOAD | (last << 7), sequence & 0xFFFF, stamp & 0xFFFFFFFF, 7)
                client.sendall(struct.pack(">cBH", b"$", 0, len(header) + len(unit)) + header + unit)
                sequence += 1
            number += 1
            time.sleep(1 / self._rate)
