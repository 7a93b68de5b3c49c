"""Imagines features of animals from the classifier of the picture encoder, as further training data.

    python examples/recipes/photos/imagine.py --data runs/photos/data --vision runs/photos/vision

Most animals have one photograph in the training packages, but the frozen encoder was trained to tell them apart on
ImageNet. Its classifier takes the mean over all cells of the last feature map, so a class can be imagined without a
picture: the features of a training view are moved, in a part of the picture, until the classifier finds the class.

1. `f = relu6(W z + b)` are the features, with the encoder's last convolution W. z is moved, not f, so that the result
   is an output of this convolution.
2. The move is the same in all cells of a blob, and lies in the space of the training views: `A u`, where `A Aᵗ` is the
   covariance of their mean z. If the classes are normal distributions of one covariance S, their means differ by S w,
   with the rows w of the classifier (linear discriminant analysis); steps along the gradient by u give this direction.
3. The steps end at a random probability of the class.

The caption is `a photo of a NOUN`, with the noun of the class (classes.py). The output is one `.npy` file of features
[49, 1280] in float16 and one `.txt` file for each sample, in the folder `imagined` of the data. No held-out picture is
used.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from blip2edge.cli import run_script
from blip2edge.errors import DataError
from blip2edge.examples.recipes.outputs import check_new
from blip2edge.examples.recipes.photos.classes import class_nouns
from blip2edge.examples.recipes.photos.cutouts import article
from blip2edge.examples.recipes.photos.encoder import CLASSIFIER
from blip2edge.model.checkpoint.encoder import load_encoder
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.vision.efficientnet_lite import EfficientNetLite
from blip2edge.reading import MANIFEST_BYTES, parse_json, read_bytes, reading

VIEWS = 1000  # training views that are moved
BATCH = 64
STEP, STEPS = 1.5, 30  # length of a step by u, largest number of steps
PROBABILITY = (0.5, 0.97)  # of the class, at which the steps end
START = 0.3  # standard deviation of the first u
WIDTH = (1.2, 3.0)  # standard deviation of the blob, in cells


class Imagination:
    """Moves features of pictures to classes.

    Args:
        head: The encoder's last convolution, 1 x 1: weight [D, C] and bias [D].
        classifier: The classifier: weight [K, D] and bias [K].
        views: Inputs z of the last convolution for training views, [N, P, C]; P is a square.
        seed: Seed of all draws.
    """

    def __init__(
        self, head: tuple[Tensor, Tensor], classifier: tuple[Tensor, Tensor], views: Tensor, seed: int
    ) -> None:
        self._head, self._classifier, self._views = head, classifier, views
        self._draw = torch.Generator().manual_seed(seed)
        means = views.mean(1)  # [N, C]
        small = 1e-4 * means.var(0).mean()  # for directions without variance
        values, vectors = torch.linalg.eigh(torch.cov(means.T) + small * torch.eye(means.shape[1]))
        self._space = vectors * values.clamp(min=0).sqrt()  # A, [C, C]

    def features(self, z: Tensor) -> Tensor:
        """Maps z [B, P, C] to features [B, P, D]."""
        return F.relu6(F.linear(z, *self._head))

    def log_probability(self, z: Tensor, classes: Tensor) -> Tensor:
        """Returns the logarithm of the probability of each row's class, [B]."""
        logits = F.linear(self.features(z).mean(1), *self._classifier)
        return logits.log_softmax(-1).gather(1, classes[:, None])[:, 0]

    def _uniform(self, rows: int, columns: int, bounds: tuple[float, float]) -> Tensor:
        low, high = bounds
        return low + (high - low) * torch.rand(rows, columns, generator=self._draw)

    def _blobs(self, rows: int) -> Tensor:
        """Draws a weight of each cell, [B, P, 1]: 1 at a point near the middle, less around it."""
        side = round(self._views.shape[1] ** 0.5)
        points = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # [P, 2]
        middle = self._uniform(rows, 2, (side * 2 / 7, side * 4 / 7))
        distance = (points - middle[:, None]).square().sum(-1)
        return torch.exp(-distance / (2 * self._uniform(rows, 1, WIDTH).square()))[:, :, None]

    def imagine(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Moves a drawn training view for each of the classes [B].

        Returns:
            Features [B, P, D], and the probability of the class in each row, [B].
        """
        rows = len(classes)
        start = self._views[torch.randint(len(self._views), (rows,), generator=self._draw)]
        blobs = self._blobs(rows)
        wanted = self._uniform(rows, 1, PROBABILITY)[:, 0].log()
        u = START * torch.randn(rows, start.shape[2], generator=self._draw)
        for _ in range(STEPS):
            u.requires_grad_(True)
            found = self.log_probability(start + blobs * (u @ self._space.T)[:, None], classes)
            going = found.detach() < wanted
            if not going.any():
                break
            (gradient,) = torch.autograd.grad(found.sum(), u)
            u = (u + STEP * going[:, None] * F.normalize(gradient, dim=1)).detach()
        with torch.no_grad():
            z = start + blobs * (u @ self._space.T)[:, None]
            return self.features(z), self.log_probability(z, classes).exp()


@torch.no_grad()
def encoded(vision: EfficientNetLite, pixels: Tensor) -> Tensor:
    """Returns the input of the encoder's last convolution, cell by cell: [B, P, C]."""
    x = F.relu6(vision.stem(pixels))
    for block in vision.blocks:
        x = block(x)
    return x.flatten(2).transpose(1, 2)


def read_views(folder: Path, vision: Path, seed: int) -> tuple[EfficientNetLite, Tensor]:
    """Encodes drawn training views; returns the encoder and the inputs of its last convolution, [N, P, C].

    Raises:
        DataError: The folder has no views, or the encoder is none of encoder.py.
    """
    model, preprocessing = load_encoder(vision), load_preprocessing(vision).preprocessing
    paths = sorted(folder.glob("*.jpg"))
    if not paths or not isinstance(model, EfficientNetLite):
        raise DataError(
            f"expected views in {folder} and an EfficientNet-Lite in {vision}, got {len(paths)} views and a"
            f" {type(model).__name__}",
            "run prepare.py and encoder.py first",
        )
    chosen = np.random.default_rng(seed).permutation(len(paths))[:VIEWS]
    found = []
    for start in range(0, len(chosen), BATCH):
        pictures = [Image.open(paths[number]).convert("RGB") for number in chosen[start : start + BATCH]]
        found.append(encoded(model, torch.from_numpy(np.stack([preprocessing(picture) for picture in pictures]))))
    return model, torch.cat(found)


def write_imagined(imagination: Imagination, nouns: Mapping[int, str], out: Path, each: int, seed: int) -> float:
    """Writes `each` samples of every noun; its classes take turns. Returns the mean probability of the classes."""
    out.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    wanted: list[tuple[int, str]] = []
    for noun in sorted(set(nouns.values())):
        classes = draw.permutation([number for number, name in nouns.items() if name == noun])
        wanted += [(int(classes[number % len(classes)]), noun) for number in range(each)]
    probabilities = []
    for start in range(0, len(wanted), BATCH):
        batch = wanted[start : start + BATCH]
        features, found = imagination.imagine(torch.tensor([number for number, _ in batch]))
        probabilities.append(found)
        for place, ((_, noun), rows) in enumerate(zip(batch, features, strict=True), start):
            stem = f"{noun.replace(' ', '_')}-{place:05d}"
            np.save(out / f"{stem}.npy", rows.half().numpy())
            (out / f"{stem}.txt").write_text(f"a photo of {article(noun)}\n", encoding="utf-8")
    return float(torch.cat(probabilities).mean())


def main() -> None:
    """Parses the command line, fetches the names of the classes, and writes the samples."""
    parser = argparse.ArgumentParser(description="Imagines features of animals from the encoder's classifier.")
    parser.add_argument("--data", type=Path, required=True, help="output of prepare.py; gets the folder `imagined`")
    parser.add_argument("--vision", type=Path, required=True, help="output of encoder.py")
    parser.add_argument("--each", type=int, default=24, help="samples of each noun")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, record = options.data / "imagined", options.data / "data.json"
    check_new(out)
    with reading(record, "the output of prepare.py", DataError, "give the directory that prepare.py wrote"):
        names = set(parse_json(read_bytes(record, MANIFEST_BYTES))["names"])
    nouns = class_nouns(names)
    vision, views = read_views(options.data / "train", options.vision, options.seed)
    stored = load_file(options.vision / CLASSIFIER)
    head = (vision.head.weight.detach()[:, :, 0, 0], vision.head.bias.detach())  # type: ignore[union-attr]
    imagination = Imagination(head, (stored["weight"], stored["bias"]), views, options.seed)
    mean = write_imagined(imagination, nouns, out, options.each, options.seed)
    print(
        f"{out}: {options.each} samples of {len(set(nouns.values()))} nouns; mean probability of the class {mean:.2f}"
    )


if __name__ == "__main__":
    run_script(main)
