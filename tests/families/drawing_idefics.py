"""Random tiny Idefics checkpoints, with weights and gates so large that every picture changes the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    PreTrainedTokenizerFast,
)

WORDS = (
    "a",
    "photo",
    "of",
    "two",
    "cats",
    "red",
    "dog",
    "User",
    "Question",
    "Answer",
    ":",
    "what",
    "is",
    "?",
    ".",
)
VOCABULARY = 90
SPECIAL = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
IMAGE_SIZE = 32
TINY_VISION = {
    "embed_dim": 24,
    "image_size": IMAGE_SIZE,
    "intermediate_size": 40,
    "patch_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


def draw_tokenizer() -> PreTrainedTokenizerFast:
    """Words, and Idefics' special tokens behind the vocabulary proper."""
    names = ["<unk>", "<s>", "</s>", *WORDS]
    names += [f"w{index}" for index in range(len(names), VOCABULARY)]
    backend = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def draw_config(**overrides: Any) -> IdeficsConfig:
    """A tiny configuration; ``overrides`` replace keys of it, ``perceiver`` keys of its resampler."""
    perceiver = {
        "use_resampler": overrides.get("use_resampler", True),
        "resampler_n_latents": 3,
        "resampler_depth": 2,
        "resampler_n_heads": 2,
        "resampler_head_dim": 10,
        **overrides.pop("perceiver", {}),
    }
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "additional_vocab_size": len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "use_resampler": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vision_config": TINY_VISION,
        **overrides,
    }
    return IdeficsConfig(**values, perceiver_config=perceiver)


def draw_idefics(directory: Path, seed: int, **overrides: Any) -> tuple[IdeficsForVisionText2Text, IdeficsProcessor]:
    """Saves a random checkpoint and its processor; returns both."""
    torch.manual_seed(seed)
    model = IdeficsForVisionText2Text(draw_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" in name:  # tanh of it is between 0.46 and 0.91, either sign
                parameter.uniform_(0.5, 1.5).mul_(torch.randint(0, 2, parameter.shape) * 2 - 1)
            elif "embed" in name or name.endswith("latents"):
                parameter.normal_(0, 0.7)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 2.2 / parameter[0].numel() ** 0.5)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=IMAGE_SIZE), draw_tokenizer())
    processor.save_pretrained(directory)
    return model, processor
