"""CapFilt: kept captions, the report, and the same shards on one machine and on Ray."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from blip2edge.errors import DataError, OutputError
from blip2edge.training.capfilt.pipeline import CapFiltOptions, ScoredPicture, run_capfilt, score_batch
from blip2edge.training.capfilt.ray_backend import batch_from_json, batch_to_json
from blip2edge.training.data.entries import AnnotatedPicture, BrokenSamples, by_picture
from blip2edge.training.data.folder import read_folder
from blip2edge.training.data.shards import read_shards, shard_paths
from blip2edge.training.evaluation.models import ModelOptions, Vectors

if TYPE_CHECKING:
    from tests.drawing import Drawn

PICTURES = 7


def picture_number(picture: Image.Image) -> int:
    return int(np.asarray(picture)[0, 0, 0]) // 20


class Writer:
    """Says the right caption; of picture 5 what it has already."""

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str | None] | None = None) -> list[str]:
        assert prompts is not None
        return [
            f"{prompt or 'number'} {picture_number(picture)}" for picture, prompt in zip(pictures, prompts, strict=True)
        ]

    def question(self, text: str) -> str:
        return text


class Head:
    """Knows whether a caption ends with the picture's number."""

    has_head = True

    def image_vectors(self, pictures: Sequence[Image.Image]) -> Vectors:
        raise NotImplementedError

    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        raise NotImplementedError

    def probabilities(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]], *, logits: bool = False
    ) -> list[list[float]]:
        return [
            [0.9 if text.endswith(str(picture_number(picture))) else 0.1 for text in own]
            for picture, own in zip(pictures, texts, strict=True)
        ]


def judge_all(batches: Iterable[Sequence[AnnotatedPicture]], options: CapFiltOptions) -> Iterator[list[ScoredPicture]]:
    for batch in batches:
        yield score_batch(batch, Writer(), Head(), options.prompt)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures; the captions of odd ones are wrong, 5 has the synthetic one, 6 no picture behind its name."""
    directory = tmp_path / "web"
    directory.mkdir()
    for number in range(PICTURES):
        Image.fromarray(np.full((8, 8, 3), number * 20, np.uint8)).save(directory / f"{number}.png")
        text = f"web {number + number % 2}\n" + ("number 5\n" if number == 5 else "")
        (directory / f"{number}.txt").write_text(text)
    (directory / "6.png").write_bytes(b"no picture")
    return directory


def run(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    entries, broken = read_folder(folder, 3)
    options = {
        "captioner": Path("c"),
        "matcher": Path("m"),
        "captioning": ModelOptions(batch_size=3),
        **changes,
    }
    keywords = {"score_batches": judge_all, "force": options.pop("force", False)}
    return run_capfilt(by_picture(entries), broken, output, CapFiltOptions(**options), **keywords)


def kept(output: Path) -> list[tuple[str, str]]:
    entries = read_shards(shard_paths(output), BrokenSamples("shards", 0))
    return [(entry.image_id, entry.text) for entry in entries]


def test_what_is_good_enough_is_kept(folder: Path, tmp_path: Path) -> None:
    report = run(folder, tmp_path / "clean", samples_per_shard=4)
    assert kept(tmp_path / "clean") == [
        ("0.png", "web 0"),
        ("0.png", "number 0"),
        ("1.png", "number 1"),
        ("2.png", "web 2"),
        ("2.png", "number 2"),
        ("3.png", "number 3"),
        ("4.png", "web 4"),
        ("4.png", "number 4"),
        ("5.png", "number 5"),
    ]
    assert report["pictures"] == {"seen": 7, "kept": 6, "broken": 1}
    assert report["web"] == {"seen": 7, "kept": 4, "histogram": [0, 3, 0, 0, 0, 0, 0, 0, 0, 4]}
    assert report["synthetic"] == {"seen": 5, "kept": 5, "histogram": [0, 0, 0, 0, 0, 0, 0, 0, 0, 5]}
    assert list(report["broken"]) == ["6.png"]
    assert report["dropped"][0] == {"image_id": "1.png", "text": "web 2", "origin": "web", "probability": 0.1}
    assert [shard["file"] for shard in report["shards"]] == ["000000.tar", "000001.tar"]
    assert json.loads((tmp_path / "clean" / "report.json").read_text()) == report
    pictures = {
        entry.image_id: entry.picture for entry in read_shards(shard_paths(tmp_path / "clean"), BrokenSamples("", 0))
    }
    assert pictures["3.png"].read() == (folder / "3.png").read_bytes()


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("web", ["web 0", "web 2", "web 4", "number 5"]), ("synthetic", ["number 0", "number 1"])],
)
def test_one_origin_alone(folder: Path, tmp_path: Path, keep: str, expected: list[str]) -> None:
    run(folder, tmp_path / "clean", keep=keep)
    texts = [text for _, text in kept(tmp_path / "clean")]
    assert texts[: len(expected)] == expected
    assert len(texts) == (4 if keep == "web" else 5)


def test_a_threshold_that_nothing_reaches(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reaches the threshold 0\.95"):
        run(folder, tmp_path / "clean", threshold=0.95)
    assert [path.name for path in tmp_path.iterdir()] == ["web"]


def test_prompts_reach_the_captioner(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "clean", prompt="a photo of", keep="synthetic")
    assert kept(tmp_path / "clean")[0] == ("0.png", "a photo of 0")


def test_an_output_that_is_there(folder: Path, tmp_path: Path) -> None:
    first = run(folder, tmp_path / "clean")
    with pytest.raises(OutputError, match="exists"):
        run(folder, tmp_path / "clean")
    again = run(folder, tmp_path / "clean", force=True)
    assert again["shards"] == first["shards"]
    with pytest.raises(OutputError, match=r"no report\.json"):
        run(folder, folder, force=True)


def test_too_much_that_is_broken(folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match="4 samples are broken, and max_broken allows 3"):
        run(folder, tmp_path / "clean")


def test_a_batch_travels_as_text(folder: Path) -> None:
    batch = by_picture(read_folder(folder, 0)[0])
    again = batch_from_json(batch_to_json(batch))
    assert [(shown.image_id, shown.captions) for shown in again] == [(s.image_id, s.captions) for s in batch]
    assert [shown.picture for shown in again] == [shown.picture for shown in batch]


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Drawn, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A captioner and a model with a matching head, both random."""
    from tests.families.drawing_blip import save_blip2

    directory = tmp_path_factory.mktemp("matcher")
    save_blip2(directory, 0)
    return tiny_checkpoint.directory, directory


Command = Callable[..., int]


@pytest.fixture
def command(folder: Path, models: tuple[Path, Path], tmp_path: Path) -> Command:
    """`blip2edge capfilt` on the folder."""
    from blip2edge.cli import main

    (folder / "6.png").unlink()
    (folder / "6.txt").unlink()

    def run(output: Path, *flags: str) -> int:
        captioner, matcher = map(str, models)
        given = ["--captioner", captioner, "--matcher", matcher, "--threads", "1", "--batch-size", "2"]
        return main(["capfilt", str(folder), "-o", str(output), *given, *flags])

    return run


def test_the_command(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path / "clean", "--threshold", "0.001", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"]["kept"] == 6
    assert report["synthetic"]["seen"] > 0
    assert command(tmp_path / "other", "--threshold", "0.001") == 0
    assert "next: train on them" in capsys.readouterr().out
    assert kept(tmp_path / "other") == kept(tmp_path / "clean")
    assert command(tmp_path / "clean") == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # Ray's own, about itself
@pytest.mark.slow
def test_ray_makes_the_same_shards(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'blip2edge[ray]'")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token to the home directory
    assert command(tmp_path / "here", "--threshold", "0.3", "--json") == 0
    here = json.loads(capsys.readouterr().out)
    assert command(tmp_path / "ray", "--threshold", "0.3", "--json", "--ray", "local", "--workers", "2") == 0
    there = json.loads(capsys.readouterr().out)
    assert {**there, "seconds": 0} == {**here, "seconds": 0}
    for shard in here["shards"]:
        name = shard["file"]
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_without_ray_the_command_says_what_to_install(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert command(tmp_path / "ray", "--ray", "local") == 2
    assert "pip install 'blip2edge[ray]'" in capsys.readouterr().err
