"""The photo recipe: resources of Qt, nouns, views, the data's layout, the encoder, the vocabulary, the score."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the small BERT is written with transformers")

from PIL import Image

from blip2edge.errors import DataError, OutputError
from blip2edge.examples.recipes.photos import prepare as recipe
from blip2edge.examples.recipes.photos import score, views
from blip2edge.examples.recipes.photos.cutouts import article, noun_of
from blip2edge.examples.recipes.photos.encoder import write_encoder
from blip2edge.examples.recipes.photos.qt_resources import read_resources
from blip2edge.examples.recipes.photos.words import write_bert
from blip2edge.model.vision.efficientnet_lite import EfficientNetLiteConfig
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.registry import open_sample_source
from blip2edge.training.loading.qformer_texts import QFormerTexts
from blip2edge.training.setup.pretrained import load_tokenizer, open_vision
from tests.drawing_photos import package_state

TINY = EfficientNetLiteConfig(image_size=64, width_coefficient=0.25, depth_coefficient=0.5, normalize=True)
SPECIES = {"mammals/rabbit": "A big eared rabbit.", "mammals/dog": "A dog.", "birds/owl": "An owl."}


def resources(files: dict[str, bytes]) -> bytes:
    """A Qt resource file of format 1, whose files lie in one directory; the first is compressed."""
    names, name_at = b"", {}
    for name in ("", "folder", *files):
        name_at[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    data, nodes = b"", struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHII", name_at["folder"], 2, len(files), 2)
    for number, (name, content) in enumerate(files.items()):
        stored = content if number else struct.pack(">I", len(content)) + zlib.compress(content)
        nodes += struct.pack(">IHHHI", name_at[name], 0 if number else 1, 0, 0, len(data))
        data += struct.pack(">I", len(stored)) + stored
    start = 20
    return (
        b"qres"
        + struct.pack(">4I", 1, start, start + len(nodes), start + len(nodes) + len(data))
        + nodes
        + data
        + names
    )


def test_resources_of_qt(tmp_path: Path) -> None:
    files = {"a.webp": b"first" * 40, "b.txt": b"second"}
    path = tmp_path / "some.rcc"
    path.write_bytes(resources(files))
    assert read_resources(path) == {f"folder/{name}": content for name, content in files.items()}
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="damaged Qt resource file"):
        read_resources(path)
    path.write_bytes(b"PK\3\4 no resources")
    with pytest.raises(DataError, match="expected a Qt resource file"):
        read_resources(path)


@pytest.mark.parametrize(
    ("sentence", "noun"),
    [
        ("A big eared rabbit.", "rabbit"),
        ("An owl.", "owl"),
        ("A hoverfly resembles a honeybee drone.", "hoverfly"),
        ("A baby sheep (a lamb).", "sheep"),
        ("A spiny lobster, from the Hawaiian islands.", "lobster"),
        ("A helmeted guinea fowl.", "guinea fowl"),
        ("Two wild boars.", ""),
        ("George the blue groper.", ""),
    ],
)
def test_the_noun_of_a_sentence(sentence: str, noun: str) -> None:
    assert noun_of(sentence) == noun


def square(colour: tuple[int, int, int], size: int = 60) -> Image.Image:
    """A square of one colour in the middle of a transparent picture."""
    picture = Image.new("RGBA", (2 * size, 2 * size), (0, 0, 0, 0))
    picture.paste(Image.new("RGBA", (size, size), (*colour, 255)), (size // 2, size // 2))
    return picture


def test_views_are_seeded_and_show_the_cut_out() -> None:
    cut_out = views.opened(square((250, 10, 10)))
    assert cut_out.size == (60, 60)
    photos = [Image.new("RGB", (300, 200), (10, 200, 10))]
    drawn = [views.view(cut_out, photos, np.random.default_rng(seed)) for seed in range(8)]
    again = views.view(cut_out, photos, np.random.default_rng(3))
    assert np.array_equal(np.asarray(drawn[3]), np.asarray(again))
    reds = []
    for picture in drawn:
        pixels = np.asarray(picture).astype(int)
        assert pixels.shape == (views.SIZE, views.SIZE, 3)
        reds.append(float(((pixels[..., 0] > 110) & (pixels[..., 1:].max(axis=-1) < 90)).mean()))
    assert min(reds) > 0.15
    assert len({round(share, 4) for share in reds}) > 4, "all views are alike"


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small packages: three stamps and a cartoon, two drawings, backgrounds, photographs."""
    made = {key: tmp_path_factory.mktemp(key) for key in recipe.PACKAGES}
    animals = made["stamps"] / "usr/share/tuxpaint/stamps/animals"
    for name, sentence in {**SPECIES, "birds/cartoon/owl2": "An owl."}.items():
        (animals / name).parent.mkdir(parents=True, exist_ok=True)
        square((200, 40, 90)).save(animals / f"{name}.png")
        (animals / f"{name}.txt").write_text(f"{sentence}\nfr.utf8=Un animal.\n")
    for name, words in {"a": ("mammal", "dog"), "b": ("dog", "owl")}.items():
        picture = made["drawings"] / f"usr/share/openclipart/png/animals/{name}.png"
        document = made["keywords"] / f"usr/share/openclipart/svg/animals/{name}.svg"
        for path in (picture, document):
            path.parent.mkdir(parents=True, exist_ok=True)
        square((40, 40, 200)).save(picture)
        document.write_text("<svg>" + "".join(f"<rdf:li>{word}</rdf:li>" for word in words) + "</svg>")
    nature = made["backgrounds"] / "usr/share/backgrounds/mate/nature"
    nature.mkdir(parents=True)
    for name in recipe.BACKGROUNDS:
        Image.new("RGB", (40, 30), (30, 120, 40)).save(nature / f"{name}.jpg")
    folder = made["test"] / recipe.RESOURCES
    folder.mkdir(parents=True)
    file = io.BytesIO()
    Image.new("RGB", (80, 60), (90, 80, 70)).save(file, "WEBP")
    for activity, names in zip(recipe.ACTIVITIES, (["dog", "owl"], ["polar_bear"], ["kitten"]), strict=True):
        files = {"README": b"licences", **{f"{name}.webp": file.getvalue() for name in names}}
        (folder / f"{activity}.rcc").write_bytes(resources(files))
    return made


@pytest.fixture(scope="module")
def built(roots: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("photos") / "data"
    recipe.prepare(roots, out, views=9, seed=1)
    return out


def test_names_get_equally_many_views(built: Path) -> None:
    record = json.loads((built / "data.json").read_text())
    assert record["names"] == ["dog", "owl", "rabbit"]
    assert (record["photographs"], record["drawings"], record["test"]) == (3, 1, 4)
    texts = Counter(path.read_text().strip() for path in (built / "train").glob("*.txt"))
    assert texts == {"a photo of a dog": 8, "a photo of an owl": 9, "a photo of a rabbit": 9}
    titles = sorted(path.read_text().strip() for path in (built / "test").glob("*.txt"))
    assert titles == ["cat", "dog", "owl", "polar bear"]


def test_training_reads_the_folders(built: Path) -> None:
    source = open_sample_source(
        DataConfig(kind="folder", path=str(built / "train"), prompt_share=0.0), seed=0, base=built
    )
    sample = next(iter(source))
    assert sample.text.startswith("a photo of a")
    assert sample.open_picture().size == (views.SIZE, views.SIZE)


def test_what_is_there_is_not_written_over(built: Path, roots: dict[str, Path]) -> None:
    with pytest.raises(OutputError, match="exists"):
        recipe.prepare(roots, built, views=4, seed=0)


def test_the_encoder_is_read_with_its_preprocessing(tmp_path: Path) -> None:
    write_encoder(package_state(TINY), TINY, tmp_path / "vision")
    part = open_vision("vision", tmp_path)
    assert part.config == part.read().config == TINY
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 144, 3), dtype=np.uint8))
    small = np.asarray(picture.resize((96, 64), Image.Resampling.BILINEAR).crop((16, 0, 80, 64)), dtype=np.float64)
    wanted = (small / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(part.preprocessing(picture), wanted.transpose(2, 0, 1), atol=1e-5)
    with pytest.raises(OutputError, match="exists"):
        write_encoder(package_state(TINY), TINY, tmp_path / "vision")


def test_the_vocabulary_has_the_captions_words(tmp_path: Path) -> None:
    texts = [f"a photo of {article(noun)}" for noun in ("owl", "guinea fowl")]
    size = write_bert(texts, tmp_path / "words", hidden=16, layers=1, heads=2, seed=0)
    tokenizer = load_tokenizer(tmp_path / "words" / "tokenizer.json")
    assert size == tokenizer.get_vocab_size() < 200
    batch = QFormerTexts(tokenizer, 12)(texts)
    assert batch.input_ids.shape == (2, 8)  # [CLS] a photo of a guinea fowl [SEP]
    assert tokenizer.decode(batch.input_ids[1].tolist()) == texts[1]
    assert tokenizer.token_to_id("[UNK]") not in batch.input_ids.flatten().tolist()


def test_the_score_counts_animals_of_the_training(built: Path, tmp_path: Path) -> None:
    said = {
        "explore_farm_animals-dog": "a photo of a dog",
        "explore_farm_animals-owl": "a photo of a dog",
        "explore_world_animals-polar_bear": "a photo of a bear",
        "erase-kitten": "a photo of a cat",
    }
    predictions = tmp_path / "test.json"
    predictions.write_text(json.dumps([{"image_id": f"{name}.png", "caption": text} for name, text in said.items()]))
    scored = score.read_scored(predictions, built)
    found = score.figures(scored)
    assert (found["photographs"], found["trained"], found["named"]) == (4, 2, 1)
    assert (found["share"], found["named_after_shuffling"]) == (0.5, 1)
    assert score.names_it("a photo of a hen", "Chicken")
    assert not score.names_it("a photo of a bearded goat", "polar bear")
    page = score.page(scored, built)
    assert page.count("<figure") == 4
    assert page.count('class="right"') == 3
    predictions.write_text(json.dumps([{"image_id": "other.png", "caption": ""}]))
    with pytest.raises(DataError, match=r"has no other\.txt"):
        score.read_scored(predictions, built)
