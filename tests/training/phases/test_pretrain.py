"""The miniature's pretraining: its labels, and that the same seed gives the same weights."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from blip2edge.training.config import LanguagePhase, parse_config  # noqa: E402
from blip2edge.training.data.config import DataConfig  # noqa: E402
from blip2edge.training.data.scenes import scenes  # noqa: E402
from blip2edge.training.loading.batches import IGNORED, KeywordTexts, SceneBatches  # noqa: E402
from blip2edge.training.phases.pretrain import LanguagePretraining, dense_labels  # noqa: E402
from blip2edge.training.setup.miniature import build_miniature  # noqa: E402
from tests.training import recipes  # noqa: E402


def test_dense_labels_say_what_lies_where() -> None:
    scene = next(scenes(1, seed=2))
    labels = dense_labels([scene], 8)
    column, row = int(scene.first.x // 8), int(scene.first.y // 8)
    patch = row * 8 + column
    role, _, _, _, _ = labels.classes[0, patch].tolist()
    assert role == 1
    offset = labels.box[0, patch, :2] * 64
    centre = torch.tensor([scene.first.x, scene.first.y]) - torch.tensor([column * 8 + 4.0, row * 8 + 4.0])
    assert torch.allclose(offset, centre, atol=1e-4)
    assert set(labels.classes[0, :, 0].tolist()) == {0, 1, 2}


def test_keywords_and_captions_of_scenes() -> None:
    parts = build_miniature(parse_config(recipes.recipe()))
    texts = KeywordTexts(parts.tokenizer, 8, DataConfig(prompt_share=0.5))
    series = SceneBatches(8, 4, texts)
    batch = next(series)
    shown = list(scenes(8, seed=4))
    for row, scene in enumerate(shown):
        ids = [value for value in batch.captions.labels[row].tolist() if value != IGNORED]
        assert ids[-1] == 2
        assert parts.tokenizer.decode(ids).strip() == scene.caption
        text = parts.tokenizer.decode(batch.captions.input_ids[row].tolist())
        assert text in (scene.caption, f"a photo of {scene.caption}", f"a picture of {scene.caption}")
        words = parts.tokenizer.decode(batch.keyword_ids[row].tolist()).split()
        assert words == list(scene.keywords)
    assert len({len(row[row != IGNORED]) for row in batch.captions.labels}) >= 1
    assert batch.sample_ids[0] == "scene-4-0"
    state = series.state_dict()
    following = next(series)
    series.load_state_dict(state)
    assert next(series).sample_ids == following.sample_ids


def test_two_processes_read_what_one_would() -> None:
    def names(batch: list[object], given: list[str]) -> list[str]:
        return list(given)

    whole = next(SceneBatches(4, 1, names))
    parts = [next(SceneBatches(2, 1, names, (rank, 2))) for rank in range(2)]
    assert parts[0] + parts[1] == whole


def test_the_same_seed_gives_the_same_weights() -> None:
    made = [
        recipes.tensor_hashes(build_miniature(parse_config(recipes.recipe(f"seed = {seed}"))).model)
        for seed in (3, 3, 4)
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_the_prefix_hints_or_is_noise() -> None:
    parts = build_miniature(parse_config(recipes.recipe()))
    batch = next(SceneBatches(2, 4, KeywordTexts(parts.tokenizer, 8, DataConfig())))
    language: object = parts.model.language
    torch.manual_seed(0)
    sure = LanguagePretraining(language, LanguagePhase(prefix_share=1.0, prefix_noise=0.0))  # type: ignore[arg-type]
    words = parts.model.language.embed(batch.keyword_ids)
    assert torch.equal(sure._prefix(batch.keyword_ids), words)
    never = LanguagePretraining(language, LanguagePhase(prefix_share=0.0))  # type: ignore[arg-type]
    noise = never._prefix(batch.keyword_ids)
    assert float((noise.std() / words.std()).detach()) == pytest.approx(1.0, rel=0.2)
