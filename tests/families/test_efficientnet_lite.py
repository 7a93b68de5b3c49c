"""A captioner with EfficientNet-Lite as vision encoder: export, captions, INT8, and both stages of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

import torch

from blip2edge.bundle.bundle import Bundle
from blip2edge.calibration.pipeline import calibrate
from blip2edge.errors import UnsupportedModelError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.checkpoint.directory import load_checkpoint
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.families.registry import read_config, write_config
from blip2edge.model.vision.efficientnet_lite import EfficientNetLiteConfig
from blip2edge.runtime.captioning.captioner import Captioner
from tests import drawing_photos
from tests.drawing import Drawn, draw_pictures

TINY = EfficientNetLiteConfig(image_size=64, width_coefficient=0.25, depth_coefficient=0.5, normalize=True)


class Exported(NamedTuple):
    checkpoint: Path
    bundle: Path


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Drawn, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("efficientnet")
    drawing_photos.save_captioner(folder / "checkpoint", tiny_checkpoint.directory, TINY)
    return Exported(folder / "checkpoint", export_checkpoint(folder / "checkpoint", folder / "bundle").bundle)


def test_the_config_is_read_as_written(exported: Exported) -> None:
    values = json.loads((exported.checkpoint / "config.json").read_text())
    config = read_config(values)
    assert isinstance(config, CaptionerConfig)
    assert config.vision == TINY
    assert config.bridge.num_visual_tokens == 4
    assert {key: values[key] for key in write_config(config)} == write_config(config)
    values["vision_config"]["model_type"] = "swin"
    with pytest.raises(UnsupportedModelError, match="vision encoder is of type 'swin'"):
        read_config(values)


@torch.no_grad()
def test_captions_of_the_bundle_are_those_of_torch(exported: Exported) -> None:
    model = load_checkpoint(exported.checkpoint)
    preprocessing = load_preprocessing(exported.checkpoint).preprocessing
    pictures = draw_pictures(3)
    captioner = Captioner.load(exported.bundle, threads=1)
    found = set()
    for picture in pictures:
        pixels = torch.from_numpy(preprocessing.batch([picture]))
        visual = model.visual_tokens(pixels)
        ids = [model.config.bos_token_id or 0]
        for _ in range(6):
            ids.append(int(model(visual, torch.tensor([ids]))[0, -1].argmax()))
        tokens = captioner.caption(picture, max_new_tokens=6).tokens
        assert tokens == tuple(ids[1 : 1 + len(tokens)])
        found.add(tokens)
    assert len(found) > 1, "the pictures have no effect on the captions"


def test_int8_leaves_the_convolutions_in_floating_point(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(draw_pictures(4)):
        picture.save(folder / f"{number}.png")
    calibrate(exported.bundle, tmp_path / "int8", images=folder)
    graphs = Bundle.open(tmp_path / "int8").manifest.graphs
    found = {name: graphs[name].precision for name in ("vision_encoder", "bridge", "decoder")}
    assert found == {"vision_encoder": "fp32", "bridge": "int8", "decoder": "int8-weights"}
    picture = draw_pictures(1)[0]
    quantized = Captioner.load(tmp_path / "int8", threads=1).caption(picture, max_new_tokens=4)
    assert quantized.tokens
