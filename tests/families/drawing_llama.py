"""Random tiny checkpoints around decoders of the Llama kind: BLIP-2 with one, MiniGPT-4, LLaVA.

Weights are drawn large, so that captions differ from picture to picture and no two logits are close.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.utils import logging

from blip2edge import Captioner

logging.disable_progress_bar()

VOCAB = 120
IMAGE_ID, PAD_ID = VOCAB - 1, 3
WORDS = (
    *("a", "photo", "of", "two", "cats", "red", "dog", "what", "is", "it", "where"),
    *("USER", "ASSISTANT", "Human", "Assistant", "Img", "?", ":", "#", "<", ">", "/", "###"),
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words and w24, w25, …; BOS first; ``<image>`` is a token of its own."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    for word in WORDS:
        vocab[word] = len(vocab)
    while len(vocab) < IMAGE_ID:
        vocab[f"w{len(vocab)}"] = len(vocab)
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert fast.convert_tokens_to_ids("<image>") == IMAGE_ID
    return fast


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "query_tokens" in name:
                parameter.normal_(0, 0.7, generator=generator)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 2.2 / parameter[0].numel() ** 0.5, generator=generator)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.3, generator=generator)


def text_config(model_type: str = "llama", **changes: Any) -> Any:
    """A tiny language model's config."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return AutoConfig.for_model(model_type, **{**sizes, **changes})


def draw_blip2(directory: Path, seed: int, model_type: str = "llama", **changes: Any) -> tuple[Any, Any]:
    """A BLIP-2 with such a language model, saved; the model and its processor."""
    vision = Blip2VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3, vocab_size=50
    )
    text = text_config(model_type, **changes)
    fields: dict[str, Any] = {
        "vision_config": vision.to_dict(),
        "qformer_config": qformer.to_dict(),
        "text_config": text.to_dict(),
        "num_query_tokens": 5,
        "image_token_index": IMAGE_ID,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    config = Blip2Config(**fields)
    model = Blip2ForConditionalGeneration(config).eval()
    draw_weights(model, seed)
    model.save_pretrained(directory)
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer(), num_query_tokens=5)
    processor.save_pretrained(directory)
    return model, processor


def draw_minigpt4(directory: Path, seed: int, **changes: Any) -> tuple[Any, Any]:
    """A MiniGPT-4 in this project's format: the tensors of BLIP-2, another ``model_type``."""
    model, processor = draw_blip2(directory, seed, **changes)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values["model_type"] = "minigpt4"
    values["architectures"] = ["MiniGPT4"]
    path.write_text(json.dumps(values))
    return model, processor


def draw_llava(
    directory: Path,
    seed: int,
    model_type: str = "llama",
    *,
    llava: dict[str, Any] | None = None,
    siglip: bool = False,
    **changes: Any,
) -> tuple[Any, Any]:
    """A LLaVA, saved; the model and its processor.

    Args:
        directory: Where.
        seed: Of the weights.
        model_type: The language model.
        llava: Fields of ``LlavaConfig``.
        siglip: Whether the tower is a SigLIP, which has no class token; else a CLIP.
        **changes: Fields of the language model's config.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
    }
    vision: Any = SiglipVisionConfig(**sizes) if siglip else CLIPVisionConfig(**sizes, projection_dim=16)
    fields = llava or {}
    strategy = fields.get("vision_feature_select_strategy", "default")
    patches = 9 + (not siglip) - (strategy == "default")
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(model_type, **changes),
        image_token_index=IMAGE_ID,
        image_seq_length=patches,
        **fields,
    )
    model = LlavaForConditionalGeneration(config).eval()
    draw_weights(model, seed)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 3
    model.save_pretrained(directory)
    square = {"height": 24, "width": 24}
    images: Any = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square)
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size=square) if siglip else images,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(not siglip),
    )
    processor.tokenizer.padding_side = "left"
    processor.save_pretrained(directory)
    return model, processor


def pictures(seed: int) -> list[PIL.Image.Image]:
    """Three noisy pictures: landscape, portrait, and small and grey."""
    rng = np.random.default_rng(seed)
    sizes = ((40, 52, 3), (61, 33, 3), (19, 21))
    return [PIL.Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"num_beams": 3, "repetition_penalty": 1.4, "length_penalty": 0.3},
    {"repetition_penalty": 1.4, "min_new_tokens": 6},
    {"no_repeat_ngram_size": 1, "suppress_tokens": [10, 50, 70], "min_length": 14},
)
"""Greedy and three beams, each with and without processors that read the prompt's ids."""

Reference = Callable[..., list[int]]
"""Picture, prompt and options of ``generate`` to the ids that transformers generates, with its padding."""


def assert_same_ids(
    captioner: Captioner, reference: Reference, prompts: Sequence[str | None], seed: int, **fixed: Any
) -> None:
    """Three pictures, in one batch and one by one, against transformers one by one."""
    images = pictures(seed)
    for options in OPTIONS:
        both = {"max_new_tokens": 10, **options}
        batch = list(captioner.caption_many(images, prompts=prompts, batch_size=3, **both, **fixed))
        for image, prompt, result in zip(images, prompts, batch, strict=True):
            expected = reference(image, prompt, **both)
            ours = [*result.tokens, *[PAD_ID] * (len(expected) - len(result.tokens))]
            assert ours == expected, (prompt, options)
            assert captioner.caption(image, prompt=prompt, **both, **fixed).tokens == result.tokens
        assert len({result.tokens for result in batch}) > 1  # the captions depend on picture or prompt
