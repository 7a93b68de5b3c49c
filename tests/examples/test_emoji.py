"""The emoji recipe's data builder, on handmade icons in Iconify's format."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from blip2edge.errors import DataError, UsageError
from blip2edge.examples.recipes.emoji import augment as chance
from blip2edge.examples.recipes.emoji import prepare as recipe
from blip2edge.examples.recipes.emoji import vision
from blip2edge.examples.recipes.emoji.icons import IconSet, caption, names_of
from blip2edge.examples.recipes.emoji.vision import Names
from blip2edge.model.checkpoint.directory import load_checkpoint
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.registry import open_sample_source
from blip2edge.training.loading.batches import PREPROCESSING

ICONS = Path(__file__).parent / "icons"
NAMES = ["fish", "green-apple", "left-leaf", "red-apple"]
RED, GREEN = (221, 34, 34), (51, 170, 51)


def hand_made() -> IconSet:
    return IconSet.load(ICONS / "icons.json")


def test_names_are_those_that_all_have_drawn() -> None:
    full = hand_made()
    poor = replace(full, icons={name: icon for name, icon in full.icons.items() if name != "fish"})
    categories = ("Animals & Nature", "Food & Drink")
    assert names_of(ICONS / "metadata.json", categories, [full]) == NAMES
    assert names_of(ICONS / "metadata.json", categories, [full, poor]) == NAMES[1:]
    assert caption("red-apple") == "red apple"


def test_an_icon_keeps_its_frame_or_takes_the_sets() -> None:
    icons = hand_made()
    assert 'viewBox="0 0 20 20"' in icons.svg("red-apple")
    assert 'viewBox="0 0 32 24"' in icons.svg("fish")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no category 'Flags'"):
        names_of(ICONS / "metadata.json", ["Flags"], [hand_made()])
    with pytest.raises(DataError, match="no icon called 'unicorn'"):
        hand_made().svg("unicorn")
    broken = tmp_path / "icons.json"
    broken.write_text('{"icons": ')
    with pytest.raises(DataError, match=r"icons\.json cannot be read as JSON"):
        IconSet.load(broken)
    broken.write_text('{"icons": {"a": {}}}')
    with pytest.raises(DataError, match="a body each"):
        IconSet.load(broken)


def disc(size: int = 32) -> torch.Tensor:
    """A red disc on nothing, as the sets' drawings are: uint8 [1, size, size, 4]."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    inside = (x**2 + y**2 < (0.4 * size) ** 2)[..., None]
    return torch.from_numpy((inside * np.array([*RED, 255])).astype(np.uint8)[None])


def test_a_plain_picture_stands_on_white() -> None:
    picture = chance.plain(chance.premultiplied(disc()), 16)[0]
    assert picture.shape == (3, 16, 16)
    assert torch.equal(picture[:, 0, 0], torch.ones(3))
    assert torch.allclose(picture[:, 8, 8] * 255, torch.tensor(RED).float(), atol=0.5)


def test_chance_is_seeded_and_keeps_the_drawing_in_sight() -> None:
    drawings = chance.premultiplied(disc()).expand(24, -1, -1, -1)
    mirror = torch.ones(24, dtype=torch.bool)
    first = chance.augment(drawings, mirror, 16, torch.Generator().manual_seed(3))
    again = chance.augment(drawings, mirror, 16, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert first.shape == (24, 3, 16, 16)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    centres, corners = first[:, :, 8, 8], first[:, :, 0, 0]
    assert float((centres - corners).abs().amax(dim=1).median()) > 0.2  # the disc is not its ground
    assert len({tuple(row) for row in corners.round(decimals=2).tolist()}) > 5  # grounds differ


def test_a_mirror_spares_names_with_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chance.may_mirror("red-apple")
    assert not chance.may_mirror("left-leaf")
    for name, still in (("TURN", 0.0), ("SCALE", (1.0, 1.0)), ("SHIFT", 0.0), ("STRETCH", 0.0)):
        monkeypatch.setattr(chance, name, still)
    half = torch.zeros(64, 4, 8, 8)
    half[:, 3, :, :4] = 1  # opaque on the left, and black
    places = chance._places(torch.tensor([True, False]).repeat_interleave(32), 8, torch.Generator().manual_seed(0))
    alpha = torch.nn.functional.grid_sample(half, places, align_corners=False)[:, 3]
    opaque_left = alpha[:, 4, 1] > 0.5
    assert opaque_left[32:].all()
    assert 5 < int(opaque_left[:32].sum()) < 27


COLOURS = {"red-apple": RED, "green-apple": GREEN, "left-leaf": GREEN, "fish": (51, 136, 204)}


def painted(icons: IconSet, name: str, size: int) -> NDArray[np.uint8]:
    """In the place of a drawing: a disc in the icon's colour, so that no SVG library is needed."""
    pixels = disc(size)[0].numpy()
    pixels[pixels[..., 3] > 0, :3] = COLOURS[name]
    return pixels


def test_svg_becomes_pixels() -> None:
    pytest.importorskip("cairosvg")
    for name in ("red-apple", "green-apple"):
        pixels = hand_made().draw(name, 40)
        assert pixels.shape == (40, 40, 4)
        assert tuple(pixels[24, 20]) == (*COLOURS[name], 255)
        assert pixels[1, 1, 3] == 0  # nothing beside the apple
    fish = hand_made().draw("fish", 40)  # wider than high: it keeps its shape inside the square
    assert fish[:3, :, 3].max() == 0


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data of six "artists" who all draw the same, EmojiOne without the fish."""
    full = hand_made()
    poor = {name: icon for name, icon in full.icons.items() if name != "fish"}
    sets = {style: replace(full, style=style) for style in recipe.PACKAGES}
    sets["emojione"] = replace(full, style="emojione", icons=poor)
    out = tmp_path_factory.mktemp("emoji") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IconSet, "draw", painted)
        recipe.prepare(sets, ICONS / "metadata.json", out, copies=2, seed=5)
        yield out


def test_the_held_out_style_is_in_no_training_data(built: Path) -> None:
    record = json.loads((built / "data.json").read_text())
    assert record["names"] == 4
    assert record["drawings"] == dict.fromkeys(recipe.PACKAGES, 4) | {"emojione": 3}
    with tarfile.open(built / "train" / "emoji-0000.tar") as tar:
        members = tar.getnames()
    assert len(members) == 2 * 2 * (4 * 4 + 3)  # picture and text, two copies, five styles
    assert not [name for name in members if recipe.HELD_OUT in name]
    with np.load(built / "drawings.npz") as drawings:
        assert recipe.HELD_OUT not in drawings["styles"]
        assert drawings["pixels"].shape == (19, recipe.DRAWING_SIZE, recipe.DRAWING_SIZE, 4)


def test_the_test_pictures_show_what_their_text_says(built: Path) -> None:
    assert sorted(path.stem for path in (built / "test").glob("*.png")) == NAMES
    for name, colour in (("red-apple", RED), ("green-apple", GREEN)):
        picture = np.asarray(Image.open(built / "test" / f"{name}.png"))
        assert picture.shape == (64, 64, 3)
        assert np.abs(picture[40, 32].astype(int) - colour).max() <= 2
        assert (picture[2, 2] == 255).all()
        assert (built / "test" / f"{name}.txt").read_text() == caption(name) + "\n"


def test_training_reads_the_shards_and_the_folder(built: Path) -> None:
    for kind, path, pictures in (("shards", "train", 38), ("folder", "test", 4)):
        config = DataConfig(kind=kind, path=path, prompts=(), prompt_share=0.0)
        source = iter(open_sample_source(config, seed=0, base=built))
        samples = [next(source) for _ in range(pictures)]
        assert len({sample.sample_id for sample in samples}) == pictures
        assert {sample.text for sample in samples} == {caption(name) for name in NAMES}
        assert samples[0].open_picture().size == (64, 64)


def test_equal_seeds_give_equal_shards(tmp_path: Path) -> None:
    drawn = [(name, style, painted(hand_made(), name, 40)) for name in NAMES for style in recipe.COMPLETE]
    hashes = []
    for folder in ("one", "two"):
        recipe.write_shards(drawn, 2, tmp_path / folder, seed=9)
        hashes.append(hashlib.sha256((tmp_path / folder / "emoji-0000.tar").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
    with tarfile.open(tmp_path / "one" / "emoji-0000.tar") as tar:
        member = tar.extractfile(tar.getnames()[0])
        assert member is not None
        assert Image.open(io.BytesIO(member.read())).size == (64, 64)


def test_what_is_there_is_not_written_over(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    shutil.copytree(built / "test", out)
    with pytest.raises(UsageError, match="exists"):
        recipe.prepare({}, ICONS / "metadata.json", out, copies=1, seed=0)


def test_names_share_their_words() -> None:
    torch.manual_seed(0)
    names = Names(["green-apple", "hammer", "red-apple"])
    vectors = torch.nn.functional.normalize(names.get_buffer("shares") @ names.words.detach(), dim=-1)
    cosines = vectors @ vectors.T
    assert float(cosines[0, 2]) > float(cosines[0, 1])
    assert names(torch.randn(5, vectors.shape[1])).shape == (5, 3)


def test_the_picture_encoder_learns_and_is_written(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_checkpoint(vision.START).vision.state_dict()
    arguments = [
        "--data",
        str(built),
        "--out",
        str(tmp_path / "vision"),
        "--steps",
        "20",
        "--batch-size",
        "8",
    ]
    monkeypatch.setattr("sys.argv", ["vision.py", *arguments])
    vision.main()
    record = json.loads(capsys.readouterr().out)
    assert record["names"] == 4
    assert record["heldout_style"] == record["seen_style"]  # the artists of this test all draw the same
    assert record["seen_style"]["top1"] >= 0.5  # one of four is chance; apples and leaf differ in colour alone
    after = load_checkpoint(tmp_path / "vision").vision.state_dict()
    assert after.keys() == before.keys()
    assert not torch.equal(after["layers.0.mlp.fc1.weight"], before["layers.0.mlp.fc1.weight"])
    assert load_preprocessing(tmp_path / "vision").preprocessing == PREPROCESSING
