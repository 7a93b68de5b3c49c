"""Token merging, compared with the paper's algorithm in loops, patch by patch (arXiv 2210.09461, section 3)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the model is torch's")

from blip2edge.errors import UsageError  # noqa: E402
from blip2edge.model.bridges.mlp import MLPConfig  # noqa: E402
from blip2edge.model.bridges.pool import AttentionPoolConfig  # noqa: E402
from blip2edge.model.config import CaptionerConfig, VisionConfig  # noqa: E402
from blip2edge.model.models import with_merged_tokens  # noqa: E402
from blip2edge.model.vision.token_merging import merged_counts, most_merged  # noqa: E402
from blip2edge.model.vision.vit import VisionTransformer  # noqa: E402

EVA = VisionConfig(24, 48, 3, 4, image_size=32, patch_size=8)
CLIP = replace(EVA, clip=True, post_norm=False, activation="quick_gelu")
Slot = dict[str, Any]


def drawn(config: VisionConfig, seed: int = 0) -> VisionTransformer:
    """A ViT whose attention tells patches apart."""
    torch.manual_seed(seed)
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim >= 2 and "embedding" not in name else 0
            parameter.normal_(0, 2.2 / fan_in**0.5 if fan_in else 0.7)
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def cosine(one: Any, other: Any) -> float:
    return float((one @ other) / (one.norm() * other.norm()))


def merged_by_hand(slots: list[Slot], count: int) -> list[Slot]:
    """The paper's five steps on a list of patches, each with its vector, its key and its size.

    ``slots`` has the class token first; it is in the first set and draws no edge.
    """
    first, second = slots[0::2], slots[1::2]
    edges = []
    for index, slot in enumerate(first):
        if index == 0:
            continue
        scores = [cosine(slot["key"], other["key"]) for other in second]
        partner = max(range(len(second)), key=scores.__getitem__)
        edges.append((scores[partner], index, partner))
    edges.sort(reverse=True)
    groups: dict[int, list[Slot]] = {partner: [slot] for partner, slot in enumerate(second)}
    gone = set()
    for _, index, partner in edges[:count]:
        gone.add(index)
        groups[partner].append(first[index])
    out = [slot for index, slot in enumerate(first) if index not in gone]
    for members in groups.values():
        size = sum(slot["size"] for slot in members)
        out.append({"x": sum(slot["size"] * slot["x"] for slot in members) / size, "size": size})
    return out


@torch.no_grad()
def run_by_hand(model: VisionTransformer, picture: Any, tokens: int) -> list[Slot]:
    """One picture through the ViT, attention and merging written out slot by slot."""
    patches = model.patch_embedding(picture[None])[0].flatten(1).T
    x = torch.cat([model.class_embedding.reshape(1, -1), patches]) + model.position_embedding.reshape(
        len(patches) + 1, -1
    )
    if model.pre_norm is not None:
        x = model.pre_norm(x)
    slots: list[Slot] = [{"x": row, "size": 1} for row in x]
    for block in model.layers:
        slots = layer_by_hand(block, slots, tokens)
    if model.post_norm is not None:
        for slot in slots:
            slot["x"] = model.post_norm(slot["x"])
    return slots


def layer_by_hand(block: Any, slots: list[Slot], tokens: int) -> list[Slot]:
    attention = block.attention
    heads = attention.heads
    rows = [attention.qkv(block.norm1(slot["x"])).reshape(3, heads, -1) for slot in slots]
    after = []
    for slot, (query, _, _) in zip(slots, rows, strict=True):
        parts = []
        for head in range(heads):
            scores = [
                float(query[head] @ row[1][head]) * attention.scale + math.log(other["size"])
                for row, other in zip(rows, slots, strict=True)
            ]
            weights = torch.tensor(scores).softmax(dim=0)
            parts.append(sum(weight * row[2][head] for weight, row in zip(weights, rows, strict=True)))
        after.append({**slot, "x": slot["x"] + attention.projection(torch.cat(parts))})
    for slot, row in zip(after, rows, strict=True):
        slot["key"] = sum(row[1][head] for head in range(heads)) / heads
    patches = len(after) - 1
    merged = merged_by_hand(after, min(tokens, patches // 2))
    return [{"x": slot["x"] + block.mlp(block.norm2(slot["x"])), "size": slot["size"]} for slot in merged]


@pytest.mark.parametrize("config", [EVA, CLIP, replace(EVA, image_size=24), replace(EVA, num_heads=1)])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@torch.no_grad()
def test_the_same_as_the_paper_by_hand(config: VisionConfig, tokens: int) -> None:
    """Even and odd numbers of patches; with 5 of 9 or of 16, half of the patches bounds the last layers."""
    model = drawn(replace(config, merge_tokens=tokens), seed=tokens)
    pictures = torch.randn(2, 3, config.image_size, config.image_size)
    got = model(pictures)
    assert got.shape == (2, model.config.num_embeds, config.hidden_size)
    for picture, embeds in zip(pictures, got, strict=True):
        slots = run_by_hand(model, picture, tokens)
        assert len(slots) == len(embeds)
        assert sum(slot["size"] for slot in slots) == config.num_positions
        wanted = torch.stack([slot["x"] for slot in slots])
        assert (embeds - wanted).abs().max() < 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_without_merging_nothing_changes() -> None:
    """The same bits, names and module as a config that knows of no merging, whatever the sizes would say."""
    plain, merged = drawn(EVA), drawn(replace(EVA, merge_tokens=2))
    assert plain.state_dict().keys() == merged.state_dict().keys()
    assert not any("matching" in name for name, _ in plain.named_modules())
    pictures = torch.randn(2, 3, 32, 32)
    x = torch.cat([plain.class_embedding.expand(2, 1, -1), plain.patch_embedding(pictures).flatten(2).mT], 1)
    x = x + plain.position_embedding
    for block in plain.layers:
        x = x + block.attention(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    assert torch.equal(plain(pictures), plain.post_norm(x))  # type: ignore[misc]  # post_norm may be None


@torch.no_grad()
def test_patches_that_are_the_same_merge_without_a_loss() -> None:
    """Attention that counts a merged key as often as it stands for: equal patches may merge as they like."""
    config = replace(EVA, num_layers=2)
    plain = drawn(config)
    plain.position_embedding[:, 1:] = plain.position_embedding[:, 1:2]
    merged = VisionTransformer(replace(config, merge_tokens=7))
    merged.load_state_dict(plain.state_dict())
    picture = torch.ones(1, 3, 32, 32) * torch.randn(1, 3, 1, 1)  # one colour: all patches are one vector
    before, after = plain(picture), merged(picture)
    assert after.shape[1] == 1 + 16 - 7 - 4
    assert (before[:, 0] - after[:, 0]).abs().max() < 1e-5
    assert (before[:, 1:2] - after[:, 1:]).abs().max() < 1e-5


def test_counts() -> None:
    assert merged_counts(196, 12, 8) == [8] * 12
    assert merged_counts(196, 12, 16) == [16] * 11 + [10]  # as in the paper: half of the 20 that are left
    assert merged_counts(64, 3, 0) == [0, 0, 0]
    assert most_merged(196, 12) == 16
    assert most_merged(256, 39) == 6
    assert replace(EVA, merge_tokens=3).num_embeds == 17 - 9
    assert replace(EVA, merge_tokens=3, keep_class=False).num_embeds == 16 - 9


def captioner(bridge: Any) -> CaptionerConfig:
    return CaptionerConfig(vision=EVA, bridge=bridge, language=None)  # type: ignore[arg-type]  # no language is asked


def test_what_cannot_be_merged_is_refused() -> None:
    """EVA above: 16 patches in 3 layers."""
    pooled = captioner(AttentionPoolConfig(24, 4, 4, 24))
    assert with_merged_tokens(pooled, 0) is pooled
    assert with_merged_tokens(pooled, 5).vision == replace(EVA, merge_tokens=5)
    for wrong in (6, 16, -1):
        with pytest.raises(UsageError, match=r"3 layers and 16 patches; give merge_tokens 1 to 5"):
            with_merged_tokens(pooled, wrong)
    coarse = replace(pooled, vision=replace(EVA, patch_size=24))
    with pytest.raises(UsageError, match=r"3 layers and 1 patches; leave merge_tokens out"):
        with_merged_tokens(coarse, 1)
    with pytest.raises(UsageError, match=r"changes the order.*leave merge_tokens out"):
        with_merged_tokens(captioner(MLPConfig(24, 24, 17)), 1)
