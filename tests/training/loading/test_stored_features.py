"""Features in place of a picture: `dog.npy` with `dog.txt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from accelerate import Accelerator  # noqa: E402

from blip2edge.errors import DataError, ImageError  # noqa: E402
from blip2edge.training.config import parse_config  # noqa: E402
from blip2edge.training.data.config import DataConfig  # noqa: E402
from blip2edge.training.data.registry import open_sample_source, read_entries  # noqa: E402
from blip2edge.training.loading.batches import PREPROCESSING  # noqa: E402
from blip2edge.training.loading.features import FeatureCache, FrozenEncoder  # noqa: E402
from blip2edge.training.loading.loader import Loader, TextMakers  # noqa: E402
from blip2edge.training.loading.run_data import open_pictures  # noqa: E402
from blip2edge.training.setup.miniature import build_miniature  # noqa: E402
from tests.training import recipes  # noqa: E402


@pytest.fixture(scope="module", name="vision")
def _vision() -> Any:
    return build_miniature(parse_config(recipes.recipe())).model.vision.eval().requires_grad_(False)


@pytest.fixture(name="stored")
def _stored(tmp_path: Path, vision: Any) -> Path:
    """A picture, and the encoder's features of another one, which is not there."""
    folder = tmp_path / "data"
    folder.mkdir()
    draw = np.random.default_rng(0)
    shown, gone = (Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(2))
    shown.save(folder / "cat.png")
    features = vision(torch.from_numpy(PREPROCESSING(gone)[None]))[0]
    np.save(folder / "dog.npy", features.half().numpy())
    for name in ("cat", "dog"):
        (folder / f"{name}.txt").write_text(f"a {name}\n")
    return folder


def loader(folder: Path, vision: Any, rows: int = 2, cache: FeatureCache | None = None, max_broken: int = 10) -> Loader:
    config = DataConfig(kind="folder", path=str(folder), prompts=(), prompt_share=0.0, max_broken=max_broken)
    accelerator = Accelerator(cpu=True)
    source = open_sample_source(config, seed=0, base=folder)
    return Loader(source, rows, FrozenEncoder(vision, PREPROCESSING, accelerator, cache), TextMakers(), accelerator)


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_has_pictures_and_stored_features(cached: bool, stored: Path, vision: Any, tmp_path: Path) -> None:
    shape = (vision.config.num_embeds, vision.config.hidden_size)
    cache = FeatureCache(tmp_path / "cache", shape, "float32") if cached else None
    batches = loader(stored, vision, cache=cache)
    wanted = {
        "cat.png": vision(torch.from_numpy(PREPROCESSING(Image.open(stored / "cat.png").convert("RGB"))[None]))[0],
        "dog.npy": torch.from_numpy(np.load(stored / "dog.npy")).float(),
    }
    for _ in range(2):  # the second pass reads the cache
        batch = next(batches)
        assert sorted(batch.sample_ids) == ["cat.png", "dog.npy"]
        for name, rows in zip(batch.sample_ids, batch.image_embeds, strict=True):
            assert rows.dtype == torch.float32
            torch.testing.assert_close(rows, wanted[name], atol=1e-5, rtol=1e-5)
    batches.close()
    assert cache is None or len(cache) == 1, "stored features need no cache"


def test_batches_of_stored_features_alone(stored: Path, vision: Any) -> None:
    (stored / "cat.png").unlink()
    (stored / "cat.txt").unlink()
    source = open_sample_source(DataConfig(kind="folder", path=str(stored)), seed=0, base=stored)
    source.check_usable(open_pictures)  # before the model is built
    batch = next(loader(stored, vision))
    assert batch.sample_ids == ("dog.npy", "dog.npy")
    assert torch.equal(batch.image_embeds[0], batch.image_embeds[1])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (np.zeros((3, 5), np.float32), r"features have the shape \(\d+, \d+\), got \(3, 5\)"),
        (np.zeros((3, 5), np.int64), r"got int64 \(3, 5\)"),
        (np.full((3, 5), np.nan, np.float32), "expected finite"),
        (np.zeros(5, np.float32), r"got float32 \(5,\)"),
        (b"no numbers", "features"),
    ],
)
def test_other_content_is_a_broken_sample(content: Any, problem: str, stored: Path, vision: Any) -> None:
    if isinstance(content, bytes):
        (stored / "dog.npy").write_bytes(content)
    else:
        np.save(stored / "dog.npy", content)
    batches = loader(stored, vision, rows=1)
    assert {next(batches).sample_ids[0] for _ in range(4)} == {"cat.png"}
    (named,) = batches.broken.values()
    with pytest.raises(DataError, match=problem):
        raise DataError(named)


def test_a_file_of_numbers_beside_a_picture_or_without_text_is_no_sample(stored: Path) -> None:
    """Embeddings are often stored beside their pictures."""
    np.save(stored / "cat.npy", np.zeros(512, np.float32))
    np.save(stored / "alone.npy", np.zeros(512, np.float32))
    entries, broken = read_entries(DataConfig(kind="folder", path=str(stored), max_broken=0), base=stored)
    assert [entry.image_id for entry in entries] == ["cat.png", "dog.npy"]
    assert not broken.problems


def test_features_are_no_pictures(stored: Path) -> None:
    config = DataConfig(kind="folder", path=str(stored))
    entries, _ = read_entries(config, base=stored)
    dog = next(entry for entry in entries if entry.image_id == "dog.npy")
    with pytest.raises(ImageError, match="has features, not a picture"):
        dog.picture.open()


def test_features_cannot_be_cropped(stored: Path) -> None:
    config = DataConfig(kind="folder", path=str(stored), flip=0.5)
    with pytest.raises(DataError, match=r"crop and flip change pictures, and dog\.npy has features"):
        open_sample_source(config, seed=0, base=stored)
