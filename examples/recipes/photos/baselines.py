"""Names the held-out photographs without captioner: what the encoder's features and its classifier allow.

    python examples/recipes/photos/baselines.py --data runs/photos/data --vision runs/photos/vision

Three baselines, each with one noun for a photograph, counted as score.py counts captions:

    features     the noun whose training views are nearest: cosine similarity of the mean feature of all cells to the
                 mean of each noun, after the mean of all views is subtracted
    classes      the same with the square roots of the classifier's probabilities in place of the features
    classifier   the noun of the class with the largest logit, of the classes that have a noun (classes.py)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from blip2edge.cli import run_script
from blip2edge.errors import DataError
from blip2edge.examples.recipes.photos.classes import class_nouns
from blip2edge.examples.recipes.photos.encoder import CLASSIFIER
from blip2edge.examples.recipes.photos.score import names_it
from blip2edge.model.checkpoint.encoder import load_encoder
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.reading import read_text

BATCH = 64
CAPTION = "a photo of "


@torch.no_grad()
def pooled(paths: Sequence[Path], vision: Path) -> Tensor:
    """Returns the mean feature of each picture, float32 [N, D]."""
    model, preprocessing = load_encoder(vision), load_preprocessing(vision).preprocessing
    found = []
    for start in range(0, len(paths), BATCH):
        pictures = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
        pixels = torch.from_numpy(np.stack([preprocessing(picture) for picture in pictures]))
        found.append(model(pixels).mean(1))
    return torch.cat(found)


def nearest(views: Tensor, nouns: Sequence[str], photographs: Tensor) -> list[str]:
    """Returns for each photograph the noun whose views are nearest to it.

    Args:
        views: One row for each training view, [N, D].
        nouns: Noun of each view.
        photographs: One row for each photograph, [M, D].
    """
    names, middle = sorted(set(nouns)), views.mean(0)
    rows = F.normalize(views - middle, dim=1)
    means = torch.stack([rows[[noun == name for noun in nouns]].mean(0) for name in names])
    similarity = F.normalize(photographs - middle, dim=1) @ F.normalize(means, dim=1).T
    return [names[number] for number in similarity.argmax(1).tolist()]


def caption_of(path: Path) -> str:
    """Returns the text next to a picture."""
    return read_text(path.with_suffix(".txt"), DataError).strip()


def main() -> None:
    """Parses the command line, encodes all pictures and prints the counts."""
    parser = argparse.ArgumentParser(description="Names the held-out photographs without captioner.")
    parser.add_argument("--data", type=Path, required=True, help="output of prepare.py")
    parser.add_argument("--vision", type=Path, required=True, help="output of encoder.py")
    options = parser.parse_args()
    paths = sorted((options.data / "train").glob("*.jpg"))
    held_out = sorted((options.data / "test").glob("*.png"))
    if not paths or not held_out:
        raise DataError(f"expected pictures in {options.data}/train and /test", "give the output of prepare.py")
    nouns = [caption_of(path).removeprefix(CAPTION).partition(" ")[2] for path in paths]
    known = [path for path in held_out if names_it(" ".join(f"a {noun}" for noun in set(nouns)), caption_of(path))]
    titles = [caption_of(path) for path in known]
    views, photographs = pooled(paths, options.vision), pooled(known, options.vision)
    stored, of_class = load_file(options.vision / CLASSIFIER), class_nouns(set(nouns))
    logits, shown = (F.linear(rows, stored["weight"], stored["bias"]) for rows in (views, photographs))
    classes = sorted(of_class)
    named = {
        "features": nearest(views, nouns, photographs),
        "classes": nearest(logits.softmax(1).sqrt(), nouns, shown.softmax(1).sqrt()),
        "classifier": [of_class[classes[number]] for number in shown[:, classes].argmax(1).tolist()],
    }
    counts = {
        name: sum(names_it(noun, title) for noun, title in zip(found, titles, strict=True))
        for name, found in named.items()
    }
    print(json.dumps({"photographs": len(known), **counts}, indent=2))


if __name__ == "__main__":
    run_script(main)
