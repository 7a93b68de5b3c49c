"""Random tiny BLIP-2 checkpoints, saved by transformers, whose captions depend on their picture.

Small random weights give logits that hardly depend on the input, so wrong code could give the same ids.
Here every matrix keeps the magnitude of a signal (normal, standard deviation 2.2 / sqrt(fan_in)), embeddings are large,
norms are not identities, and biases are not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

logging.disable_progress_bar()

VOCABULARY = 120
IMAGE, BOS, PAD = VOCABULARY - 1, 2, 1
WORDS = (
    "a",
    "photo",
    "of",
    "two",
    "cats",
    "red",
    "dog",
    "Question",
    ":",
    "what",
    "is",
    "it",
    "Short",
    "answer",
    "?",
)


@dataclass(frozen=True)
class Variant:
    """Sizes and kinds of a checkpoint; the defaults are the tiny one that most tests share."""

    seed: int = 0
    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 32
    vision_heads: int = 4
    vision_layers: int = 2
    qkv_bias: bool = True
    queries: int = 5
    qformer_width: int = 24
    qformer_heads: int = 3
    qformer_layers: int = 2
    cross_frequency: int = 2
    width: int = 32
    heads: int = 4
    layers: int = 2
    embed_dim: int | None = None
    norm_before: bool = True
    tied: bool = True
    context: int = 64
    activation: str = "relu"
    eos: int | tuple[int, ...] = BOS


def draw_model(variant: Variant) -> Blip2ForConditionalGeneration:
    """The model, in eval mode."""
    vision = Blip2VisionConfig(
        hidden_size=variant.vision_width,
        intermediate_size=2 * variant.vision_width,
        num_hidden_layers=variant.vision_layers,
        num_attention_heads=variant.vision_heads,
        image_size=variant.image_size,
        patch_size=variant.patch_size,
        qkv_bias=variant.qkv_bias,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=variant.qformer_width,
        intermediate_size=2 * variant.qformer_width,
        num_hidden_layers=variant.qformer_layers,
        num_attention_heads=variant.qformer_heads,
        cross_attention_frequency=variant.cross_frequency,
        encoder_hidden_size=variant.vision_width,
        vocab_size=50,
    )
    text = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=variant.width,
        ffn_dim=2 * variant.width,
        num_hidden_layers=variant.layers,
        num_attention_heads=variant.heads,
        max_position_embeddings=variant.context,
        word_embed_proj_dim=variant.embed_dim or variant.width,
        do_layer_norm_before=variant.norm_before,
        tie_word_embeddings=variant.tied,
        activation_function=variant.activation,
        bos_token_id=BOS,
        eos_token_id=list(variant.eos) if isinstance(variant.eos, tuple) else variant.eos,
        pad_token_id=PAD,
    )
    values: dict[str, Any] = {"tie_word_embeddings": variant.tied}
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=variant.queries,
        image_token_index=IMAGE,
        **values,
    )
    torch.manual_seed(variant.seed)
    model = Blip2ForConditionalGeneration(config).eval()
    randomize(model)
    return model


def randomize(model: torch.nn.Module) -> None:
    """Weights with which every part of the model matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or name == "query_tokens":
                parameter.normal_(0, 0.7)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 2.2 / parameter[0].numel() ** 0.5)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)


def draw_processor(variant: Variant) -> Blip2Processor:
    """Pictures of the model's size; a tokenizer of words that puts BOS in front, as OPT's does."""
    vocabulary = {"<s>": 0, "<pad>": PAD, "</s>": BOS, "<unk>": 3}
    for word in WORDS:
        vocabulary[word] = len(vocabulary)
    while len(vocabulary) < IMAGE:
        vocabulary[f"w{len(vocabulary)}"] = len(vocabulary)
    vocabulary["<image>"] = IMAGE
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    )
    size = {"height": variant.image_size, "width": variant.image_size}
    return Blip2Processor(BlipImageProcessorPil(size=size), tokenizer, num_query_tokens=variant.queries)


@dataclass(frozen=True)
class Drawn:
    """A saved checkpoint, and transformers' model and processor of it: the oracle."""

    directory: Path
    variant: Variant
    model: Blip2ForConditionalGeneration
    processor: Blip2Processor

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a caption."""
        return self.variant.eos if isinstance(self.variant.eos, tuple) else (self.variant.eos,)

    @torch.no_grad()
    def generate(self, image: PIL.Image.Image, prompt: str | None, **options: Any) -> tuple[int, ...]:
        """The ids that transformers generates for one picture, the end token included."""
        text = {} if prompt is None else {"text": prompt}
        inputs = self.processor(images=image, return_tensors="pt", **text)
        row = self.model.generate(**inputs, do_sample=False, **options)[0].tolist()
        length = inputs["input_ids"].shape[1] if prompt is not None else self.variant.queries + 1
        return self.until_end(row[length:])

    @torch.no_grad()
    def generate_batch(
        self, images: Sequence[PIL.Image.Image], prompts: Sequence[str], **options: Any
    ) -> list[tuple[int, ...]]:
        """The same for several pictures in one padded batch."""
        inputs = self.processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
        rows = self.model.generate(**inputs, do_sample=False, **options).tolist()
        return [self.until_end(row[inputs["input_ids"].shape[1] :]) for row in rows]

    def until_end(self, row: Sequence[int]) -> tuple[int, ...]:
        """A row without the padding behind its end token."""
        for at, token in enumerate(row):
            if token in self.ends:
                return tuple(row[: at + 1])
        return tuple(row)


def save(directory: Path, variant: Variant | None = None, **changes: Any) -> Drawn:
    """Draws a checkpoint and saves it with its processor.

    Args:
        directory: Where.
        variant: Which; None for the default.
        **changes: Fields of the variant to replace.
    """
    chosen = replace(variant or Variant(), **changes)
    model, processor = draw_model(chosen), draw_processor(chosen)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Drawn(directory, chosen, model, processor)


def with_ends(variant: Variant) -> Variant:
    """The same checkpoint with end tokens that it does generate, in the middle of its captions."""
    drawn = Drawn(Path(), variant, draw_model(variant), draw_processor(variant))
    captions = [drawn.generate(image, None, max_new_tokens=12) for image in draw_pictures(6, variant.seed)]
    early = {token for caption in captions for token in caption[:3]}
    late = sorted({token for caption in captions for token in caption[3:]} - early)
    return replace(variant, eos=(BOS, *late[::2]))


def draw_pictures(count: int, seed: int = 0) -> list[PIL.Image.Image]:
    """Pictures of noise, each of another size."""
    rng = np.random.default_rng(seed)
    return [
        PIL.Image.fromarray(rng.integers(0, 256, (37 + 9 * index, 61 - 8 * index, 3), dtype=np.uint8))
        for index in range(count)
    ]


def rewrite_tensors(directory: Path, change: Any) -> None:
    """Applies ``change`` to the dict of a checkpoint's tensors and writes it back."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
