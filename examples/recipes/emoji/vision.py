"""Trains a small picture encoder for the emoji recipe on pairs of drawings and names, as in CLIP.

    python examples/recipes/emoji/vision.py --data runs/emoji/data --out runs/emoji/vision

The vector of a picture is the mean of its patches; the vector of a name is the mean of its words' vectors. Both are
unit vectors, and each picture is compared with all names (cross-entropy of cosines over a learned temperature). Names
share words, so "red apple" and "green apple" have similar vectors. Each step augments the drawings anew. The encoder
starts from the miniature's, which was trained on the colours and shapes of the scenes. The output is a checkpoint for
`model.vision_from`, without the text side, and `vision.json` with the shares of names ranked first and among the
first five.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from blip2edge.examples.recipes.emoji.augment import augment, may_mirror, premultiplied
from blip2edge.examples.recipes.emoji.prepare import PICTURE_SIZE
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from blip2edge.model.vision.vit import VisionTransformer
from blip2edge.training.config import OptimizerConfig
from blip2edge.training.loading.batches import PREPROCESSING
from blip2edge.training.loop.optim import learning_rate, make_optimizer

START = Path(__file__).parents[2] / "checkpoint"
TEXT_WIDTH = 128
START_SCALE = 10.0  # initial factor of the cosines
SMOOTHING = 0.1
SAY_EVERY = 50  # steps


class Drawings(NamedTuple):
    """The output of `prepare.py`: uint8 [N, S, S, 4], the number of each drawing's name, and all names."""

    pixels: Tensor
    labels: Tensor
    names: list[str]

    @classmethod
    def load(cls, path: Path) -> Drawings:
        """Reads `drawings.npz`."""
        with np.load(path) as file:
            names, labels = np.unique(file["names"], return_inverse=True)
            return cls(torch.from_numpy(file["pixels"]), torch.from_numpy(labels), names.tolist())


class Names(nn.Module):
    """Vectors of all names: the means of their words' vectors."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        words = sorted({word for name in names for word in name.split("-")})
        number = {word: place for place, word in enumerate(words)}
        shares = torch.zeros(len(names), len(words))
        for row, name in enumerate(names):
            for word in name.split("-"):
                shares[row, number[word]] += 1 / len(name.split("-"))
        self.register_buffer("shares", shares)
        self.words = nn.Parameter(torch.randn(len(words), TEXT_WIDTH) * 0.1)
        self.scale = nn.Parameter(torch.tensor(START_SCALE).log())

    def forward(self, pictures: Tensor) -> Tensor:
        """Maps vectors [B, TEXT_WIDTH] to scaled cosines with all names, [B, N]."""
        vectors = F.normalize(self.get_buffer("shares") @ self.words, dim=-1)
        return self.scale.exp() * F.normalize(pictures, dim=-1) @ vectors.T


class Pair(nn.Module):
    """The picture encoder with a projection, and the names."""

    def __init__(self, vision: VisionTransformer, names: list[str]) -> None:
        super().__init__()
        self.vision = vision
        self.project = nn.Linear(vision.config.hidden_size, TEXT_WIDTH)
        self.names = Names(names)

    def forward(self, pictures: Tensor) -> Tensor:
        """Maps pictures float [B, 3, H, W] from 0 to 1 to scaled cosines with all names, [B, N]."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
        embeds = self.vision((pictures - mean) / std)  # [B, P, D], the class token first
        cosines: Tensor = self.names(self.project(embeds[:, 1:].mean(dim=1)))
        return cosines


def fit(pair: Pair, drawings: Drawings, config: OptimizerConfig, seed: int) -> list[float]:
    """Trains the pair in place. Returns the loss of every step."""
    draw = torch.Generator().manual_seed(seed)
    mirror = torch.tensor([may_mirror(name) for name in drawings.names])
    optimizer = make_optimizer([pair], config)
    losses: list[float] = []
    start = time.process_time()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        chosen = torch.randint(len(drawings.labels), (config.batch_size,), generator=draw)
        labels = drawings.labels[chosen]
        pictures = augment(premultiplied(drawings.pixels[chosen]), mirror[labels], PICTURE_SIZE, draw)
        loss = F.cross_entropy(pair(pictures), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        nn.utils.clip_grad_norm_(pair.parameters(), config.clip_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % SAY_EVERY == 0:
            recent, seconds = sum(losses[-SAY_EVERY:]) / SAY_EVERY, time.process_time() - start
            print(f"step {step + 1}/{config.steps} loss {recent:.3f} cpu {seconds:.0f} s", flush=True)
    return losses


@torch.no_grad()
def recall(pair: Pair, folder: Path, names: list[str]) -> dict[str, float]:
    """Shares of a folder's pictures whose name is ranked first, and among the first five."""
    paths = sorted(folder.glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    scores = torch.cat([pair(part) for part in torch.split(pictures, 50)])
    right = torch.tensor([names.index(path.stem) for path in paths])
    hits = scores.topk(min(5, len(names)), dim=1).indices == right[:, None]
    return {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(dim=1).float().mean().item()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains a small picture encoder for the emoji recipe.")
    parser.add_argument("--data", type=Path, required=True, help="output of prepare.py")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint directory to write")
    parser.add_argument(
        "--start",
        type=Path,
        default=START,
        help="a captioner for pictures of 64 pixels to start from (default: the miniature)",
    )
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    drawings = Drawings.load(options.data / "drawings.npz")
    model = load_checkpoint(options.start)
    vision: Any = model.vision
    pair = Pair(vision, drawings.names).train()
    config = OptimizerConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=min(100, options.steps // 4),
    )
    start = time.process_time()
    losses = fit(pair, drawings, config, options.seed)
    seconds = time.process_time() - start
    record = {
        "config": asdict(config),
        "cpu_seconds": round(seconds, 1),
        "final_loss": sum(losses[-SAY_EVERY:]) / len(losses[-SAY_EVERY:]),
        "names": len(drawings.names),
        "heldout_style": recall(pair, options.data / "test", drawings.names),
        "seen_style": recall(pair, options.data / "seen", drawings.names),
    }
    save_checkpoint(model, options.out, like=options.start)
    (options.out / "vision.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
