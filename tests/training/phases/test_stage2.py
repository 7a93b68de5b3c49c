"""Stage 2 and instruction tuning: losses compared with transformers; trained and frozen parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from accelerate import Accelerator  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from blip2edge.errors import ConfigError  # noqa: E402
from blip2edge.model.captioner import CaptionerModel  # noqa: E402
from blip2edge.model.checkpoint.directory import load_checkpoint  # noqa: E402
from blip2edge.runtime.text.prompt import InstructionTokenizer  # noqa: E402
from blip2edge.runtime.text.tokenizer import Tokenizer  # noqa: E402
from blip2edge.training.config import OptimizerConfig, Stage1Phase, TrainingConfig, parse_config  # noqa: E402
from blip2edge.training.data.scenes import scenes  # noqa: E402
from blip2edge.training.data.sources import Sample  # noqa: E402
from blip2edge.training.key_rules import BRIDGE_SIZES  # noqa: E402
from blip2edge.training.loading.batches import IGNORED, PREPROCESSING  # noqa: E402
from blip2edge.training.loading.caption_texts import CaptionTexts  # noqa: E402
from blip2edge.training.loading.features import FrozenEncoder  # noqa: E402
from blip2edge.training.loading.loader import PictureBatch, TextMakers  # noqa: E402
from blip2edge.training.loop.optim import learning_rate, make_optimizer  # noqa: E402
from blip2edge.training.model_config import BlockSizes, ModelConfig  # noqa: E402
from blip2edge.training.phases.stage2 import GenerativeStage, is_trained, match_scale  # noqa: E402
from blip2edge.training.setup.miniature import build_miniature  # noqa: E402
from blip2edge.training.setup.model_parts import ModelParts  # noqa: E402
from tests import drawing  # noqa: E402
from tests.families import drawing_idefics, drawing_instruct, drawing_llama, test_t5  # noqa: E402
from tests.training import recipes  # noqa: E402

TEXTS = ("two red cats", "a dog", "photo of a red dog is it")
PROMPTS = ("Question: what is it ?", "", "a photo of")


def samples(prompts: tuple[str, ...] = PROMPTS) -> list[Sample]:
    pictures = drawing.draw_pictures(len(TEXTS), seed=5)
    return [
        Sample(f"s{number}", f"p{number}", lambda number=number: pictures[number], text, prompt)  # type: ignore[misc]
        for number, (text, prompt) in enumerate(zip(TEXTS, prompts, strict=True))
    ]


class Case(NamedTuple):
    """Transformers' model, ours, and a batch for either."""

    theirs: Any
    ours: CaptionerModel
    batch: PictureBatch
    inputs: dict[str, Tensor]


def _tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(directory / "tokenizer.json")


def case(theirs: Any, directory: Path, prompts: tuple[str, ...] = PROMPTS) -> Case:
    """A batch of samples with prompts of different length, behind random pixels."""
    ours = load_checkpoint(directory)
    texts = CaptionTexts(ours.config, _tokenizer(directory), 16)
    torch.manual_seed(1)
    side = ours.config.vision.image_size
    pixels = torch.randn(len(TEXTS), 3, side, side)
    instruction = None
    inputs = {"pixel_values": pixels}
    if ours.config.instruction_positions:
        reader = InstructionTokenizer(_tokenizer(directory / "qformer_tokenizer"), ours.config.instruction_positions, 1)
        given = [texts.prompt(sample) for sample in samples(prompts)]
        ids, mask = (torch.from_numpy(array) for array in reader(given).values())
        instruction = (ids, mask)
        inputs |= {"qformer_input_ids": ids, "qformer_attention_mask": mask}
    batch = TextMakers(texts).batch(samples(prompts), ours.vision(pixels).detach())
    return Case(theirs, ours, batch._replace(instruction=instruction), inputs)


def with_slots(made: Case, ids: Tensor, fill: int) -> Tensor:
    """Rows with the picture's slots before them, and what stands before those."""
    assert made.batch.captions is not None
    before, slots = made.batch.captions.before_ids, made.ours.config.bridge.num_visual_tokens
    parts = [torch.full_like(before, fill) if fill < 0 or fill == 1 else before, torch.full((slots,), fill)]
    head = torch.cat(parts).expand(len(ids), -1)
    return torch.cat([head, ids], dim=1)


def expected(made: Case) -> Tensor:
    captions, image = made.batch.captions, made.ours.config.image_token_id
    assert captions is not None
    assert image is not None
    labels = captions.labels
    if not made.ours.config.language.is_encoder_decoder:
        labels = with_slots(made, labels, IGNORED)
    loss: Tensor = made.theirs(
        input_ids=with_slots(made, captions.input_ids, image),
        attention_mask=with_slots(made, captions.attention_mask, 1),
        labels=labels,
        **made.inputs,
    ).loss
    return loss


def draw(kind: str, directory: Path) -> Any:
    """A random checkpoint of transformers."""
    if kind == "opt":
        return drawing.save(directory, seed=4).model
    if kind == "t5":
        return test_t5.draw(1, directory, **test_t5.KINDS[1])
    if kind == "llava":
        return drawing_llama.draw_llava(directory, 3)[0]
    return drawing_instruct.draw_instructblip(directory, 2, kind.removeprefix("instruct-"))[0]


@pytest.mark.parametrize("kind", ["opt", "t5", "llava", "instruct-llama", "instruct-t5"])
def test_the_loss_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = draw(kind, tmp_path)
    prompts = PROMPTS if "instruct" not in kind else ("what is it ?", "a dog", "is it red")
    made = case(theirs, tmp_path, prompts)
    stage = GenerativeStage(made.ours, "mlp" if kind == "llava" else "qformer").eval()
    loss = stage(made.batch)["loss"]
    assert float(loss.detach()) == pytest.approx(float(expected(made).detach()), rel=1e-5)


def test_the_loss_of_a_flamingo_is_that_of_transformers(tmp_path: Path) -> None:
    theirs, _ = drawing_idefics.draw_idefics(tmp_path, 3, use_resampler=True)
    made = case(theirs, tmp_path)
    captions = made.batch.captions
    assert captions is not None
    assert captions.picture_mask is not None
    logits = theirs(
        pixel_values=made.inputs["pixel_values"][:, None],
        input_ids=captions.input_ids,
        attention_mask=captions.attention_mask,
        image_attention_mask=captions.picture_mask[:, :, None],
    ).logits  # its own loss forgets the additional rows of the vocabulary
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), captions.labels[:, 1:].flatten())
    stage = GenerativeStage(made.ours, "flamingo").eval()
    assert float(stage(made.batch)["loss"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def tiny(bridge: str = "qformer", **options: Any) -> ModelParts:
    """A miniature of the tests' recipe."""
    given = parse_config(recipes.recipe())
    sizes = {key: getattr(given.model.qformer, key) for key in BRIDGE_SIZES[bridge]}
    model = replace(given.model, qformer=BlockSizes(**sizes) if sizes else ModelConfig().qformer)
    return build_miniature(replace(given, bridge=bridge, model=model, stage1=Stage1Phase()), **options)


def scene_batch(parts: ModelParts, count: int = 3, *, own: bool = False) -> PictureBatch:
    """A few scenes, encoded."""
    shown = list(scenes(count, seed=11))
    given = [
        Sample(f"s{number}", f"s{number}", lambda scene=scene: scene.picture, scene.caption)  # type: ignore[misc]
        for number, scene in enumerate(shown)
    ]
    encoder = FrozenEncoder(parts.model.vision, PREPROCESSING, Accelerator())
    embeds = encoder.encode(given, [encoder.open(sample) for sample in given])
    captions = CaptionTexts(parts.model.config, parts.runtime_tokenizer, 64)
    return TextMakers(captions, parts.qformer_texts if own else None).batch(given, embeds)


def steps(stage: GenerativeStage, batch: PictureBatch, count: int = 3) -> list[float]:
    optimizer = make_optimizer([stage], OptimizerConfig(learning_rate=1e-3))
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = stage(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("bridge", ["qformer", "projection", "mlp", "perceiver", "pool"])
def test_every_bridge_trains_its_own_parameters_and_nothing_else(bridge: str) -> None:
    parts = tiny(bridge)
    match_scale(parts.model)
    batch = scene_batch(parts)
    before = recipes.tensor_hashes(parts.model)
    losses = steps(GenerativeStage(parts.model, bridge), batch)
    after = recipes.tensor_hashes(parts.model)
    changed = {name for name in before if before[name] != after[name]}
    trained = {name for name, _ in parts.model.named_parameters() if is_trained(name, bridge)}
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < losses[0]
    # A key's bias has no influence (softmax forgets it), so that Adam may leave it where it is.
    assert changed <= trained
    assert {name for name in trained - changed if not name.endswith("key.bias")} == set()
    for name, parameter in parts.model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


def test_a_flamingo_trains_its_gated_layers_from_a_gate_of_zero(tmp_path: Path) -> None:
    drawing_idefics.draw_idefics(tmp_path, 3, use_resampler=True)
    made = case(None, tmp_path)
    language: Any = made.ours.language
    with torch.no_grad():
        for layer in language.cross_layers:
            layer.attention_gate.zero_()
            layer.feed_forward_gate.zero_()
    stage = GenerativeStage(made.ours, "flamingo")
    gauges = stage.gauges()
    assert set(gauges.values()) == {0.0}
    assert len(gauges) == 2 * len(language.cross_layers)
    before = recipes.tensor_hashes(made.ours)
    losses = steps(stage, made.batch)
    changed = {name for name, value in recipes.tensor_hashes(made.ours).items() if value != before[name]}
    trained = {name for name, _ in made.ours.named_parameters() if is_trained(name, "flamingo")}
    assert changed == trained
    assert all(torch.isfinite(torch.tensor(losses)))
    assert min(stage.gauges().values()) > 0.0


def test_frozen_parts_keep_their_hash_with_the_text_head_kept_too() -> None:
    parts = tiny(draft=True)
    before = recipes.tensor_hashes(parts.model)
    stage = GenerativeStage(parts.model, itg_weight=1.0)
    batch = scene_batch(parts, own=True)
    losses = {name: float(loss.detach()) for name, loss in stage(batch).items()}
    assert losses["loss"] == pytest.approx(losses["lm"] + losses["itg"])
    steps(stage, batch)
    changed = {name for name, value in recipes.tensor_hashes(parts.model).items() if value != before[name]}
    assert {name.split(".")[0] for name in changed} == {"bridge", "draft"}
    assert not parts.model.language.training
    for part in (parts.model.vision, parts.model.language):
        assert all(parameter.grad is None for parameter in part.parameters())


def test_the_language_model_can_be_trained_too() -> None:
    parts = tiny()
    before = recipes.tensor_hashes(parts.model.language)
    stage = GenerativeStage(parts.model, unfreeze_language=True)
    assert stage.language.training
    steps(stage, scene_batch(parts))
    assert recipes.tensor_hashes(parts.model.language) != before


def test_a_text_head_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="the model has no text head; run stage1 first"):
        GenerativeStage(tiny().model, itg_weight=1.0)


def test_labels_are_the_text_and_the_end_token(tmp_path: Path) -> None:
    drawn = drawing.save(tmp_path, seed=4)
    made = case(drawn.model, tmp_path)
    captions, tokenizer = made.batch.captions, _tokenizer(tmp_path)
    assert captions is not None
    for row, (text, prompt) in enumerate(zip(TEXTS, PROMPTS, strict=True)):
        ids = [value for value in captions.labels[row].tolist() if value != IGNORED]
        assert ids[-1] == drawing.BOS  # this checkpoint's end token
        assert tokenizer.decode(ids) == text
        shown = captions.input_ids[row][captions.attention_mask[row] == 1].tolist()
        assert shown[0] == drawing.BOS
        assert tokenizer.decode(shown) == tokenizer.decode(tokenizer.encode(f"{prompt} {text}"))
    assert made.batch.weight == int((captions.labels != IGNORED).sum())


def test_what_is_too_long_is_cut_with_its_end_token_kept(tmp_path: Path) -> None:
    drawing.save(tmp_path, seed=4)
    config = load_checkpoint(tmp_path).config
    batch = CaptionTexts(config, _tokenizer(tmp_path), 3)(samples())
    assert max(int((row != IGNORED).sum()) for row in batch.labels) == 3
    assert all(row[row != IGNORED][-1] == drawing.BOS for row in batch.labels)


def test_the_projection_starts_at_the_size_of_words() -> None:
    parts = build_miniature(TrainingConfig(seed=3))
    match_scale(parts.model)
    with torch.no_grad():
        visual_tokens = parts.model.bridge(scene_batch(parts).image_embeds)
    words = parts.model.language.get_parameter("embed_tokens.weight").detach()
    assert float(visual_tokens.std() / words.std()) == pytest.approx(1.0, rel=0.3)


def test_vectors_do_not_decay_and_frozen_parameters_stay_out() -> None:
    parts = tiny()
    stage = GenerativeStage(parts.model)
    decayed, spared = make_optimizer([stage], OptimizerConfig()).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in spared["params"])
    count = len(list(parts.model.bridge.parameters()))
    assert len(decayed["params"]) + len(spared["params"]) == count


def test_the_rate_rises_and_falls() -> None:
    config = OptimizerConfig(steps=100, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
