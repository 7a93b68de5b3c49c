"""The photo recipe's imagined features: nouns of the encoder's classes, moves of features, files for training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from blip2edge.errors import DataError
from blip2edge.examples.recipes.photos import baselines, imagine
from blip2edge.examples.recipes.photos.classes import Synset, class_noun, kinds, read_synsets
from blip2edge.examples.recipes.photos.encoder import CLASSIFIER, write_encoder
from blip2edge.model.checkpoint.encoder import load_encoder
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.vision.efficientnet_lite import EfficientNetLiteConfig
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.registry import open_sample_source
from tests.drawing_photos import package_state

TINY = EfficientNetLiteConfig(image_size=64, width_coefficient=0.25, depth_coefficient=0.5)
LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
DATA = """\
00015388 03 n 02 animal 0 beast 0 000 | a living organism
00000010 05 n 01 bear 0 001 @ 00015388 n 0000 | massive plantigrade
00000011 05 n 02 ice_bear 0 polar_bear 0 001 @ 00000010 n 0000 | white bear
00000012 05 n 02 cattle 0 cows 0 001 @ 00015388 n 0000 | domesticated bovine
00000013 05 n 01 ox 0 001 @ 00000012 n 0000 | an adult castrated bull
00000014 05 n 02 giant_panda 0 panda 1 001 @ 00015388 n 0000 | large black-and-white mammal
00000015 05 n 01 guinea_pig 0 001 @ 00015388 n 0000 | stout-bodied nearly tailless rodent
00000016 06 n 01 teddy_bear 0 000 | plaything
00000017 05 n 01 ram 0 002 @ 00015388 n 0000 #m 00000012 n 0000 | uncastrated adult male sheep
"""


@pytest.fixture(scope="module", name="synsets")
def _synsets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Synset]:
    path = tmp_path_factory.mktemp("wordnet") / "data.noun"
    path.write_text(LICENCE + DATA)
    return read_synsets(path)


@pytest.mark.parametrize(
    ("name", "number", "noun"),
    [
        ("polar bear", "00000011", "bear"),  # the kind above it
        ("ox", "00000013", "cow"),  # "cows", of the kind above it
        ("ram (adult male sheep)", "00000017", "ram"),
        ("guinea pig", "00000015", ""),  # no pig is above it
        ("giant panda", "00000014", ""),
        ("teddy bear", "00000016", ""),  # no animal
    ],
)
def test_the_noun_of_a_class(name: str, number: str, noun: str, synsets: dict[str, Synset]) -> None:
    assert class_noun(name, number, synsets, {"bear", "cow", "pig", "ram"}) == noun


def test_the_kinds_above(synsets: dict[str, Synset]) -> None:
    assert synsets["00000014"] == Synset(("giant panda", "panda"), ("00015388",))
    assert list(kinds("00000011", synsets)) == ["00000011", "00000010", "00015388"]
    assert list(kinds("00000017", synsets)) == ["00000017", "00015388"], "a holonym is not a kind"


def test_another_file_is_no_wordnet(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text("cat\n")
    with pytest.raises(DataError, match=r"WordNet's data\.noun"):
        read_synsets(tmp_path / "data.noun")


@pytest.fixture(scope="module", name="vision")
def _vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("photos") / "vision"
    write_encoder(package_state(TINY), TINY, out)
    return out


@pytest.fixture(scope="module", name="views")
def _views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    draw = np.random.default_rng(0)
    for number in range(40):
        colours = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((64, 64)).save(folder / f"dog-{number}.jpg")
    return folder


def imagination(views: Path, vision: Path, seed: int = 0) -> tuple[imagine.Imagination, Tensor, dict[str, Tensor]]:
    model, inputs = imagine.read_views(views, vision, seed)
    assert model.head.bias is not None
    head = (model.head.weight.detach()[:, :, 0, 0], model.head.bias.detach())
    stored = load_file(vision / CLASSIFIER)
    return imagine.Imagination(head, (stored["weight"], stored["bias"]), inputs, seed), inputs, stored


@torch.no_grad()
def test_the_inputs_of_the_last_convolution_give_the_features(views: Path, vision: Path) -> None:
    dreams, inputs, _ = imagination(views, vision)
    model, preprocessing = load_encoder(vision), load_preprocessing(vision).preprocessing
    order = np.random.default_rng(0).permutation(40)
    first = preprocessing(Image.open(sorted(views.glob("*.jpg"))[order[0]]))
    torch.testing.assert_close(dreams.features(inputs[:1]), model(torch.from_numpy(first[None])), atol=1e-4, rtol=1e-4)


def test_the_classifier_finds_the_class_in_what_is_imagined(views: Path, vision: Path) -> None:
    dreams, inputs, stored = imagination(views, vision)
    classes = torch.arange(8).repeat(4)
    features, found = dreams.imagine(classes)
    assert features.shape == (32, TINY.num_embeds, TINY.hidden_size)
    assert float(features.min()) >= 0
    assert float(features.max()) <= 6  # an output of ReLU6
    logits = features.mean(1) @ stored["weight"].T + stored["bias"]
    torch.testing.assert_close(logits.softmax(-1)[range(32), classes], found, atol=1e-4, rtol=1e-4)
    assert float(found.min()) > imagine.PROBABILITY[0] - 1e-4
    before = (dreams.features(inputs).mean(1) @ stored["weight"].T + stored["bias"]).softmax(-1)
    assert float((before.amax(0) < imagine.PROBABILITY[0]).float().mean()) > 0.4, "the views show most classes already"
    again = imagination(views, vision)[0].imagine(classes)[0]
    assert torch.equal(features, again), "the draws are not seeded"


def test_training_reads_what_is_written(views: Path, vision: Path, tmp_path: Path) -> None:
    dreams, _, _ = imagination(views, vision)
    nouns = {1: "owl", 3: "sea lion", 4: "owl", 7: "owl"}
    out = tmp_path / "imagined"
    assert 0 < imagine.write_imagined(dreams, nouns, out, each=3, seed=0) <= 1
    texts = sorted(path.read_text() for path in out.glob("*.txt"))
    assert texts == ["a photo of a sea lion\n"] * 3 + ["a photo of an owl\n"] * 3
    source = open_sample_source(DataConfig(kind="folder", path=str(out)), seed=0, base=out)
    sample = next(iter(source))
    assert sample.features is not None
    assert sample.features().shape == (TINY.num_embeds, TINY.hidden_size)


def test_without_views_it_says_what_to_run(vision: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 0 views"):
        imagine.read_views(tmp_path, vision, 0)


def test_the_nearest_noun_is_that_of_the_views() -> None:
    views = torch.tensor([[5.0, 6.0], [5.0, 7.0], [7.0, 5.0], [6.0, 5.0]])
    nouns = ["owl", "owl", "dog", "dog"]
    photographs = torch.tensor([[5.5, 5.2], [5.2, 5.9]])
    assert baselines.nearest(views, nouns, photographs) == ["dog", "owl"]


@pytest.mark.parametrize("given", [(), ("train",)])
def test_the_baselines_need_pictures(given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in given:
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "owl.jpg")
    monkeypatch.setattr("sys.argv", ["baselines.py", "--data", str(tmp_path), "--vision", str(tmp_path)])
    with pytest.raises(DataError, match="expected pictures in"):
        baselines.main()
