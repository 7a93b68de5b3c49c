"""Hostile or damaged input: only the picture, request or file in question fails, with an error of one line."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
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

from blip2edge import special_files
from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import MANIFEST
from blip2edge.bundle.outputs import publishing
from blip2edge.bundle.outputs.locks import locked
from blip2edge.bundle.outputs.publishing import check_not_source, staged
from blip2edge.bundle.trust.integrity import STAMPS, CheckedFiles, Listing
from blip2edge.calibration.pictures import choose_pictures
from blip2edge.cli import main
from blip2edge.errors import BundleError, BundleIntegrityError, ImageError, OutputError, PromptError
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

    def refuse(path: Path) -> str:
        return "" if path.name == MANIFEST else pytest.fail(f"{path} was hashed")

    monkeypatch.setattr("blip2edge.bundle.trust.integrity.sha256_of", refuse)
    Bundle.open(copy)
    with pytest.raises(pytest.fail.Exception, match="was hashed"):
        CheckedFiles().check(Listing(copy, Bundle.open(copy).manifest.files, "bundle.json", ""), use_stamps=False)


def test_inspect_verify_hashes_engines(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.engine.fake_engines import plug_in, write_engines

    plug_in(monkeypatch)
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    directory = write_engines(copy, copy / "engines")
    assert main(["inspect", str(copy), "--verify"]) == 1  # write_engines leaves graphs there
    assert "bridge.onnx is not listed in engine.json" in capsys.readouterr().err
    for graph in directory.glob("*.onnx"):
        graph.unlink()
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
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup, which may run the tests, ignores it
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGHUP, "interrupted\n")


def test_files_are_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, publishing._rename_to_free

    def sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_sync(descriptor)

    def rename(fresh: Path, target: Path) -> None:
        events.append("rename")
        real_rename(fresh, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(publishing, "_rename_to_free", rename)
    with staged(tmp_path / "out", force=False) as staging:
        (staging / "bundle.json").write_text("{}")
        (staging / "engines").mkdir()
        (staging / "engines" / "a.engine").write_text("x")
    assert set(events[: events.index("rename")]) >= {"bundle.json", "a.engine", "engines"}
    assert events[-1] == tmp_path.name


# Files of other kinds, odd names


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_that_nothing_writes_to_is_not_waited_for(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(special_files, "WAIT_S", 0.05)
    draw_pictures(1)[0].save(tmp_path / "good.png")
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    words = ["-b", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "2"]
    assert main(["caption", str(pipe), str(tmp_path / "good.png"), *words]) == 1
    printed = capsys.readouterr()
    assert "pipe.png: cannot be read (no program wrote to this pipe within" in printed.err
    assert printed.out.startswith(f"{tmp_path / 'good.png'}: ")
    (tmp_path / "bundle").mkdir()
    os.mkfifo(tmp_path / "bundle" / "bundle.json")
    with pytest.raises(BundleError, match="no program wrote to this pipe"):
        Bundle.open(tmp_path / "bundle")
    os.mkfifo(tmp_path / "recipe.toml")
    assert main(["train", "stage2", "-c", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "out")]) == 1
    assert "no program wrote to this pipe" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no sockets in directories here")
def test_devices_sockets_and_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name, kind in (("socket", "socket"), (os.devnull, "device"), (".", "directory")):
            with pytest.raises(OSError, match=kind):
                special_files.open_file(name)
    (tmp_path / "file").write_bytes(b"content")
    with special_files.open_file("file") as file:
        assert file.read() == b"content"


def test_names_with_a_nul(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BundleError, match="is not a directory"):
        Bundle.open("a\0b")
    with pytest.raises(OutputError, match="contains a NUL"), staged(tmp_path / "a\0b", force=True):
        pytest.fail("it began")
    with pytest.raises(ImageError, match="no such file"):
        load_image("a\0b.png")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\nkind = "folder"\npath = "a\\u0000b"\n')
    assert main(["train", "stage2", "-c", str(recipe), "-o", str(tmp_path / "out")]) == 1
    assert "data.path contains a NUL character" in capsys.readouterr().err


def test_other_links_of_a_bundle_keep_their_content(tiny_bundle: Path, tmp_path: Path) -> None:
    """As after ``cp -al``: what is written into one bundle does not change the other."""
    bundle, linked = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")), tmp_path / "linked"
    Bundle.open(bundle)
    with staged(bundle / "optimized" / "cpu", force=True, marker=None) as staging:
        (staging / "optimized.json").write_text("{}")
    shutil.copytree(bundle, linked, copy_function=os.link)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in bundle.rglob("*") if path.is_file()}
    assert any(path.stat().st_nlink == 2 for path in before)
    (linked / "bundle.json").touch()  # no stamp holds: every file is hashed, and new stamps are written
    before[bundle / "bundle.json"] = (before[bundle / "bundle.json"][0], (bundle / "bundle.json").stat().st_mtime_ns)
    Bundle.open(linked)
    with staged(linked / "optimized" / "cpu", force=True, marker=None) as staging:
        (staging / "optimized.json").write_text('{"new": 1}')
    with staged(linked, force=True) as staging:
        shutil.copytree(tiny_bundle, staging, dirs_exist_ok=True)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}


@pytest.mark.skipif(sys.platform != "linux", reason="the locale is set as on Linux")
def test_names_and_prompts_in_a_locale_without_their_letters(tiny_bundle: Path, tmp_path: Path) -> None:
    draw_pictures(1)[0].save(tmp_path / "bär €.png")
    words = ["caption", str(tmp_path / "bär €.png"), "-b", str(tiny_bundle), "--threads", "1", "--prompt", "süß"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(*words, "--max-new-tokens", "2", "--json", env={**os.environ, **locale})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["prompt"] == "süß"
    assert json.loads(done.stdout)["image"].endswith("bär €.png")


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert main(["demo"]) == 1
    assert "this user has no home directory" in capsys.readouterr().err


# Two runs


def test_two_trainings_of_one_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="a training needs accelerate")
    from tests.training import recipes

    recipe = recipes.write(tmp_path / "recipe.toml")
    for flags in ([], ["--resume"], ["--force"]):
        with locked(tmp_path / "out"):
            assert main(["train", "stage2", "-c", str(recipe), "-o", str(tmp_path / "out"), *flags]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: another run writes {tmp_path / 'out'}: process {os.getpid()}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml"]


def test_two_runs_in_one_bundle(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    with locked(copy / "optimized" / "cpu"):
        assert main(["optimize", str(copy)]) == 1
        assert "another run writes" in capsys.readouterr().err
        words = ["calibrate", str(tiny_bundle), "--images", "examples/pictures", "-o", str(copy), "--force"]
        assert main(words) == 1
        assert "another run writes" in capsys.readouterr().err
    assert sorted(path.name for path in (copy / "optimized").iterdir()) == []
