"""Weight tables of DINOv2 and DINOv3, by the names of published checkpoints."""

from __future__ import annotations

from blip2edge.model.vision.dinov2 import Dinov2Config
from blip2edge.model.vision.dinov3 import Dinov3Config
from blip2edge.model.weights.rules import Rule


def dinov2_rules(config: Dinov2Config) -> tuple[Rule, ...]:
    """Returns the weight table of a DINOv2, with or without registers."""
    layer = "encoder.layer.*"
    mlp: tuple[Rule, ...] = (Rule("layers.*.mlp", f"{layer}.mlp"),)
    if config.gated:
        mlp = (
            Rule("layers.*.mlp.gate_up", f"{layer}.mlp.weights_in"),
            Rule("layers.*.mlp.down", f"{layer}.mlp.weights_out"),
        )
    return (
        Rule("class_embedding", "embeddings.cls_token"),
        Rule("position_embedding", "embeddings.position_embeddings"),
        Rule("registers", "embeddings.register_tokens"),
        Rule("patch_embedding", "embeddings.patch_embeddings.projection"),
        Rule("post_norm", "layernorm"),
        Rule("layers.*.norm1", f"{layer}.norm1"),
        Rule("layers.*.norm2", f"{layer}.norm2"),
        Rule("layers.*.scale1", f"{layer}.layer_scale1.lambda1"),
        Rule("layers.*.scale2", f"{layer}.layer_scale2.lambda1"),
        Rule(
            "layers.*.attention.qkv", tuple(f"{layer}.attention.attention.{part}" for part in ("query", "key", "value"))
        ),
        Rule("layers.*.attention.projection", f"{layer}.attention.output.dense"),
        *mlp,
    )


def dinov3_rules(config: Dinov3Config) -> tuple[Rule, ...]:
    """Returns the weight table of a DINOv3 ViT."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if not config.gated:
        names = {"fc1": "up_proj", "fc2": "down_proj"}
    return (
        Rule("class_embedding", "embeddings.cls_token"),
        Rule("registers", "embeddings.register_tokens"),
        Rule("patch_embedding", "embeddings.patch_embeddings"),
        Rule("post_norm", "norm"),
        Rule("layers.*.norm1", "layer.*.norm1"),
        Rule("layers.*.norm2", "layer.*.norm2"),
        Rule("layers.*.scale1", "layer.*.layer_scale1.lambda1"),
        Rule("layers.*.scale2", "layer.*.layer_scale2.lambda1"),
        Rule("layers.*.attention.query", "layer.*.attention.q_proj"),
        Rule("layers.*.attention.key", "layer.*.attention.k_proj"),
        Rule("layers.*.attention.value", "layer.*.attention.v_proj"),
        Rule("layers.*.attention.projection", "layer.*.attention.o_proj"),
        *(Rule(f"layers.*.mlp.{ours}", f"layer.*.mlp.{theirs}") for ours, theirs in names.items()),
    )
