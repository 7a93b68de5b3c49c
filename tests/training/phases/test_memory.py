"""Savings of memory in stage 2: activation checkpointing, and frozen parts in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from blip2edge.errors import ConfigError  # noqa: E402
from blip2edge.training.config import parse_config  # noqa: E402
from blip2edge.training.loading.loader import PictureBatch  # noqa: E402
from blip2edge.training.loop.optim import recompute_activations  # noqa: E402
from blip2edge.training.phases.stage1 import RepresentationStage  # noqa: E402
from blip2edge.training.phases.stage2 import GenerativeStage  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from tests.training import recipes  # noqa: E402
from tests.training.drawing_stage1 import draw_batch, draw_stage1  # noqa: E402
from tests.training.phases.test_stage2 import case, draw  # noqa: E402

INSTRUCTIONS = ("what is it ?", "a dog", "is it red")


def step(stage: nn.Module, batch: Any) -> tuple[float, dict[str, Tensor], int]:
    """The loss of a batch, the gradients of the trained parameters, and the bytes that were kept for the gradients."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = stage(batch)["loss"]
    held = sum(size for place, size in kept.items() if place not in weights)
    loss.backward()
    gradients = {name: part.grad.clone() for name, part in stage.named_parameters() if part.grad is not None}
    return float(loss.detach()), gradients, held


@pytest.mark.parametrize("kind", ["opt", "t5", "llava", "instruct-llama"])
def test_recomputed_activations_change_no_gradient(kind: str, tmp_path: Path) -> None:
    prompts = {"prompts": INSTRUCTIONS} if "instruct" in kind else {}
    found = []
    theirs = draw(kind, tmp_path)
    for recomputed in (False, True):
        made = case(theirs, tmp_path, **prompts)
        stage = GenerativeStage(made.ours, "mlp" if kind == "llava" else "qformer")
        if recomputed:
            recompute_activations(stage)
        found.append(step(stage, made.batch))
    (loss, gradients, held), (again, others, less) = found
    assert again == loss
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert less < 0.8 * held


def test_recomputed_activations_change_no_gradient_of_stage_1() -> None:
    """With dropout: each layer draws the same mask again."""
    images, texts = draw_batch(4)
    found = []
    for recomputed in (False, True):
        stage = RepresentationStage(draw_stage1(dropout=0.3), {"itc": 1.0, "itm": 1.0, "itg": 1.0})
        if recomputed:
            recompute_activations(stage)
            recompute_activations(stage)  # a second phase over the same layers changes nothing
        found.append(step(stage, PictureBatch(("a", "b", "c", "d"), images, 4, texts=texts)))
    (loss, gradients, held), (again, others, less) = found
    assert again == loss
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert less < 0.8 * held


@pytest.mark.parametrize(
    ("kind", "dtype", "alike"),
    [
        ("opt", torch.bfloat16, 0.99),
        ("t5", torch.bfloat16, 0.9),
        ("instruct-llama", torch.bfloat16, 0.9),
        ("instruct-llama", torch.float16, 0.99),
    ],
)
def test_a_frozen_language_model_in_16_bits_loses_little(kind: str, dtype: Any, alike: float, tmp_path: Path) -> None:
    """The drawn weights are large, so rounding shows more than in a trained model."""
    made = case(draw(kind, tmp_path), tmp_path)
    stage = GenerativeStage(made.ours)
    loss, gradients, held = step(stage, made.batch)
    stage.zero_grad()
    stage.language.to(dtype)
    rounded, others, less = step(stage, made.batch)
    assert rounded != loss
    assert rounded == pytest.approx(loss, rel=0.02)
    assert gradients.keys() == others.keys()
    assert all(gradient.dtype == torch.float32 for gradient in others.values())
    first, second = (torch.cat([part.flatten() for part in each.values()]) for each in (gradients, others))
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) > alike
    assert less < 0.85 * held


@pytest.mark.slow
def test_a_run_with_both(tmp_path: Path) -> None:
    """The checkpoint's frozen parts are their values in bfloat16; the losses are close to those of the plain run."""
    losses, weights = [], []
    for name, loop in (("plain", ""), ("small", 'frozen_dtype = "bfloat16"\nrecompute_activations = true')):
        path = recipes.write(tmp_path / f"{name}.toml", 'seed = 1\nweights_dtype = "float32"', loop=loop)
        record = train("stage2", path, tmp_path / name, evaluation_scenes=0)
        losses.append([record["phases"][phase]["final_loss"] for phase in ("language", "stage1", "stage2")])
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert losses[0][0] == losses[1][0]  # the language model is trained in float32, then frozen
    assert losses[1][1:] == pytest.approx(losses[0][1:], rel=0.03)
    plain, small = weights
    for name, tensor in plain.items():
        if name.startswith(("vision_model.", "language_model.")):
            assert torch.equal(small[name], tensor.bfloat16().float()), name
    assert not torch.equal(plain["language_projection.weight"], small["language_projection.weight"])


def test_two_types_of_16_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="frozen_dtype = 'float16' does not work with autocast = 'bfloat16'"):
        parse_config('[model]\ncheckpoint = "x"\n[loop]\nfrozen_dtype = "float16"\nautocast = "bfloat16"')


def test_trained_layers_of_the_language_model_stay_in_float32() -> None:
    with pytest.raises(ConfigError, match="frozen_dtype = 'bfloat16' does not work with bridge = 'flamingo'"):
        parse_config('bridge = "flamingo"\n[loop]\nfrozen_dtype = "bfloat16"')
