"""watch: frames of a video that cannot be decoded are counted and reported, and the others are captioned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av", reason="videos are read with PyAV")

import av

from blip2edge.cli import main
from blip2edge.errors import DataError
from blip2edge.runtime.serving.streams import decoder, sources
from blip2edge.runtime.serving.streams.decoder import Ending, decoded
from blip2edge.runtime.serving.streams.sources import Source, open_source

FRAMES = 8
CHUNK = b"00dc"  # begins each frame of an AVI file; its length follows, in 4 bytes


def written(path: Path) -> Path:
    """A video whose frames are JPEG pictures."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p"
        for _ in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 256, (64, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damaged(path: Path, *, header: bool) -> Path:
    """The AVI file with zeros in its fourth frame: in its content, or in its header, so that no reader finds it."""
    content = bytearray(written(path).read_bytes())
    at = content.index(b"movi")
    for _ in range(4):
        at = content.index(CHUNK, at + 1)
    size = int.from_bytes(content[at + 4 : at + 8], "little")
    first, last = (at, at + 8) if header else (at + 8, at + 8 + size)
    content[first:last] = bytes(last - first)
    path.write_bytes(content)
    return path


def read(path: Path) -> tuple[int, int]:
    """Number of frames that a source gives, and of those that could not be decoded."""
    source = open_source(str(path), follow=False)
    return len(list(source)), source.undecoded


@pytest.mark.parametrize("name", ["film.avi", "film.mov", "film.mkv"])
def test_a_whole_video_has_no_damage(name: str, tmp_path: Path) -> None:
    assert read(written(tmp_path / name)) == (FRAMES, 0)


@pytest.mark.parametrize("header", [False, True])
def test_a_frame_that_cannot_be_decoded_is_counted(header: bool, tmp_path: Path) -> None:
    assert read(damaged(tmp_path / "film.avi", header=header)) == (FRAMES - 1, 1)


def test_the_command_says_so(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = damaged(tmp_path / "film.avi", header=False)
    words = ["watch", str(path), "-b", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "2"]
    assert main([*words, "--once"]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == FRAMES - 1
    assert output.err.splitlines()[-1] == f"{path}: 1 frame could not be decoded"
    assert main(words) == 0
    assert "1 frame could not be decoded" in capsys.readouterr().err


class Packet:
    """A packet of one frame; None cannot be decoded."""

    size, dts = 1, 0

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def decode(self) -> list[Any]:
        if self._frame is None:
            raise av.error.InvalidDataError(1, "broken")
        return [self._frame]


def container(*frames: Any) -> Any:
    stream = SimpleNamespace(frames=0)
    return SimpleNamespace(
        streams=SimpleNamespace(video=[stream]),
        demux=lambda _: iter(map(Packet, frames)),
        format=SimpleNamespace(name="rtsp"),
    )


def picture(*, is_corrupt: bool) -> Any:
    return SimpleNamespace(is_corrupt=is_corrupt, time=0.0, to_ndarray=None)


def test_corrupt_frames_count_and_a_broken_stream_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    good, corrupt, ending = picture(is_corrupt=False), picture(is_corrupt=True), Ending()
    assert list(decoded(container(good, corrupt, None, good), ending)) == [good, corrupt, good]
    assert ending.undecoded == 2
    monkeypatch.setattr(decoder, "MOST_FAILED", 3)
    assert list(decoded(container(None, None, good, None, None), ending)) == [good]
    with pytest.raises(av.error.InvalidDataError):
        list(decoded(container(good, None, None, None), ending))


def test_a_live_source_reports_damage_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []

    def frames(closed: Ending) -> sources.Frames:
        for number in range(6):
            closed.undecoded += 1
            yield sources.Frame(str(number), None)
        raise DataError("rtsp://camera cannot be read as a video (gone)")

    def make(closed: Ending) -> sources.Frames:
        return sources._reconnecting(frames, "camera", reports.append, closed)

    for interval, expected in ((60.0, ["1 frame"]), (0.0, ["1 frame"] * 6)):
        monkeypatch.setattr(sources, "DAMAGE_REPORT_S", interval)
        reports.clear()
        source = Source(make, is_live=True)
        assert [next(source).name for _ in range(6)] == list("012345")
        source.close()
        assert reports == [f"camera: {count} could not be decoded" for count in expected]
