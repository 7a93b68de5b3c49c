"""Stage 2: the loss against transformers, what stays frozen, and a handful of scenes learned by heart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from tokenizers import Tokenizer  # noqa: E402

from blip2edge.model.captioner import CaptionerModel  # noqa: E402
from blip2edge.training.batches import IGNORED, CaptionBatch, Collator, pixel_values  # noqa: E402
from blip2edge.training.captioning import CheckpointCaptioner  # noqa: E402
from blip2edge.training.config import (  # noqa: E402
    BlockSizes,
    DataConfig,
    LanguagePhase,
    ModelSizes,
    OptimizerConfig,
    TrainingConfig,
)
from blip2edge.training.miniature import build_miniature, write_checkpoint  # noqa: E402
from blip2edge.training.optim import fit, learning_rate, make_optimizer  # noqa: E402
from blip2edge.training.pretrain import dense_labels, language_loss  # noqa: E402
from blip2edge.training.scenes import Scene, scenes  # noqa: E402
from blip2edge.training.stages import match_scale, prepare_stage2, stage2_loss, tensor_hashes  # noqa: E402

BLOCK = BlockSizes(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4)
TINY = TrainingConfig(seed=3, model=ModelSizes(vision=BLOCK, qformer=BLOCK, language=BLOCK))


def _batch(
    tokenizer: Tokenizer, count: int = 4, prompt_share: float = 0.5
) -> tuple[list[Scene], CaptionBatch]:
    shown = list(scenes(count, seed=11))
    collate = Collator(tokenizer, DataConfig(prompt_share=prompt_share), TINY.model.num_query_tokens)
    return shown, collate(shown, np.random.default_rng(0))


def test_labels_are_the_caption_and_the_end_token() -> None:
    _, tokenizer = build_miniature(TINY)
    shown, batch = _batch(tokenizer, 8)
    for row, scene in enumerate(shown):
        ids = [value for value in batch.labels[row].tolist() if value != IGNORED]
        assert ids[-1] == 2
        assert tokenizer.decode(ids).strip() == scene.caption
        text = tokenizer.decode(batch.input_ids[row].tolist())
        assert text in (scene.caption, f"a photo of {scene.caption}", f"a picture of {scene.caption}")
        assert int(batch.attention_mask[row].sum()) == int((batch.input_ids[row] != 1).sum())
    assert (batch.labels[:, 0] == IGNORED).all()


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = build_miniature(TINY)
    write_checkpoint(model, tokenizer, tmp_path, torch.float32)
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.eval()
    shown, batch = _batch(tokenizer, 6)
    pixels = pixel_values(shown)
    slots = TINY.model.num_query_tokens
    image = torch.full((len(shown), slots), model.config.image_token_id)
    expected = theirs(
        pixel_values=pixels,
        input_ids=torch.cat([image, batch.input_ids], dim=1),
        attention_mask=torch.cat([torch.ones_like(image), batch.attention_mask], dim=1),
        labels=torch.cat([torch.full_like(image, IGNORED), batch.labels], dim=1),
    ).loss
    prepare_stage2(model)
    assert float(stage2_loss(model, pixels, batch).detach()) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def _steps(model: CaptionerModel, tokenizer: Tokenizer, steps: int) -> list[float]:
    shown, batch = _batch(tokenizer)
    prepare_stage2(model)
    pixels = pixel_values(shown)
    config = OptimizerConfig(steps=steps, learning_rate=1e-3, warmup_steps=2)
    return fit(
        "stage2",
        [model],
        itertools.repeat((pixels, batch)),
        lambda each: stage2_loss(model, *each),
        config,
        lambda _: None,
    )


def test_frozen_parts_do_not_change() -> None:
    model, tokenizer = build_miniature(TINY)
    before = tensor_hashes(model)
    _steps(model, tokenizer, 3)
    after = tensor_hashes(model)
    changed = {name.split(".")[0] for name in before if before[name] != after[name]}
    assert changed == {"bridge"}
    for part in (model.vision, model.language):
        assert all(parameter.grad is None for parameter in part.parameters())
        assert not part.training


def test_the_same_seed_gives_the_same_weights() -> None:
    runs = []
    for seed in (3, 3, 4):
        model, tokenizer = build_miniature(replace(TINY, seed=seed))
        losses = _steps(model, tokenizer, 2)
        runs.append((losses, tensor_hashes(model)))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


def test_a_handful_of_scenes_is_learned_by_heart(tmp_path: Path) -> None:
    """The whole of stage 2 in small: a language model that takes hints, frozen; a bridge that gives them."""
    model, tokenizer = build_miniature(TINY)
    shown, batch = _batch(tokenizer, 6, prompt_share=0.0)
    draw = torch.Generator().manual_seed(0)
    phase = LanguagePhase(steps=200, learning_rate=2e-3, warmup_steps=20)
    texts: Iterator[CaptionBatch] = itertools.repeat(batch)
    language = language_loss(model.language, phase, draw)  # type: ignore[arg-type]
    losses = fit("language", [model.language], texts, language, phase, lambda _: None)
    assert losses[-1] < losses[0]
    match_scale(model)
    prepare_stage2(model)
    frozen = tensor_hashes(model.language)
    pixels = pixel_values(shown)
    config = OptimizerConfig(steps=200, learning_rate=2e-3, warmup_steps=10)
    fit(
        "stage2",
        [model.bridge],
        itertools.repeat((pixels, batch)),
        lambda each: stage2_loss(model, *each),
        config,
        lambda _: None,
    )
    assert tensor_hashes(model.language) == frozen
    write_checkpoint(model, tokenizer, tmp_path, torch.float16)
    captions = CheckpointCaptioner.load(tmp_path)([scene.picture for scene in shown])
    assert captions == [scene.caption for scene in shown]


def test_the_projection_starts_at_the_size_of_words() -> None:
    model, tokenizer = build_miniature(TINY)
    match_scale(model)
    shown, _ = _batch(tokenizer)
    with torch.no_grad():
        visual_tokens = model.visual_tokens(pixel_values(shown))
    words = model.language.get_parameter("embed_tokens.weight").detach()
    assert float(visual_tokens.std() / words.std()) == pytest.approx(1.0, rel=0.3)


def test_vectors_do_not_decay_and_frozen_parameters_stay_out() -> None:
    model, _ = build_miniature(TINY)
    prepare_stage2(model)
    decayed, spared = make_optimizer([model], OptimizerConfig()).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.bridge.parameters()))


def test_the_rate_rises_and_falls() -> None:
    config = OptimizerConfig(steps=100, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


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
