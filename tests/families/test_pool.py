"""The attention pool: compared with torch's attention, and in a whole captioner with transformers' OPT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.bridges.pool import AttentionPoolBridge, AttentionPoolConfig
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from blip2edge.model.families.registry import read_config, write_config
from blip2edge.runtime.captioning.captioner import Captioner
from tests import drawing

PROMPTS = ("a photo of", "Question: what is it? Short answer:", "two red cats")
QUERIES, WIDTH, HEADS = 6, 24, 4


class Reference(nn.Module):
    """The same pool on torch's ``MultiheadAttention``."""

    def __init__(self, bridge: AttentionPoolBridge) -> None:
        super().__init__()
        pool = bridge.attention
        width, context = pool.query.in_features, pool.key.in_features
        self.bridge = bridge
        self.attention = nn.MultiheadAttention(width, HEADS, kdim=context, vdim=context, batch_first=True)
        with torch.no_grad():
            for name, layer in (("q", pool.query), ("k", pool.key), ("v", pool.value)):
                getattr(self.attention, f"{name}_proj_weight").copy_(layer.weight)
            self.attention.in_proj_bias.copy_(torch.cat([pool.query.bias, pool.key.bias, pool.value.bias]))
            self.attention.out_proj.load_state_dict(pool.out.state_dict())

    def forward(self, image_embeds: Tensor) -> Tensor:
        queries = self.bridge.query_norm(self.bridge.query_tokens).expand(len(image_embeds), -1, -1)
        patches = self.bridge.patch_norm(image_embeds)
        return self.bridge.projection(self.attention(queries, patches, patches, need_weights=False)[0])


class Exported(NamedTuple):
    directory: Path
    drawn: drawing.Drawn
    captioner: Captioner


def save_pool(directory: Path, drawn: drawing.Drawn) -> None:
    """A checkpoint of our own: the drawn one's vision encoder and language model, a pool between them."""
    shutil.copytree(drawn.directory, directory)
    values = json.loads((directory / "config.json").read_text())
    bridge = {"kind": "pool", "num_query_tokens": QUERIES, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    for key in ("qformer_config", "num_query_tokens", "architectures"):
        values.pop(key)
    values |= {"model_type": "blip2edge", "bridge_config": bridge}
    (directory / "config.json").write_text(json.dumps(values))
    config = AttentionPoolConfig(WIDTH, HEADS, QUERIES, drawn.variant.vision_width)
    torch.manual_seed(drawn.variant.seed)
    pool = AttentionPoolBridge(config, drawn.variant.width)
    drawing.randomize(pool)
    nn.init.normal_(pool.query_tokens, 0, 0.7)
    theirs = {
        name: tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
        if name.startswith(("vision_model.", "language_model."))
    }
    ours = {f"bridge.{name}": tensor for name, tensor in pool.state_dict().items()}
    save_file({**theirs, **ours}, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module", params=[31, 32, 33])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    directory = tmp_path_factory.mktemp("pool")
    drawn = drawing.save(directory / "drawn", seed=request.param)
    save_pool(directory / "checkpoint", drawn)
    bundle = export_checkpoint(directory / "checkpoint", directory / "bundle").bundle
    return Exported(directory / "checkpoint", drawn, Captioner.load(bundle, threads=1))


@torch.no_grad()
def expected(exported: Exported, picture: Any, prompt: str, **search: Any) -> tuple[int, ...]:
    """transformers' OPT behind visual tokens that torch's own attention pooled."""
    ours = load_checkpoint(exported.directory)
    inputs = exported.drawn.processor(images=picture, text=prompt, return_tensors="pt")
    slots = exported.drawn.variant.queries  # the processor writes as many for the Q-Former
    text = inputs["input_ids"][:, slots:]
    assert isinstance(ours.bridge, AttentionPoolBridge)
    visual = Reference(ours.bridge)(exported.drawn.model.vision_model(inputs["pixel_values"]).last_hidden_state)
    language = exported.drawn.model.language_model
    ids = torch.cat([torch.full((1, QUERIES), drawing.IMAGE), text], dim=1)
    embeds = torch.cat([visual, language.get_input_embeddings()(text)], dim=1)
    row = language.generate(
        inputs_embeds=embeds, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, **search
    )[0]
    return exported.drawn.until_end(row[ids.shape[1] :].tolist())


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_single_and_batched_ids_are_transformers(exported: Exported, search: dict[str, Any]) -> None:
    pictures = drawing.draw_pictures(3, seed=exported.drawn.variant.seed)
    wanted = [expected(exported, picture, prompt, **search) for picture, prompt in zip(pictures, PROMPTS, strict=True)]
    captioner = exported.captioner
    batched = captioner.caption_many(pictures, prompts=PROMPTS, batch_size=3, max_new_tokens=10, **search)
    assert [result.tokens for result in batched] == wanted
    for picture, prompt, ids in zip(pictures, PROMPTS, wanted, strict=True):
        assert captioner.caption(picture, prompt=prompt, max_new_tokens=10, **search).tokens == ids


def test_the_pool_is_torchs_attention() -> None:
    torch.manual_seed(0)
    bridge = AttentionPoolBridge(AttentionPoolConfig(WIDTH, HEADS, QUERIES, 32), 40).eval()
    drawing.randomize(bridge)
    nn.init.normal_(bridge.query_tokens, 0, 0.7)
    patches = torch.randn(3, 17, 32)
    with torch.no_grad():
        torch.testing.assert_close(bridge(patches), Reference(bridge)(patches), rtol=1e-5, atol=1e-5)


def test_a_saved_pool_is_read_back(exported: Exported, tmp_path: Path) -> None:
    model = load_checkpoint(exported.directory)
    assert read_config(write_config(model.config)) == model.config
    save_checkpoint(model, tmp_path, like=exported.directory)
    again = load_checkpoint(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.slow
def test_half_precision_passes_the_parity_check(tmp_path: Path) -> None:
    save_pool(tmp_path / "checkpoint", drawing.save(tmp_path / "drawn", seed=34))
    report = export_checkpoint(tmp_path / "checkpoint", tmp_path / "half", precision="fp16")
    assert all(graph.relative <= graph.tolerance for graph in report.graphs)


def test_what_is_no_bridge_is_one_line() -> None:
    with pytest.raises(UnsupportedModelError, match="the bridge is of kind 'resampler'"):
        read_config({"model_type": "blip2edge", "bridge_config": {"kind": "resampler"}})
    with pytest.raises(CheckpointError, match="the number of heads 5 does not divide the width 24"):
        AttentionPoolConfig(24, 5, QUERIES, 32)
