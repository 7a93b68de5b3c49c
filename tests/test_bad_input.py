"""Wrong input on the command line: a one-line error, the right exit status, no incomplete output."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the checkpoint and the bundle are made here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.cli import main
from tests.drawing import Drawn, draw_pictures, rewrite_tensors

BLIP2EDGE = (sys.executable, "-m", "blip2edge")


def run(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [*BLIP2EDGE, *map(str, words)], capture_output=True, text=True, timeout=300, check=False, **more
    )


def png(path: Path, width: int, height: int) -> Path:
    """A PNG that says how large it is, and holds a single row of nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 64)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("pictures") / "picture.png"
    draw_pictures(1)[0].save(path)
    return path


def spoil_picture(path: Path, picture: Path, how: str) -> Path:
    """A picture that is none."""
    if how == "missing":
        return path
    if how == "a directory":
        path.mkdir()
    elif how == "of no pixels":
        png(path, 0, 5)
    elif how == "of 10^9 pixels":
        png(path, 40_000, 25_000)
    else:
        path.write_bytes({"empty": b"", "broken": b"\x89PNG\r\n", "cut": picture.read_bytes()[:500]}[how])
    return path


def one_line(text: str, told: str) -> None:
    assert text.startswith("error: "), text
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert told in text, text


def last_line(text: str, told: str) -> None:
    """Behind the lines of progress."""
    assert "Traceback" not in text
    one_line(text.splitlines(keepends=True)[-1], told)
    assert text.count("error: ") == 1, text


@pytest.mark.parametrize("how", ["missing", "a directory", "of no pixels", "of 10^9 pixels", "empty", "broken", "cut"])
def test_pictures(how: str, picture: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bad = spoil_picture(tmp_path / "bad.png", picture, how)
    done = run("caption", picture, bad, "-b", tiny_bundle, "--max-new-tokens", "2", "--threads", "1")
    one_line(done.stderr, "bad.png")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1, "the picture before it has its caption"


def changed(bundle: Path) -> None:
    data = bytearray((bundle / "decoder.onnx.data").read_bytes())
    data[0] ^= 1
    (bundle / "decoder.onnx.data").write_bytes(data)


def newer(bundle: Path) -> None:
    values = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(values | {"schema_version": 2}))


BUNDLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed": (changed, "decoder.onnx.data does not match bundle.json"),
    "missing file": (lambda bundle: (bundle / "bridge.onnx").unlink(), "bridge.onnx is missing"),
    "newer": (newer, "schema version 2"),
    "no bundle": (lambda bundle: (bundle / "bundle.json").unlink(), "has no bundle.json"),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_bundles(name: str, picture: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    change, told = BUNDLES[name]
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    change(bundle)
    done = run("caption", picture, "-b", bundle)
    one_line(done.stderr, told)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--prompt", "two " * 80], 1, "context has 64"),
        (["--prompt", "a", "--prompt", "b"], 2, "--prompt"),
        (["--num-beams", "3", "--stream"], 2, "--stream"),
        (["--num-beams", "3", "--temperature", "1"], 2, "--num-beams"),
        (["--min-new-tokens", "9", "--max-new-tokens", "3"], 2, "--min-new-tokens"),
        (["--backend", "tensorrt"], 1, "tensorrt"),
    ],
)
def test_prompts_and_options(words: list[str], status: int, told: str, picture: Path, tiny_bundle: Path) -> None:
    done = run("caption", picture, "-b", tiny_bundle, *words)
    one_line(done.stderr, told)
    assert (done.returncode, done.stdout) == (status, "")


# Checkpoints: in this process, since each new one would import torch; two in one of their own


@pytest.fixture
def checkpoint(tiny_checkpoint: Drawn, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint.directory, tmp_path / "checkpoint"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


FC1 = "language_model.model.decoder.layers.1.fc1.weight"


def without_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def of_type(checkpoint: Path, model_type: str = "kosmos-2") -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(values | {"model_type": model_type}))


def truncated(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 30_000)


def misshapen(tensors: dict[str, Any]) -> None:
    tensors[FC1] = tensors[FC1][1:]


def unknown(tensors: dict[str, Any]) -> None:
    tensors["adapter.weight"] = tensors[FC1].clone()


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (without_config, "has no config.json"),
    "missing tensor": (lambda path: rewrite_tensors(path, lambda tensors: tensors.pop(FC1)), FC1),
    "unknown tensor": (lambda path: rewrite_tensors(path, unknown), "adapter.weight"),
    "misshapen tensor": (lambda path: rewrite_tensors(path, misshapen), f"{FC1} has shape [63, 32]"),
    "unsupported type": (of_type, "supported: "),
    "truncated": (truncated, "cannot be read as a whole safetensors file"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, checkpoint: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, told = CHECKPOINTS[name]
    change(checkpoint)
    assert main(["export", str(checkpoint), "-o", str(out / "bundle")]) == 1
    printed = capfd.readouterr()
    last_line(printed.err, told)
    assert printed.out == ""
    assert os.listdir(out) == []


def test_an_output_that_exists(
    checkpoint: Path, tiny_bundle: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(tiny_bundle, out / "bundle")
    before = sorted(os.listdir(bundle))
    assert main(["export", str(checkpoint), "-o", str(bundle)]) == 1
    last_line(capfd.readouterr().err, "--force")
    assert sorted(os.listdir(bundle)) == before
    assert os.listdir(out) == ["bundle"]


def test_no_such_checkpoint(out: Path) -> None:
    done = run("export", out / "nowhere", "-o", out / "bundle")
    last_line(done.stderr, "there is no directory")
    assert (done.returncode, done.stdout, os.listdir(out)) == (1, "", [])


LIMIT = 40_000  # bytes: less than the largest file of the bundle


def test_a_file_that_cannot_grow(small: Drawn, out: Path) -> None:
    """As on a full disk, but for the reason told: the system refuses a write in the middle."""
    done = run(
        "export", small.directory, "-o", out / "bundle",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
    )  # fmt: skip
    last_line(done.stderr, "could not be written; raise the limit (ulimit -f)")
    assert (done.returncode, done.stdout, os.listdir(out)) == (1, "", [])


LOADED = """
import sys
from blip2edge.cli import main
print(main(sys.argv[1:]), sorted({"torch", "transformers"} & {*sys.modules}))
"""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("export", "nothere", "-o", "new"), "there is no directory nothere"),
        (("export", ".", "-o", "new"), "has no model.safetensors and no model.safetensors.index.json"),
        (("export", "org/name", "-o", "new"), "is not in the hub's cache"),
        (("export", "hub:org/name", "-o", "new"), "is not in the hub's cache"),
        (("train", "stage2", "-c", "nope.toml", "-o", "new"), "nope.toml cannot be read"),
        (("build", "nothere"), "nothere is not a directory"),
    ],
)
def test_a_wrong_path_is_refused_before_heavy_packages_are_imported(
    words: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    """The import of torch takes more than a second."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=60,
    )
    one_line(done.stderr, told)
    assert done.stdout == "1 []\n"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_an_export(number: signal.Signals, status: int, small: Drawn, out: Path) -> None:
    """Sent when a part of the bundle has been written."""
    words = (*BLIP2EDGE, "export", str(small.directory), "-o", str(out / "bundle"))
    # A shell starts background jobs with SIGINT ignored, and children inherit that: here it counts again.
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not list(out.glob(".bundle.part/new/*.data")):
            assert process.poll() is None, "it ended before it wrote"
            time.sleep(0.005)
        process.send_signal(number)
        printed, told = process.communicate(timeout=240)
    assert process.returncode == status, told
    assert "Traceback" not in told
    assert printed == ""
    assert os.listdir(out) == []
