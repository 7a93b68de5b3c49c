"""Small data sets on disk, each of ten pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2edge.training.data.shards import ShardWriter

PICTURES = 10


def picture(number: int) -> Image.Image:
    """A picture of one colour that tells its number."""
    return Image.fromarray(np.full((8, 8, 3), number * 20, np.uint8))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A directory of pictures 0.png to 9.png."""
    directory = tmp_path / "pictures"
    directory.mkdir()
    for number in range(PICTURES):
        picture(number).save(directory / f"{number}.png")
    return directory


@pytest.fixture
def captions(pictures: Path) -> Path:
    """COCO captions of them, two a picture, in a file beside the directory."""
    content = {
        "info": {"year": 2014},
        "images": [{"id": number, "file_name": f"{number}.png", "license": 1} for number in range(PICTURES)],
        "annotations": [
            {"id": 100 * copy + number, "image_id": number, "caption": f"caption {number} {'ab'[copy]} \n"}
            for copy in range(2)
            for number in range(PICTURES)
        ],
    }
    path = pictures.parent / "captions.json"
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


@pytest.fixture
def questions(pictures: Path) -> Path:
    """A question on each, named as VQA names its files; answers beside them."""
    asked = {
        "data_subtype": "val2014",
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(PICTURES)],
        "questions": [
            {"question_id": 1000 + number, "image_id": number, "question": f"How many of {number}?"}
            for number in range(PICTURES)
        ],
    }
    answered = {
        "annotations": [
            {
                "question_id": 1000 + number,
                "answer_type": "number",
                "question_type": "how many",
                "answers": [{"answer_id": n, "answer": "two" if n < 7 else "three"} for n in range(10)],
            }
            for number in range(PICTURES)
        ]
    }
    path = pictures.parent / "v2_OpenEnded_tiny_val2014_questions.json"
    path.write_text(json.dumps(asked), encoding="utf-8")
    path.with_name("v2_tiny_val2014_annotations.json").write_text(json.dumps(answered), encoding="utf-8")
    return path


@pytest.fixture
def folder(pictures: Path) -> Path:
    """The pictures with texts beside them; the first has two captions."""
    for number in range(PICTURES):
        text = f"caption {number}\n\nanother\n" if number == 0 else f"caption {number}"
        (pictures / f"{number}.txt").write_text(text, encoding="utf-8")
    return pictures


@pytest.fixture
def shards(pictures: Path, tmp_path: Path) -> Path:
    """The pictures in shards of four."""
    writer = ShardWriter(tmp_path / "shards", 4)
    for number in range(PICTURES):
        content = (pictures / f"{number}.png").read_bytes()
        writer.add(f"{number:04d}", content, ".png", [f"caption {number}"], {"image_id": f"p{number}"})
    writer.close()
    return tmp_path / "shards"
