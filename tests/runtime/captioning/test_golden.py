"""The runtime compared with recorded results of transformers, without torch and on Python 3.10."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge import Captioner
from blip2edge.errors import BundleIntegrityError

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "answers.json").read_text(encoding="utf-8"))
OPTIONS = [case["options"] for case in CASES if case["image"] == "picture-0.png"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(GOLDEN / "bundle", tmp_path_factory.mktemp("golden") / "bundle"))


@pytest.fixture(scope="module")
def captioner(bundle: Path) -> Captioner:
    return Captioner.load(bundle, threads=1)


def test_the_answers_vary() -> None:
    assert len({tuple(case["tokens"]) for case in CASES}) > len(CASES) // 2
    assert {len(case["tokens"]) for case in CASES} > {12}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_each_alone(captioner: Captioner, number: int) -> None:
    case = CASES[number]
    result = captioner.caption(GOLDEN / case["image"], prompt=case["prompt"], **case["options"])
    assert list(result.tokens) == case["tokens"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_in_one_batch(captioner: Captioner, options: dict[str, Any]) -> None:
    cases = [case for case in CASES if case["options"] == options]
    results = captioner.caption_many(
        [GOLDEN / case["image"] for case in cases],
        prompts=[case["prompt"] for case in cases],
        batch_size=len(cases),
        **options,
    )
    assert [list(result.tokens) for result in results] == [case["tokens"] for case in cases]


def test_a_stream_is_the_text(captioner: Captioner) -> None:
    image: Path = GOLDEN / "picture-1.png"
    options: dict[str, Any] = {"prompt": "a photo of", "max_new_tokens": 12}
    text = captioner.caption(image, **options).text
    assert "".join(captioner.stream(image, **options)).strip() == text


def test_a_changed_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    weights = copy / "decoder.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=r"decoder\.onnx\.data"):
        Captioner.load(copy)


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="on 3.11 and newer torch is there for the other tests")
def test_no_torch_was_needed() -> None:
    assert "torch" not in sys.modules


def test_from_the_shell_to_the_last_word(bundle: Path) -> None:
    seconds = []  # of CPU time, which another load of the machine changes little
    picture = str(GOLDEN / "picture-0.png")
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "blip2edge", "caption", picture, "-b", str(bundle), "--threads", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stdout.strip()
    assert min(seconds) < 1.5  # promised
