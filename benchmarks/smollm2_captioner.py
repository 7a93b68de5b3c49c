"""Writes a BLIP-2 checkpoint with a real language model, SmolLM2-135M, and a small random ViT and Q-Former.

    python benchmarks/smollm2.py --out SMOLLM2
    python benchmarks/smollm2_captioner.py SMOLLM2 --out CHECKPOINT
    blip2edge export CHECKPOINT -o BUNDLE

The visual tokens are noise; the decoder, its head and the token embedding table have trained weights. Weight-only
quantization and the speed of decoding are measured with this checkpoint: both depend only on the language model.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    LlamaForCausalLM,
)

from blip2edge.cli import run_script

IMAGE_TOKEN = "<image>"
QUERIES = 8
IMAGE_SIZE = 64


def captioner(language: Path, image_token_id: int, vocabulary: int) -> Blip2ForConditionalGeneration:
    """Builds the model: random vision encoder and Q-Former, and the trained language model.

    Args:
        language: Directory of a ``LlamaForCausalLM``.
        image_token_id: Id of the placeholder of a visual token.
        vocabulary: Number of tokens, the picture's token included.
    """
    llama = LlamaForCausalLM.from_pretrained(language)
    llama.resize_token_embeddings(vocabulary, mean_resizing=False)
    vision = Blip2VisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=8,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        encoder_hidden_size=128, vocab_size=32,
    )  # fmt: skip
    config: dict[str, Any] = {
        "vision_config": vision.to_dict(),
        "qformer_config": qformer.to_dict(),
        "text_config": llama.config.to_dict(),
        "num_query_tokens": QUERIES,
        "image_token_index": image_token_id,
        "tie_word_embeddings": llama.config.tie_word_embeddings,
    }
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(Blip2Config(**config))
    model.eval()
    model.language_model.load_state_dict(llama.state_dict())
    model.generation_config = llama.generation_config
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("language", type=Path, help="the directory that benchmarks/smollm2.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.language)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image = tokenizer.get_vocab()[IMAGE_TOKEN]
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    model = captioner(options.language, image, len(tokenizer))
    model.save_pretrained(options.out)
    Blip2Processor(BlipImageProcessorPil(size=size), tokenizer, num_query_tokens=QUERIES).save_pretrained(options.out)
    print(f"{options.out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    run_script(main)
