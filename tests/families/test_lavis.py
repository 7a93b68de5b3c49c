"""LAVIS' checkpoints: a transformers model saved with LAVIS' names, merged with the frozen parts."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

import torch
from torch import Tensor

from blip2edge.bundle.bundle import Bundle
from blip2edge.cli import main
from blip2edge.errors import CheckpointError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.checkpoint.directory import load_checkpoint, load_model
from blip2edge.model.checkpoint.lavis import open_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from tests import drawing
from tests.families.drawing_instruct import draw_instructblip

QUERIES = "bridge.qformer.query_tokens"
TEXT_SIDE = re.compile(r"Qformer\.bert\.(embeddings\.(word|position)|encoder\.layer\.\d+\.(intermediate|output)\.)")


def lavis_name(name: str) -> str:
    """A tensor of transformers' BLIP-2 as LAVIS calls it."""
    for pattern, target in (
        (r"vision_model\.post_layernorm\.", "ln_vision."),
        (r"vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
        (r"vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
        (r"vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
        (r"vision_model\.encoder\.layers\.", "visual_encoder.blocks."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"\.self_attn\.projection\.", ".attn.proj."),
        (r"\.self_attn\.", ".attn."),
        (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
        (r"^qformer\.embeddings\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
        (r"^qformer\.", "Qformer.bert."),
        (r"ttention\.attention\.", "ttention.self."),
        (r"^language_projection\.", "opt_proj."),
    ):
        name = re.sub(pattern, target, name)
    return name


def lavis_state(model: torch.nn.Module, *, vision: bool = False) -> dict[str, Tensor]:
    """What LAVIS saves after stage 2; with ``vision`` also a fine-tuned vision encoder."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("language_model.") or (
            name.startswith("vision_model.") and not vision and "post_layernorm" not in name
        ):
            continue
        renamed = lavis_name(name)
        if renamed.endswith("attn.qkv.bias"):
            query, key, value = tensor.clone().chunk(3)
            assert not key.any()
            state[renamed.replace("qkv.bias", "q_bias")] = query.clone()
            state[renamed.replace("qkv.bias", "v_bias")] = value.clone()
        else:
            state[renamed] = tensor.clone()
    return state


def without_key_bias(model: Any) -> None:
    """EVA's attention has no bias for keys."""
    for layer in model.vision_model.encoder.layers:
        width = layer.self_attn.qkv.bias.shape[0] // 3
        with torch.no_grad():
            layer.self_attn.qkv.bias[width : 2 * width] = 0


def redrawn(model: Any, trained: Mapping[str, Tensor]) -> Any:
    """The same model, with other values in the parts that were trained."""
    base = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if lavis_name(name).replace("qkv.bias", "q_bias") in trained:
                parameter.normal_(0, 0.5)
    return base


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> drawing.Drawn:
    drawn = drawing.save(tmp_path_factory.mktemp("lavis") / "original", seed=21)
    without_key_bias(drawn.model)
    drawn.model.save_pretrained(drawn.directory)
    return drawn


@pytest.fixture(scope="module")
def merged(original: drawing.Drawn, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ``.pth`` of the original, and a base whose trained parts are others."""
    directory = tmp_path_factory.mktemp("merged")
    state = lavis_state(original.model)
    shutil.copytree(original.directory, directory / "base")
    redrawn(original.model, state).save_pretrained(directory / "base")
    torch.save({"model": state, "epoch": 3, "config": {"run": {"task": "captioning"}}}, directory / "stage2.pth")
    return directory / "stage2.pth", directory / "base"


def same_parameters(one: torch.nn.Module, other: torch.nn.Module) -> None:
    theirs = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_stage_2_on_its_frozen_parts_answers_as_the_original(
    original: drawing.Drawn, merged: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, base = merged
    assert main(["export", str(path), "--base", str(base), "-o", str(tmp_path / "bundle")]) == 0
    capsys.readouterr()
    source = Bundle.open(tmp_path / "bundle").manifest.source
    assert (source["checkpoint"], source["base"]) == (str(path), str(base))
    captioner = Captioner.load(tmp_path / "bundle", threads=1)
    for image in drawing.draw_pictures(3, seed=21):
        searches: list[dict[str, Any]] = [{}, {"num_beams": 3}]
        for search in searches:
            wanted = original.generate(image, "a photo of", max_new_tokens=10, **search)
            got = captioner.caption(image, prompt="a photo of", max_new_tokens=10, **search)
            assert got.tokens == wanted


def test_the_base_alone_answers_otherwise(original: drawing.Drawn, merged: tuple[Path, Path]) -> None:
    base, whole = load_checkpoint(merged[1]), load_checkpoint(original.directory)
    assert not torch.equal(base.get_parameter(QUERIES), whole.get_parameter(QUERIES))
    same_parameters(load_model(open_checkpoint(*merged)), whole)


def test_stage_1_leaves_the_projection_to_the_base(original: drawing.Drawn, merged: tuple[Path, Path]) -> None:
    state = {name: value for name, value in lavis_state(original.model).items() if not name.startswith("opt_proj")}
    width = original.variant.qformer_width
    state |= {
        "temp": torch.tensor(0.07),
        "itm_head.weight": torch.zeros(2, width),
        "itm_head.bias": torch.zeros(2),
        "vision_proj.weight": torch.zeros(8, width),
        "text_proj.weight": torch.zeros(8, width),
        "Qformer.cls.predictions.bias": torch.zeros(50),
        "Qformer.bert.embeddings.position_ids": torch.arange(8)[None],
        "Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(50, width),
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.zeros(2 * width, width),
        "Qformer.bert.encoder.layer.0.output.LayerNorm.weight": torch.zeros(width),
    }
    path = merged[0].with_name("stage1.pth")
    torch.save({"model": state}, path)
    model, whole = load_model(open_checkpoint(path, merged[1])), load_checkpoint(original.directory)
    same_parameters(model.get_submodule("bridge.qformer"), whole.get_submodule("bridge.qformer"))
    same_parameters(
        model.get_submodule("bridge.projection"),
        load_checkpoint(merged[1]).get_submodule("bridge.projection"),
    )


def test_a_fine_tuned_vision_encoder_gets_its_bias_whole(original: drawing.Drawn, merged: tuple[Path, Path]) -> None:
    path = merged[0].with_name("finetuned.pth")
    state = lavis_state(original.model, vision=True)
    assert "visual_encoder.blocks.0.attn.q_bias" in state
    torch.save({"model": state}, path)
    shutil.copytree(merged[1], path.with_name("base2"))
    redrawn(original.model, state).save_pretrained(path.with_name("base2"))
    same_parameters(load_model(open_checkpoint(path, path.with_name("base2"))), load_checkpoint(original.directory))


def test_a_projection_alone_as_in_minigpt4(original: drawing.Drawn, merged: tuple[Path, Path]) -> None:
    path = merged[0].with_name("minigpt4.pth")
    state = {f"llama_proj.{name}": value for name, value in original.model.language_projection.state_dict().items()}
    torch.save({"model": state}, path)
    model, base = load_model(open_checkpoint(path, merged[1])), load_checkpoint(merged[1])
    same_parameters(
        model.get_submodule("bridge.projection"),
        load_checkpoint(original.directory).get_submodule("bridge.projection"),
    )
    same_parameters(model.get_submodule("bridge.qformer"), base.get_submodule("bridge.qformer"))


def test_instructblip_keeps_the_text_side(tmp_path: Path) -> None:
    model, _ = draw_instructblip(tmp_path / "original", 22, "t5")
    without_key_bias(model)
    model.save_pretrained(tmp_path / "original")
    state = lavis_state(model)
    assert any(TEXT_SIDE.match(name) for name in state)
    shutil.copytree(tmp_path / "original", tmp_path / "base")
    redrawn(model, state).save_pretrained(tmp_path / "base")
    renamed = {name.replace("opt_proj", "t5_proj"): value for name, value in state.items()}
    torch.save({"model": renamed}, tmp_path / "instruct.pth")
    same_parameters(
        load_model(open_checkpoint(tmp_path / "instruct.pth", tmp_path / "base")),
        load_checkpoint(tmp_path / "original"),
    )


BROKEN: dict[str, tuple[Any, str]] = {
    "half": (
        lambda state: state.pop("Qformer.bert.encoder.layer.0.attention.self.query.weight"),
        "incomplete part of the model: it lacks",
    ),
    "queries": (lambda state: state.pop("query_tokens"), "lacks query_tokens"),
    "unknown": (
        lambda state: state.update({"cross_proj.weight": torch.zeros(2)}),
        "the base does not have: cross_proj.weight",
    ),
    "bias": (
        lambda state: state.update({"visual_encoder.blocks.0.attn.q_bias": torch.zeros(2)}),
        "lacks .*v_bias",
    ),
    "shape": (lambda state: state.update({"query_tokens": torch.zeros(1, 7, 24)}), "query_tokens has shape"),
    "nothing": (lambda state: state.clear(), "no tensor of the model"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_what_does_not_fit_is_named(
    original: drawing.Drawn, merged: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    breaks, words = BROKEN[case]
    state = lavis_state(original.model)
    breaks(state)
    torch.save({"model": state}, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "broken.pth", merged[1])


def test_files_that_are_no_checkpoint(merged: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    torch.save({"model": Path("run")}, tmp_path / "pickled.pth")
    for name, words in (
        ("text.pth", "cannot be read as a file of tensors"),
        ("other.pth", "is no checkpoint of LAVIS"),
        ("pickled.pth", "cannot be read as a file of tensors"),
        ("missing.pth", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path / name, merged[1])


def test_base_and_pth_belong_together(merged: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="base DIRECTORY"):
        export_checkpoint(merged[0], tmp_path / "bundle")
    with pytest.raises(UsageError, match="leave base out"):
        export_checkpoint(merged[1], tmp_path / "bundle", base=merged[1])
