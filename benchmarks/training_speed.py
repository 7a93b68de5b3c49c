"""Compares a step of stage 2 in this project's loop with the same computation in transformers' modules.

    python benchmarks/training_speed.py --json benchmarks/results/training-speed.json

All steps run in one process on one thread, in turn (A B C A B C …); their process CPU time is measured. Results are
medians, and ratios within each round. Weights are random, without dropout; transformers' step uses torch's AdamW with
its defaults. transformers' pictures are loaded and preprocessed beforehand; this project's loop loads, preprocesses and
logs as in training. This project's step is measured without and with a disk cache of the vision features (no
picture is then encoded). Two models are measured: one of the size of the example checkpoint, and ViT-B/16 at 224 pixels
with a 12-layer Q-Former of 32 queries and OPT-125m.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from random_checkpoint import SHAPE
from reporting import CHECKPOINT, command, in_turn, machine, median_ratio, parser_of, python, write_json
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

from blip2edge.cli import run_script
from blip2edge.model.checkpoint.directory import load_checkpoint
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.training.config import OptimizerConfig, TrainingConfig
from blip2edge.training.data.sources import Sample
from blip2edge.training.loading.batches import IGNORED, caption_batch
from blip2edge.training.loading.features import FeatureCache, FrozenEncoder
from blip2edge.training.loading.loader import Loader, TextMakers
from blip2edge.training.loop import loop
from blip2edge.training.loop.journal import Journal
from blip2edge.training.loop.snapshots import Snapshots
from blip2edge.training.loop.training_run import TrainingRun
from blip2edge.training.phases.stage2 import GenerativeStage
from blip2edge.training.setup.model_parts import ModelParts

WORDS = 16  # tokens of a caption, the end token included
CONFIG = OptimizerConfig(steps=1000, learning_rate=1e-5, min_learning_rate=0.0, warmup_steps=0)
BOS = 2


@dataclass(frozen=True)
class Shape:
    """A measured model: its config, and the number of pictures per training step."""

    config: dict[str, Any]
    rows: int

    @property
    def side(self) -> int:
        return int(self.config["vision_config"]["image_size"])

    @property
    def features(self) -> tuple[int, int]:
        vision = self.config["vision_config"]
        return (self.side // vision["patch_size"]) ** 2 + 1, vision["hidden_size"]

    @property
    def queries(self) -> int:
        return int(self.config["num_query_tokens"])

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(size={"height": self.side, "width": self.side})


def shapes() -> dict[str, Shape]:
    """Returns the measured models; the sizes of the small model are those of the example checkpoint."""
    miniature = json.loads((CHECKPOINT / "config.json").read_text())
    return {"miniature": Shape(miniature, 16), "ViT-B/16, OPT-125m": Shape(SHAPE, 4)}


def draw(config: dict[str, Any]) -> Blip2ForConditionalGeneration:
    """Makes the model with random weights and without dropout."""
    shape = json.loads(json.dumps(config)) | {"dtype": "float32"}
    shape["qformer_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape["text_config"] |= {"dropout": 0.0}
    torch.manual_seed(0)
    return Blip2ForConditionalGeneration(Blip2Config(**shape))


class Pictures:
    """A source of a few pictures, repeated without end."""

    name = "pictures"

    def __init__(self, shape: Shape) -> None:
        self.broken: dict[str, str] = {}  # none ever is
        rng = np.random.default_rng(0)
        size = (shape.rows, shape.side, shape.side, 3)
        self.pictures = [Image.fromarray(pixels) for pixels in rng.integers(0, 256, size, dtype=np.uint8)]

    def __iter__(self) -> Iterator[Sample]:

        def shown(picture: Image.Image) -> Callable[[], Image.Image]:
            return lambda: picture

        while True:
            for number, picture in enumerate(self.pictures):
                yield Sample(f"s{number}", f"p{number}", shown(picture), "")

    def accept(self, sample: Sample) -> None:
        del sample

    def check_usable(self, use: Any) -> None:
        """Does nothing: every picture is drawn here."""

    def reject(self, sample: Sample, error: Exception) -> None:
        raise SystemExit(f"{sample.sample_id}: {error}")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def captions(rows: int) -> list[list[int]]:
    """Returns random token ids of captions, ``WORDS`` ids per caption."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(5, 300, (rows, WORDS), generator=draw).tolist()


def theirs(model: Blip2ForConditionalGeneration, shape: Shape, source: Pictures) -> Callable[[], float]:
    """Returns a function that makes one training step with transformers' modules and returns the loss."""
    model.requires_grad_(False)
    trained = nn.ModuleList([model.qformer, model.language_projection])
    trained.requires_grad_(True)
    model.query_tokens.requires_grad_(True)
    model.eval()
    trained.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": CONFIG.weight_decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.learning_rate, betas=(CONFIG.beta1, CONFIG.beta2))
    rows = len(source.pictures)
    pixels = torch.from_numpy(shape.preprocessing.batch(source.pictures))
    batch = caption_batch([[BOS]] * rows, captions(rows))
    labels = torch.cat([torch.full((rows, shape.queries), IGNORED), batch.labels], dim=1)
    mask = torch.ones_like(labels)

    def step() -> float:
        with torch.no_grad():
            embeds = model.vision_model(pixels).last_hidden_state
        queries = model.qformer(
            query_embeds=model.query_tokens.expand(rows, -1, -1), encoder_hidden_states=embeds
        ).last_hidden_state
        words = model.get_input_embeddings()(batch.input_ids)
        inputs = torch.cat([model.language_projection(queries), words], dim=1)
        loss: Tensor = model.language_model(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CONFIG.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def ours(directory: Path, shape: Shape, source: Pictures, cache: FeatureCache | None) -> Callable[[], float]:
    """Returns a function that makes one step of this project's training loop and returns the loss."""
    model = load_checkpoint(directory)
    accelerator = Accelerator(cpu=True)
    encoder = FrozenEncoder(model.vision, shape.preprocessing, accelerator, cache)
    module = GenerativeStage(model)
    rows = len(source.pictures)
    texts = TextMakers(lambda samples: caption_batch([[BOS]] * len(samples), captions(len(samples))))
    loader = Loader(source, rows, encoder, texts, accelerator)
    phase = loop.Phase("stage2", module, loader, CONFIG)
    parts = ModelParts(model, shape.preprocessing, Tokenizer.from_file(str(directory / "tokenizer.json")))
    journal, snapshots = Journal(None), Snapshots(directory / "none")
    run = TrainingRun("stage2", TrainingConfig(), directory, accelerator, parts, journal, snapshots)
    prepared = loop._prepare(run, phase)

    def step() -> float:
        values = loop._step(prepared, 0)
        run.journal.add(values)
        return values["loss"]

    return step


def race(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of each function in ``steps`` by round, after a warm-up round.

    Exits if the losses that the functions return differ.
    """

    def check(losses: dict[str, float]) -> None:
        values = list(losses.values())
        if max(values) - min(values) > 1e-3 * max(values):
            raise SystemExit(f"the losses differ: {losses}")

    return in_turn(steps, rounds, check)[0]


def measure(shape: Shape, rounds: int) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Measures one model; returns the CPU seconds of all rounds, and the rows of the table."""
    source = Pictures(shape)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        model = draw(shape.config)
        model.save_pretrained(directory)
        Tokenizer(models.BPE()).save(str(directory / "tokenizer.json"))
        cache = FeatureCache(directory / "features", shape.features, "float32")
        steps = {
            "transformers' modules": theirs(model, shape, source),
            "blip2edge": ours(directory, shape, source, None),
            "blip2edge, features cached": ours(directory, shape, source, cache),
        }
        seconds = race(steps, rounds)
    base = seconds["transformers' modules"]
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append({"name": name, "cpu_seconds": round(median, 4), "ratio": round(median_ratio(values, base), 3)})
    return seconds, rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of the large model; the small one has ten times as many"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for number, (name, shape) in enumerate(shapes().items()):
        rounds = options.rounds if number else 10 * options.rounds
        seconds, rows = measure(shape, rounds)
        results.append({"shape": name, "pictures": shape.rows, "results": rows, "rounds": seconds})
        print(f"\n{name}, {shape.rows} pictures a step, {rounds} rounds")
        print("| a step of stage 2 | CPU seconds | of transformers' time |\n|---|---:|---:|")
        for row in rows:
            print(f"| {row['name']} | {row['cpu_seconds']:.3f} | {row['ratio']:.2f} |")
    if options.json:
        document = {
            "command": command(),
            "machine": {**machine(), "threads": 1},
            "versions": python("torch", "transformers", "accelerate", "numpy"),
            "caption_tokens": WORDS,
            "shapes": results,
        }
        write_json(options.json, document)


if __name__ == "__main__":
    run_script(main)
