"""The pictures that a command line names: files, folders, patterns, pipes and web addresses; broken ones fail alone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.cli import main, picture_arguments
from blip2edge.cli.picture_arguments import find_pictures
from blip2edge.errors import ImageError
from blip2edge.limits import Limits
from blip2edge.runtime.images import download
from blip2edge.runtime.images.preprocess import load_image
from blip2edge.runtime.images.video import load_frames
from tests.drawing import draw_pictures

Run = Callable[..., tuple[int, list[str], list[str]]]
"""Runs ``caption`` with words; returns the exit status and the lines of standard output and standard error."""

NAMES = ["a.png", "b.png", "c.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, of which the second is cut off, one in a subfolder, and files that are no pictures."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for name, picture in zip([*NAMES, "more/d.jpg"], draw_pictures(4, 3), strict=True):
        picture.save(root / name)
    content = (root / "b.png").read_bytes()
    (root / "b.png").write_bytes(content[: len(content) // 2])
    for name in (".hidden.png", "._a.png", "notes.txt"):
        (root / name).write_bytes(b"no picture")
    return root


@pytest.fixture
def caption(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, list[str], list[str]]:
        status = main(["caption", *words, "-b", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "4"])
        output = capsys.readouterr()
        return status, output.out.splitlines(), output.err.splitlines()

    return run


@pytest.mark.parametrize("flags", [[], ["--batch-size", "2"], ["--batch-size", "8"], ["--stream"], ["--json"]], ids=str)
def test_broken_picture_fails_alone(caption: Run, folder: Path, flags: list[str]) -> None:
    good = [str(folder / name) for name in ("a.png", "c.png")]
    alone = [caption(name, *flags)[1][0] for name in good]
    status, lines, errors = caption(*(str(folder / name) for name in NAMES), str(folder / "none.png"), *flags)
    assert status == 1
    if flags == ["--json"]:
        assert [json.loads(line)["text"] for line in lines] == [json.loads(line)["text"] for line in alone]
        assert [json.loads(line)["image"] for line in lines] == good
    else:
        assert lines == [f"{name}: {text}" for name, text in zip(good, alone, strict=True)]
    assert errors[0].startswith(f"error: {folder / 'b.png'}: the picture is broken")
    assert errors[1:] == [f"error: {folder / 'none.png'}: no such file; check the path", "2 of 4 failed"]


def test_prompt_of_one_picture_fails_alone_and_the_prompt_of_all_ends_the_command(caption: Run, folder: Path) -> None:
    good, long = str(folder / "a.png"), "word " * 5000
    status, lines, errors = caption(good, good, "--prompt", long, "--prompt", "a")
    assert (status, len(lines)) == (1, 1)
    assert "tokens" in errors[0]
    assert len(errors) == 1
    before = set(threading.enumerate())
    status, lines, errors = caption(good, good, "--prompt", long)
    assert (status, lines, len(errors)) == (1, [], 1)
    assert set(threading.enumerate()) <= before, "the threads of the other pictures have ended"


def test_folder_and_pattern(caption: Run, folder: Path) -> None:
    for word, names in {
        str(folder): ["a.png", "c.png", "more/d.jpg"],
        str(folder / "*.png"): ["a.png", "c.png"],
        str(folder / "**" / "*"): ["a.png", "c.png", "more/d.jpg"],
        str(folder / "m*"): None,
    }.items():
        status, lines, errors = caption(word)
        if names is None:  # the pattern matches a folder only
            assert (status, lines) == (1, [])
            assert "no picture matches this pattern" in errors[0]
        else:
            assert [line.split(": ")[0] for line in lines] == [str(folder / name) for name in names]
            assert status == 1  # because of b.png
    (folder / "more" / "alone").mkdir()
    (folder / "more" / "d.jpg").rename(folder / "more" / "alone" / "d.jpg")
    assert caption(str(folder / "more"))[1][0].startswith(f"{folder}/more/alone/d.jpg: ")  # named, although alone


@pytest.mark.parametrize("word", ["", "*.png", "*"], ids=["folder", "suffix", "pattern"])
def test_link_to_a_file_that_does_not_exist_fails_alone(caption: Run, folder: Path, word: str) -> None:
    (folder / "b.png").unlink()
    link = folder / "b.png"
    link.symlink_to(folder / "gone.png")
    (folder / "notes").symlink_to(folder / "gone")  # no suffix of a picture
    status, lines, errors = caption(str(folder / word))
    assert status == 1
    assert [line.split(": ")[0] for line in lines][:2] == [str(folder / "a.png"), str(folder / "c.png")]
    assert errors[0].startswith(f"error: {link}: a link to {folder / 'gone.png'}, which does not exist; ")
    assert len(errors) == 1
    (folder / "gone.png").write_bytes((folder / "a.png").read_bytes())
    assert caption(str(folder / word))[0] == 0


def test_frame_that_is_a_link_to_a_file_that_does_not_exist(folder: Path) -> None:
    frames = folder / "more"
    (frames / "e.jpg").symlink_to(folder / "gone.png")
    with pytest.raises(ImageError, match=r"gone\.png, which does not exist"):
        list(map(load_image, load_frames(frames, 2)))


def test_file_whose_name_has_the_characters_of_a_pattern(folder: Path) -> None:
    path = folder / "a[1]*.png"
    (folder / "a.png").rename(path)
    assert [picture.name for picture in find_pictures([str(path)])] == [str(path)]


def test_pattern_that_names_a_suffix_takes_files_of_this_suffix(folder: Path) -> None:
    (folder / "a.png").rename(folder / "a.image")
    assert [picture.name for picture in find_pictures([f"{folder}/*.image"])] == [f"{folder}/a.image"]
    (nothing,) = find_pictures([f"{folder}/a*"])
    with pytest.raises(ImageError, match="no picture matches"):
        load_image(nothing.source)


def test_folder_is_one_video_for_a_model_of_videos(folder: Path) -> None:
    assert [picture.source for picture in find_pictures([str(folder)], videos=True)] == [str(folder)]
    assert [picture.name for picture in find_pictures([f"{folder}/m*"], videos=True)] == [f"{folder}/more"]


def test_folder_without_pictures(caption: Run, tmp_path: Path) -> None:
    draw_pictures(1)[0].save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    status, lines, errors = caption(str(tmp_path / "empty"), str(tmp_path / "a.png"))
    assert (status, len(lines), len(errors)) == (1, 1, 1)
    assert "empty: expected a folder of pictures" in errors[0]


def test_standard_input(caption: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = caption(str(folder / "a.png"))[1]
    content = (folder / "a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert caption("-") == (0, expected, [])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    status, lines, _ = caption("-", "--json")
    assert (status, json.loads(lines[0])["image"]) == (0, "-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    empty = ["error: -: the file is empty; save or copy the picture again"]
    assert caption("-") == (1, [], empty)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    status, lines, errors = caption("-", str(folder / "a.png"))
    assert (status, [line.split(": ")[1] for line in lines], errors) == (
        1,
        expected,
        ["error: -: the file is empty; save or copy the picture again"],
    )
    monkeypatch.setattr(sys, "stdin", None)
    assert caption("-")[2] == ["error: -: standard input is closed; send the bytes of a picture file to it"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    status, lines, errors = caption("-")
    assert (status, lines, errors[0].startswith("error: -: not a picture")) == (1, [], True)
    assert caption("-", "-")[0] == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_named_pipe_is_read_once_for_a_batch_with_a_broken_picture(caption: Run, folder: Path) -> None:
    """In such a batch, each picture is decoded again by itself."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes((folder / "a.png").read_bytes()))
    writer.start()
    status, lines, _ = caption(str(pipe), str(folder / "b.png"), "--batch-size", "2")
    writer.join()
    assert status == 1
    assert lines == [f"{pipe}: {caption(str(folder / 'a.png'))[1][0]}"]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="there is no /dev/fd here")
def test_pipes_of_a_shell(tiny_bundle: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "blip2edge", "caption", "/dev/stdin", "-b", str(tiny_bundle), "--threads", "1"]
    done = subprocess.run(command, input=(folder / "a.png").read_bytes(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.strip()


@pytest.fixture
def asked() -> list[str]:
    """The paths that the web server was asked for."""
    return []


@pytest.fixture
def site(folder: Path, asked: list[str]) -> Iterator[str]:
    """The address of a web server that sends the files of the folder, or redirects."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path in ("/to-file", "/to-ftp"):
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd" if self.path == "/to-file" else "ftp://127.0.0.1/a")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_web_addresses(
    caption: Run, folder: Path, site: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = caption(str(folder / "a.png"))[1][0]
    (folder / "a.png").rename(folder / "ä b.png")
    good = [f"{site}/ä b.png", f"{site}/%C3%A4%20b.png"]
    words = [*good, *(f"{site}/{name}" for name in ("none.png", "to-file", "to-ftp", "notes.txt"))]
    status, lines, errors = caption(*words, "--batch-size", "6")
    assert status == 1
    assert lines == [f"{address}: {expected}" for address in good]
    assert len(errors) == 5
    assert "the server answered 404" in errors[0]
    assert "/to-file: cannot be downloaded (the server answered 302" in errors[1]
    assert "the server redirects to ftp://" in errors[2]
    assert errors[3].startswith(f"error: {site}/notes.txt: not a picture")
    assert errors[4] == "4 of 6 failed"
    assert asked.count("/%C3%A4%20b.png") == 2  # each address once, although others of the batch are broken
    monkeypatch.setattr(download, "MAX_DOWNLOAD", 100)
    with pytest.raises(ImageError, match="expected at most"):
        download.download(good[0])


@pytest.mark.parametrize("address", ["http://", "http://127.0.0.1:1/x.png", "http://[/x.png", "https://127.0.0.1:1/x"])
def test_address_that_cannot_be_reached(address: str) -> None:
    with pytest.raises(ImageError, match="cannot be downloaded"):
        download.download(address)


def test_nothing_is_downloaded_before_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_arguments, "download", lambda _: pytest.fail("downloaded at once"))
    assert [picture.name for picture in find_pictures(["http://a/b.png", "HTTPS://a/c.png"])] == [
        "http://a/b.png",
        "HTTPS://a/c.png",
    ]


def test_special_file_is_refused(caption: Run) -> None:
    status, lines, errors = caption("/dev/null")
    assert (status, lines) == (1, [])
    assert "not a regular file" in errors[0]


def test_ask_about_a_folder(tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ask", str(folder), "what is it", "-b", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "3"]
    assert main(words) == 1
    output = capsys.readouterr()
    assert [line.split(": ")[0] for line in output.out.splitlines()] == [
        str(folder / name) for name in ("a.png", "c.png", "more/d.jpg")
    ]
    assert output.err.startswith(f"error: {folder / 'b.png'}: the picture is broken")


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--max-side", "5", "at most 5 a side"),
        ("--max-pixels", "5", "expected at most 5 pixels"),
        ("--max-decoded-bytes", "99", "at most 99 bytes when it is decoded"),
    ],
)
def test_limits_of_pictures(caption: Run, folder: Path, flag: str, value: str, told: str) -> None:
    status, lines, errors = caption(str(folder / "a.png"), flag, value)
    assert (status, lines) == (1, [])
    assert told in errors[0]


def test_limit_of_frames(folder: Path) -> None:
    (folder / "b.png").unlink()
    with pytest.raises(ImageError, match="expected at most 2 frames, got"):
        load_frames(folder, 2, Limits(frames=2))
    assert len(load_frames([folder / "a.png", folder / "c.png"], 2, Limits(frames=2))) == 2
