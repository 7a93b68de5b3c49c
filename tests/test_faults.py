"""Hostile and unlucky input: one picture, request or file fails alone, with one clear line."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.integrity import STAMPS, check_files
from blip2edge.bundle.publishing import check_not_source, staged
from blip2edge.calibration.pictures import choose_pictures
from blip2edge.cli import main
from blip2edge.errors import BundleIntegrityError, ImageError, OutputError, PromptError
from blip2edge.limits import MAX_SIDE
from blip2edge.picture_files import printable
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.images.preprocess import FORMATS, Preprocessing, load_image
from blip2edge.runtime.text.tokenizer import CHARACTERS_PER_TOKEN
from tests.drawing import draw_pictures


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


def thin_png(width: int) -> bytes:
    """A bit a pixel, one row: 11 kB for 89 million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(1 + (width + 7) // 8), 9))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [89_478_485, MAX_SIDE + 1])
def test_thin_picture_fails_alone(captioner: Captioner, width: int) -> None:
    good = draw_pictures(1)[0]
    with captioner.scheduler() as scheduler:
        bad = scheduler.submit(thin_png(width), captioner.options(max_new_tokens=2))
        with pytest.raises(ImageError, match=f"{MAX_SIDE} a side"):
            bad.result(60)
        assert scheduler.submit(good, captioner.options(max_new_tokens=2)).result(60).tokens
        assert not scheduler.failed


def test_widest_picture_is_captioned(captioner: Captioner) -> None:
    assert captioner.caption(thin_png(MAX_SIDE), max_new_tokens=2).tokens


@pytest.mark.parametrize("error", [MemoryError(), ValueError("a bug"), OSError(5, "I/O error"), RecursionError()])
def test_foreign_error_fails_its_request_alone(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    pictures = draw_pictures(3)
    real = Preprocessing._pixels

    def failing(self: Preprocessing, image: Image.Image) -> Any:
        if image.size == pictures[1].size:
            raise error
        return real(self, image)

    expected = [captioner.caption(picture, max_new_tokens=3).tokens for picture in pictures]
    monkeypatch.setattr(Preprocessing, "_pixels", failing)
    with captioner.scheduler(max_batch=3) as scheduler:
        requests = [scheduler.submit(picture, captioner.options(max_new_tokens=3)) for picture in pictures]
        assert requests[0].result(60).tokens == expected[0]
        assert requests[2].result(60).tokens == expected[2]
        with pytest.raises(ImageError if isinstance(error, MemoryError) else type(error)):
            requests[1].result(60)
        assert not scheduler.failed


def test_formats_that_run_other_programs_are_not_decoded() -> None:
    eps = io.BytesIO()
    Image.new("RGB", (4, 4)).save(eps, "EPS")
    for content in (eps.getvalue(), b"%PDF-1.4\n", b"SIMPLE  =                    T" + b" " * 2850):
        with pytest.raises(ImageError, match="not a picture in one of the formats"):
            load_image(content)
    assert not {"EPS", "PDF", "FITS", "MPEG", "GRIB", "WMF"} & set(FORMATS)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA", "ICO"])
def test_formats_that_are_decoded(name: str) -> None:
    file = io.BytesIO()
    draw_pictures(1)[0].resize((32, 32)).save(file, name)
    assert load_image(file.getvalue()).size == (32, 32)


def test_pictures_of_signed_or_floating_point_values_are_refused() -> None:
    signed = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(signed, "TIFF", tiffinfo={339: 2})
    pfm = b"Pf\n4 4\n-1.0\n" + np.zeros(16, "<f4").tobytes()
    for content in (signed.getvalue(), pfm):
        with pytest.raises(ImageError, match="values of black and white are not known"):
            load_image(content)


@pytest.mark.parametrize(("mode", "plain"), [("La", "LA"), ("RGBa", "RGBA")])
def test_premultiplied_alpha(mode: str, plain: str) -> None:
    image = draw_pictures(1)[0].convert(plain)
    np.testing.assert_array_equal(np.asarray(load_image(image.convert(mode))), np.asarray(load_image(image)))


# Prompts


def test_long_text_is_refused_before_it_is_tokenized(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    most = captioner.bundle.manifest.max_positions * CHARACTERS_PER_TOKEN
    monkeypatch.setattr(captioner.tokenizer, "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    with pytest.raises(PromptError, match=f"the prompt has {most + 1} characters"):
        captioner.caption(draw_pictures(1)[0], prompt="a" * (most + 1))


# Stamps of files


def flip(path: Path) -> None:
    """Changes bytes and keeps size and time, as a bad copy may do."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[3::4] = bytes(byte ^ 0x80 for byte in content[3::4])
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_stamp_does_not_hold_for_a_copy(tiny_bundle: Path, tmp_path: Path) -> None:
    Bundle.open(tiny_bundle)
    assert (tiny_bundle / STAMPS).is_file()
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))  # with times and stamps
    assert (copy / STAMPS).is_file()
    flip(copy / "bridge.onnx.data")
    with pytest.raises(BundleIntegrityError, match=r"bridge\.onnx\.data does not match"):
        Bundle.open(copy)


def test_stamp_does_not_hold_for_a_file_that_changed_in_its_place(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    Bundle.open(copy)
    flip(copy / "bridge.onnx.data")
    with pytest.raises(BundleIntegrityError, match=r"bridge\.onnx\.data does not match"):
        Bundle.open(copy)


def test_unchanged_files_are_not_hashed_again(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    Bundle.open(copy)
    monkeypatch.setattr("blip2edge.bundle.integrity.sha256_of", lambda path: pytest.fail(f"{path} was hashed"))
    Bundle.open(copy)
    with pytest.raises(pytest.fail.Exception, match="was hashed"):
        check_files(copy, Bundle.open(copy).manifest.files, manifest="bundle.json", fix="", use_stamps=False)


def test_inspect_verify_hashes_engines(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.engine.fake_engines import plug_in, write_engines

    plug_in(monkeypatch)
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    directory = write_engines(copy, copy / "engines")
    assert main(["inspect", str(copy), "--verify"]) == 0
    files = len(Bundle.open(copy).manifest.files) + len(list(directory.glob("*.engine")))
    assert f"every one of the {files} files" in capsys.readouterr().out
    (directory / "bridge.engine").write_bytes(b"x" * (directory / "bridge.engine").stat().st_size)
    assert main(["inspect", str(copy), "--verify"]) == 1
    assert "bridge.engine does not match engine.json" in capsys.readouterr().err


# Outputs


def test_output_must_not_replace_its_source(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "parent" / "copy"))
    before = sorted(path.name for path in copy.iterdir())
    (tmp_path / "link").symlink_to(copy)
    for target in (copy, copy / ".." / "copy", tmp_path / "link", copy.parent):
        with pytest.raises(OutputError, match="which it is made from"):
            check_not_source(target, copy)
    check_not_source(copy / "int8", copy)
    words = ["calibrate", str(copy), "-o", str(copy), "--force", "--images", "examples/pictures"]
    assert main(words) == 1
    assert main(["build", str(copy), "-o", str(copy), "--force", "--target", "rtx", "--sm", "86"]) == 1
    assert sorted(path.name for path in copy.iterdir() if path.name != STAMPS) == [
        name for name in before if name != STAMPS
    ]


# Names and counts of pictures


def test_names_are_printed_on_one_line() -> None:
    assert printable("ä/b c.png") == "ä/b c.png"
    assert printable("two\nlines\t.png") == "two\\nlines\\t.png"
    assert printable(os.fsdecode(b"x\xff.png")) == "x\\xff.png"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_name_that_is_not_utf_8(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(bytes(tmp_path / "odd") + b"\xff\n.png")
    draw_pictures(1)[0].save(tmp_path / "plain.png")
    shutil.copyfile(tmp_path / "plain.png", name)
    words = ["caption", str(tmp_path), "-b", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "2", "--json"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["image"].rpartition("/")[2] for line in lines] == ["odd\\xff\\n.png", "plain.png"]
    calibrated = ["calibrate", str(tiny_bundle), "-o", str(tmp_path / "int8"), "--images", str(tmp_path)]
    assert main([*calibrated, "--threads", "1", "--no-optimize"]) == 0
    assert "odd\\xff\\n.png" in (tmp_path / "int8" / "report.html").read_text(encoding="utf-8")


def test_unreadable_pictures_are_replaced_by_others(tmp_path: Path) -> None:
    for index in range(12):
        if index % 3 == 0:
            (tmp_path / f"{index:02}.png").write_bytes(b"broken")
        else:
            draw_pictures(1)[0].save(tmp_path / f"{index:02}.png")
    found = choose_pictures(tmp_path, 6)
    assert len(found) == 6
    assert found.skipped
    assert len(choose_pictures(tmp_path, 100)) == 8


# The process


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blip2edge", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.skipif(os.name == "nt", reason="descriptors are closed as on Unix")
@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_standard_stream(closed: int, tiny_bundle: Path, tmp_path: Path) -> None:
    draw_pictures(1)[0].save(tmp_path / "picture.png")
    words = ["caption", str(tmp_path / "picture.png"), "-b", str(tiny_bundle), "--threads", "1"]
    done = run(*words, preexec_fn=lambda: os.close(closed))
    if closed == 1:
        assert done.returncode == 1
        assert done.stderr == "error: standard output is closed; redirect it to a file or to /dev/null\n"
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_server_that_is_ended_by_a_signal_exits_with_0(number: signal.Signals, tiny_bundle: Path) -> None:
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    command = [sys.executable, "-m", "blip2edge", "serve", str(tiny_bundle), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://")
        time.sleep(1)  # until uvicorn has installed its handlers
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_port_outside_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "bundle", "--port", "99999"]) == 2
    assert "expected a port from 0 to 65535, got 99999" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_hangup_ends_a_command_as_sigterm_does(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    slow = (
        "import time, blip2edge.cli.watch as watch\n"
        "watch.run = lambda options: print('ready', flush=True) or time.sleep(60)\n"
        "from blip2edge.__main__ import run; run()"
    )
    command = [sys.executable, "-c", slow, "watch", str(tmp_path / "pictures"), "-b", "BUNDLE"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGHUP, "interrupted\n")


def test_files_are_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    with staged(tmp_path / "out", force=False) as staging:
        (staging / "bundle.json").write_text("{}")
        (staging / "engines").mkdir()
        (staging / "engines" / "a.engine").write_text("x")
    assert set(events[: events.index("rename")]) >= {"bundle.json", "a.engine", "engines"}
    assert events[-1] == tmp_path.name
