"""Writes checkpoints with random weights, of any family: at full size in little memory, or shrunk to a few layers.

A configuration is the ``config.json`` of a published checkpoint, as in ``blip2edge/shapes/published``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from blip2edge.model.families.registry import read_config, weight_map
from blip2edge.model.models import Config, build_model
from blip2edge.shapes.families import CONFIGS

VIT_B = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
SHAPE: dict[str, Any] = {
    "model_type": "blip-2",
    "num_query_tokens": 32,
    "image_token_index": 50271,
    "vision_config": VIT_B,
    "qformer_config": {},
    "text_config": {"model_type": "opt"},
}
"""Configuration of a captioner with ViT-B/16, the Q-Former of BLIP-2 and OPT-125m (transformers' defaults)."""

SHARD = 1 << 30  # bytes
NOISE = (1 << 20) + 7  # length of the block of random numbers; each tensor reads it from another offset
TINY_VOCABULARY = 96
TINY: dict[str, int] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "encoder_hidden_size": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "d_kv": 8,
    "projection_dim": 16,
    "image_text_hidden_size": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_query_tokens": 5,
    "vocab_size": TINY_VOCABULARY,
    "image_token_index": TINY_VOCABULARY - 1,
    "cross_layer_interval": 2,
    "resampler_n_latents": 3,
    "resampler_depth": 2,
    "resampler_n_heads": 2,
    "resampler_head_dim": 8,
}
"""Sizes of a tiny model, by their names in ``config.json``."""


def published(name: str) -> dict[str, Any]:
    """Returns the published configuration with this name, from `blip2edge/shapes/published`."""
    return dict(json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration with the sizes of :data:`TINY`; types of modules and flags are unchanged."""
    small: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            small[key] = shrunk(value)
        elif key.endswith("_token_id") and isinstance(value, int):
            small[key] = min(value, TINY_VOCABULARY - 2)
        else:
            small[key] = TINY.get(key, value) if value is not None else None
    return small


def scaled(config: dict[str, Any], depth: float) -> dict[str, Any]:
    """Returns the configuration with the number of layers multiplied by ``depth``; widths are unchanged."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out[key] = scaled(value, depth)
        elif key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "resampler_depth"):
            out[key] = max(1, round(value * depth))
        else:
            out[key] = value
    return out


def opened(values: dict[str, Any]) -> Config:
    """Parses a configuration like that of a checkpoint; adds a separate head if the published weights have one."""
    config: Any = read_config(values)
    if values.get("text_config", {}).get("tie_word_embeddings") is False and config.language.tie_embeddings:
        config = replace(config, language=replace(config.language, tie_embeddings=False))
    made: Config = config
    return made


def random_tensors(config: Config, dtype: torch.dtype, gain: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the checkpoint's tensors one at a time, all from one block of random numbers, at different offsets."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
    names, offset = weight_map(config), 0
    seen: set[str] = set()
    for ours, shape in shapes.items():
        fused = names.sources(ours)
        if fused[0] in seen:
            continue
        seen.update(fused)
        count = int(torch.Size(shape).numel())
        scale = gain * (max(1, count // shape[0]) ** -0.5 if len(shape) > 1 else 0.1)
        offset = (offset + 7919) % NOISE
        values = (noise.roll(-offset) * scale).to(dtype).repeat(count // NOISE + 1)[:count].reshape(shape)
        if "norm" in ours.lower() and ours.endswith("weight"):
            values = values + 1
        if ours.endswith("_gate"):  # a gate of 0 would switch its layer off
            values = values / scale
        yield from names.split(ours, values).items()


def write_checkpoint(
    directory: Path, config: dict[str, Any], dtype: torch.dtype = torch.float16, gain: float = 1.0
) -> int:
    """Writes sharded safetensors, config, tokenizers and preprocessing; returns the bytes of the weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    held = total = number = 0

    def flush() -> None:
        nonlocal shard, held, number
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard, held = {}, 0

    read = opened(config)
    for name, tensor in random_tensors(read, dtype, gain):
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
        total += tensor.nbytes
        if held > SHARD:
            flush()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    size = read.vision.image_size
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BlipImageProcessor", "size": {"height": size, "width": size}})
    )
    _write_tokenizers(directory, config)
    return total


def _write_tokenizers(directory: Path, config: dict[str, Any]) -> None:
    """Writes tokenizers with a few words, and the tokens that mark a picture and surround it."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "photo", "of", "<fake_token_around_image>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary["<image>"] = config.get("image_token_index") or len(words)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer.post_processor = template
    tokenizer.add_special_tokens(["<image>", "<fake_token_around_image>"])
    (directory / "qformer_tokenizer").mkdir()
    for folder in (directory, directory / "qformer_tokenizer"):
        tokenizer.save(str(folder / "tokenizer.json"))
