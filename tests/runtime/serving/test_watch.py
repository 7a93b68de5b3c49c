"""Live captions: the newest frame first, and no backlog."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.cli import main
from blip2edge.errors import DataError
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.reuse.fit import CurvePoint, FrameTimes, ReuseFit, Thresholds
from blip2edge.runtime.captioning.reuse.ladder import ReusePlan, fit_document, fit_key
from blip2edge.runtime.serving.streams import sources
from blip2edge.runtime.serving.streams.decoder import Ending
from blip2edge.runtime.serving.streams.sources import Frame, Frames, Source, SourceError, _folder, open_source
from blip2edge.runtime.serving.watch import NewestFrame, watch
from tests.drawing import draw_pictures


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, picture in enumerate(draw_pictures(3, 2)):
        picture.save(tmp_path / f"{index}.png")
        os.utime(tmp_path / f"{index}.png", (0, index))  # complete: not modified for a long time
    (tmp_path / "._0.png").write_bytes(b"macOS writes such files")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_every_picture_of_a_folder_once(captioner: Captioner, folder: Path) -> None:
    seen = list(watch(captioner, open_source(str(folder), follow=False), every=True, max_new_tokens=4))
    assert sorted(one.frame for one in seen) == ["0.png", "1.png", "2.png"]
    for one in seen:
        assert one.result is not None
        assert one.result.tokens == captioner.caption(folder / one.frame, max_new_tokens=4).tokens
        assert one.age_ms > 0


def test_frames_that_come_too_fast_are_dropped_and_counted(captioner: Captioner) -> None:
    pictures = draw_pictures(6, 2)
    given, first_done = threading.Event(), threading.Event()

    def frames() -> Iterator[Frame]:
        yield Frame("0", pictures[0])
        assert first_done.wait(60)
        for index in range(1, 6):
            yield Frame(str(index), pictures[index])
        given.set()

    results = watch(captioner, frames(), max_new_tokens=3)
    first = next(results)
    first_done.set()
    assert given.wait(60)
    second = next(results)
    assert [first.frame, first.dropped, second.frame, second.dropped] == ["0", 0, "5", 4]
    assert list(results) == []


def test_a_broken_picture_does_not_end_it(captioner: Captioner, folder: Path) -> None:
    (folder / "1.png").write_bytes(b"half a pict")
    seen = list(watch(captioner, open_source(str(folder), follow=False), every=True, max_new_tokens=2))
    errors = {one.frame: one.error for one in seen}
    assert "1.png" in errors["1.png"]
    assert errors["0.png"] == errors["2.png"] == ""


def test_a_link_to_a_file_that_does_not_exist_is_a_broken_picture(captioner: Captioner, folder: Path) -> None:
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to(folder / "gone.png")
    seen = list(watch(captioner, open_source(str(folder), follow=False), every=True, max_new_tokens=2))
    errors = {one.frame: one.error for one in seen}
    assert "1.png: a link to" in errors["1.png"]
    assert errors["0.png"] == errors["2.png"] == ""


def test_new_pictures_appear(captioner: Captioner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "POLL_S", 0.01)
    frames = open_source(str(folder))
    names = {next(frames).name for _ in range(3)}
    draw_pictures(1, 9)[0].save(folder / "later.png")
    assert names | {next(frames).name} == {"0.png", "1.png", "2.png", "later.png"}


def test_folder_is_a_queue(captioner: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 pictures that arrive while others are captioned give 40 captions, in the order in which they arrived."""
    monkeypatch.setattr(sources, "POLL_S", 0.01)
    pictures = draw_pictures(4, 5)
    results = watch(captioner, open_source(str(tmp_path)), max_new_tokens=2)
    seen = []
    for at in range(0, 40, 10):
        for index in range(at, at + 10):
            pictures[index % 4].save(tmp_path / f"{index:02}.png")
            os.utime(tmp_path / f"{index:02}.png", (0, index))
        seen += [next(results) for _ in range(10)]
    results.close()  # type: ignore[attr-defined]  # a generator
    assert [one.frame for one in seen] == [f"{index:02}.png" for index in range(40)]
    assert all(one.result is not None and one.dropped == 0 for one in seen)


def test_picture_is_taken_when_two_listings_show_it_unchanged(tmp_path: Path) -> None:
    path, sizes = tmp_path / "slow.png", iter([10, 20, 20, 30, 30, 30])
    (tmp_path / "a folder.png").mkdir()

    class Closing(Ending):
        """An event whose wait writes the file."""

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout == sources.POLL_S
            size = next(sizes, None)
            if size is None:
                self.set()
            elif not path.exists() or path.stat().st_size != size:
                path.write_bytes(bytes(size))
            return self.is_set()

    taken = [frame.image.stat().st_size for frame in _folder(str(tmp_path), True, Closing())]
    assert taken == [20, 30]  # 10 was never seen twice; a file that is written again is taken again


def test_a_half_written_picture_is_tried_again_and_a_broken_one_is_reported_once(
    captioner: Captioner, tmp_path: Path
) -> None:
    draw_pictures(1)[0].save(tmp_path / "whole.bin", format="PNG")
    whole = (tmp_path / "whole.bin").read_bytes()
    writes = iter([0.3, 0.3, None, None, 0.6, None, None, None, 1.0, *[None] * (sources.SETTLED_POLLS + 4)])

    class Closing(Ending):
        """An event whose wait writes a part of the picture."""

        def wait(self, timeout: float | None = None) -> bool:
            part = next(writes, 0.0)
            if part == 0.0:
                self.set()
            elif part is not None:
                (tmp_path / "slow.png").write_bytes(whole[: int(part * len(whole))])
            return self.is_set()

    (tmp_path / "broken.png").write_bytes(b"no picture")
    closing = Closing()
    source = Source(lambda _: _folder(str(tmp_path), True, closing), is_queue=True)
    seen = list(watch(captioner, source, max_new_tokens=2))
    assert [one.frame for one in seen] == ["slow.png", "broken.png"]
    assert [one.result is None for one in seen] == [False, True]
    assert "broken.png" in seen[1].error


def test_a_picture_that_is_removed_while_it_is_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Path.iterdir

    def removing(path: Path) -> Iterator[Path]:
        for one in sorted(there(path)):
            if one.name == "1.png":
                one.unlink()
            yield one

    monkeypatch.setattr(Path, "iterdir", removing)
    assert [frame.name for frame in open_source(str(folder), follow=False)] == ["0.png", "2.png"]


def test_a_folder_that_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "POLL_S", 0.01)
    frames = open_source(str(folder))
    for _ in range(3):
        next(frames)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="cannot be read any more"):
        next(frames)


def _readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "blip2edge-frames"]


def test_no_thread_goes_on_polling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder gets no picture more, and a look at it is due in a minute only."""
    monkeypatch.setattr(sources, "POLL_S", 0.01)
    before = set(_readers())
    newest = NewestFrame(open_source(str(folder)))
    assert newest.get() is not None
    monkeypatch.setattr(sources, "POLL_S", 60.0)
    (reader,) = set(_readers()) - before
    newest.close()
    reader.join(10)
    assert not reader.is_alive()
    while newest.get() is not None:  # what had come is still there, and then it has ended
        pass


def test_who_stops_listening_ends_the_reader(
    captioner: Captioner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "POLL_S", 0.01)
    before = set(_readers())
    source = open_source(str(folder))
    source.is_queue = False  # as a camera
    results = watch(captioner, source, max_new_tokens=2)
    assert next(results).result is not None
    monkeypatch.setattr(sources, "POLL_S", 60.0)
    (reader,) = set(_readers()) - before
    results.close()  # type: ignore[attr-defined]  # a generator
    reader.join(10)
    assert not reader.is_alive()


class Container:
    """Something that frames are read from, and that has to be let go of."""

    def __init__(self) -> None:
        self.waited_for, self.comes, self.let_go = threading.Event(), threading.Event(), threading.Event()

    def frames(self, closed: threading.Event) -> Frames:
        """One at once; the second when it comes."""
        try:
            yield Frame("0", draw_pictures(1)[0])
            self.waited_for.set()
            assert self.comes.wait(60)
            yield Frame("1", draw_pictures(1)[0])
        finally:
            self.let_go.set()


def test_what_frames_are_read_from_is_let_go_of_at_once() -> None:
    container = Container()
    source = Source(container.frames)
    assert next(source).name == "0"
    source.close()
    assert container.let_go.is_set()
    assert list(source) == []
    source.close()


def test_what_frames_are_read_from_is_let_go_of_behind_the_frame_that_comes() -> None:
    container = Container()
    source = Source(container.frames)
    names: list[str] = []
    reader = threading.Thread(target=lambda: names.extend(frame.name for frame in source))
    reader.start()
    assert container.waited_for.wait(60)
    source.close()
    assert not container.let_go.is_set()  # a camera is asked for a picture meanwhile
    container.comes.set()
    reader.join(60)
    assert not reader.is_alive()
    assert container.let_go.is_set()
    assert names == ["0", "1"]


@pytest.mark.parametrize("every", [True, False])
def test_who_stops_listening_lets_go_of_the_source(captioner: Captioner, every: bool) -> None:
    container = Container()
    container.comes.set()
    results = watch(captioner, Source(container.frames), every=every, max_new_tokens=2)
    next(results)
    results.close()  # type: ignore[attr-defined]  # a generator
    assert container.let_go.wait(60)


def test_a_source_that_breaks_off(captioner: Captioner) -> None:
    def frames() -> Iterator[Frame]:
        yield Frame("0", draw_pictures(1)[0])
        raise DataError("the camera is gone")

    with pytest.raises(DataError, match="gone"):
        list(watch(captioner, frames(), max_new_tokens=2))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "expected a folder, a video file or a camera, got nowhere; give a folder of pictures"),
        ("", "expected a folder, a video file or a camera, got an empty text; give"),
        ("pyproject.toml", r"pyproject.toml: expected a video file with a suffix of \.avi, .*, got \.toml; convert"),
    ],
)
def test_what_is_no_source(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(source)


def test_a_video_file_without_a_suffix(video: Path, tmp_path: Path) -> None:
    with closing(open_source(str(video), follow=False)) as frames:
        named = [frame.seconds for frame in frames]
    with closing(open_source(str(video.rename(tmp_path / "film")), follow=False)) as frames:
        assert [frame.seconds for frame in frames] == named
    (tmp_path / "notes").write_text("no video")
    with pytest.raises(DataError, match=r"notes cannot be read as a video \("):
        list(open_source(str(tmp_path / "notes"), follow=False))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "rtsp://127.0.0.1:1/x",
            r"^rtsp://127\.0\.0\.1:1/x cannot be reached \(.*refused.*\); check the address, and that",
        ),
        ("http://127.0.0.1:1/x.mp4", r"x\.mp4 cannot be reached \(.*refused.*\); check the address, and that"),
        ("/dev/video987", r"^/dev/video987 cannot be opened \(.*No such file.*\); check the number or the device file"),
    ],
)
def test_a_source_that_is_no_file_gets_no_hint_about_files(source: str, message: str) -> None:
    pytest.importorskip("av", reason="pip install 'blip2edge[video]'")
    with pytest.raises(SourceError, match=message) as raised, closing(open_source(source)) as frames:
        next(frames)
    assert f" ({raised.value.reason}); " in str(raised.value)
    assert "convert" not in str(raised.value)


def test_a_video_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"film\.mp4: no such file"):
        open_source(str(tmp_path / "film.mp4"))


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A video of 4 frames in 2 seconds."""
    av: Any = pytest.importorskip("av", reason="videos are read with PyAV")
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for picture in draw_pictures(4, 1):
            for packet in stream.encode(av.VideoFrame.from_image(picture.resize((64, 64)))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_video_with_once_is_read_as_fast_as_possible(
    tiny_bundle: Path, video: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float | None] = []

    def wait(_: threading.Event, timeout: float | None = None) -> bool:
        waits.append(timeout)
        return False

    monkeypatch.setattr(threading.Event, "wait", wait)
    assert [frame.name for frame in open_source(str(video), follow=False)] == ["0.00 s", "0.50 s", "1.00 s", "1.50 s"]
    assert waits == []
    assert len(list(open_source(str(video)))) == len(waits) == 4  # without it, at the video's own speed
    monkeypatch.undo()
    assert main(["watch", str(video), "--once", "-b", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["0.00 s", "0.50 s", "1.00 s", "1.50 s"]


def test_the_command_passes_its_draft_model_on(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["watch", str(tmp_path), "--once", "-b", str(tiny_bundle), "--threads", "1"]
    assert main([*words, "--draft", "none"]) == 1  # as `caption` and `bulk` of a folder without pictures
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}: no pictures found; check the path, or leave --once out to wait for pictures\n"
    assert main([*words, "--draft", "itg"]) == 2
    assert capsys.readouterr().err.startswith("error: --draft itg: the bundle has no draft")


def test_reuse_auto_records_then_says_what_it_did(
    tiny_bundle: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three frames are no evidence: all are encoded, the fit is kept, and its report is written."""
    kept = tmp_path_factory.mktemp("fit") / "fit.json"
    flags = ["--once", "--json", "--reuse-below", "auto", "--fit-frames", "2", "--reuse-fit", str(kept)]
    words = ["watch", str(folder), "-b", str(tiny_bundle), "--max-new-tokens", "2", "--threads", "1", *flags]
    assert main(words) == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [(one["step"], one["reused"], one["audit"]["frames"]) for one in lines] == [("fit", False, 0)] * 3
    assert "nothing is reused: on 2 frames" in printed.err
    assert "reused frames are needed); record a longer film, or raise --miss-rate" in printed.err
    assert json.loads(kept.read_text())["frames"] == 3
    assert "no thresholds keep the rate below 5.0%" in kept.with_suffix(".html").read_text()
    assert main([*words, "--prompt", "another"]) == 2
    assert "was fitted for another prompt: expected" in capsys.readouterr().err


def test_a_kept_fit_reuses_the_caption_at_once(captioner: Captioner, tmp_path: Path) -> None:
    """The same picture four times: one is encoded and decoded, and a piece is published for each."""
    plan = ReusePlan(path=tmp_path / "fit.json")
    key = fit_key(captioner.bundle, None, captioner.options(max_new_tokens=3), plan)
    point = CurvePoint(Thresholds(0.01, 0.0), 1.0, 0.0, 9, 0, 0.0, 1.0, 0.01, 1.0)
    fit = ReuseFit(point.thresholds, point, (point,), 10, 1, FrameTimes(1.0, 1.0))
    (tmp_path / "fit.json").write_text(json.dumps(fit_document(fit, key)))
    picture = draw_pictures(1, 4)[0]
    pieces: list[str | None] = []
    seen = list(
        watch(
            captioner,
            (Frame(str(at), picture) for at in range(4)),
            every=True,
            reuse_below="auto",
            reuse=plan,
            on_piece=pieces.append,
            max_new_tokens=3,
        )
    )
    assert [one.step for one in seen] == ["full", "skip", "skip", "skip"]
    wanted = captioner.caption(picture, max_new_tokens=3)
    for one in seen:
        assert one.result is not None
        assert (one.result.tokens, one.result.text) == (wanted.tokens, wanted.text)
        assert (one.result.timings_ms["decode"] == 0) is (one.step == "skip")
        assert one.reused is (one.step == "skip")
    assert pieces == [wanted.text, None] * 4


def test_flags_of_auto_need_auto(tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["watch", str(folder), "-b", str(tiny_bundle)]
    assert main([*words, "--miss-rate", "0.1"]) == 2
    assert "--miss-rate needs --reuse-below auto" in capsys.readouterr().err
    for name in ("fit.html", "fit.HTML", ".", "fit.txt", "fit", ".json"):
        assert main([*words, "--reuse-below", "auto", "--reuse-fit", name]) == 2
        assert "expected --reuse-fit to be a JSON file" in capsys.readouterr().err
    assert main([*words, "--reuse-below", "much"]) == 2
    assert "expected auto or a number from 0 to 1, got 'much'" in capsys.readouterr().err
