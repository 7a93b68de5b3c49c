"""The architecture of the miniature: a BLIP-2 with an OPT language model, small enough to ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint import read_json, save_checkpoint
from blip2edge.model.config import CaptionerConfig, QFormerConfig, VisionConfig
from blip2edge.model.opt import OPTConfig
from blip2edge.training.batches import PREPROCESSING
from blip2edge.training.config import ModelSizes, TrainingConfig
from blip2edge.training.scenes import PICTURE_SIZE
from blip2edge.training.vocabulary import END_ID, IMAGE, PAD_ID, make_tokenizer, tokenizer_config

EMBEDDING_STD = 0.02  # of token and position tables, as OPT and BERT
# Both stand beside values of size 1 (a normalised picture's patches, a LayerNorm's output), and learn at the
# speed of an Adam step whatever their size: started small, places and queries stay unheard for long.
PLACE_STD = 0.4
QUERY_STD = 1.0


def miniature_config(sizes: ModelSizes, tokenizer: Tokenizer) -> CaptionerConfig:
    """The architecture as `model/` describes it; no dropout, the data never repeats.

    Args:
        sizes: From the recipe.
        tokenizer: Gives the vocabulary's size and the id of `<image>`.

    Returns:
        A config of the BLIP-2 family.
    """
    vision, qformer, language = sizes.vision, sizes.qformer, sizes.language
    return CaptionerConfig(
        vision=VisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_layers,
            num_heads=vision.num_heads,
            image_size=PICTURE_SIZE,
            patch_size=sizes.patch_size,
        ),
        bridge=QFormerConfig(
            hidden_size=qformer.hidden_size,
            intermediate_size=qformer.intermediate_size,
            num_layers=qformer.num_layers,
            num_heads=qformer.num_heads,
            num_query_tokens=sizes.num_query_tokens,
            encoder_hidden_size=vision.hidden_size,
            dropout=0.0,
        ),
        language=OPTConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=language.hidden_size,
            ffn_dim=language.intermediate_size,
            num_layers=language.num_layers,
            num_heads=language.num_heads,
            max_positions=sizes.max_positions,
            dropout=0.0,
        ),
        bos_token_id=END_ID,
        eos_token_ids=(END_ID,),
        pad_token_id=PAD_ID,
        image_token_id=tokenizer.token_to_id(IMAGE),
    )


def initialise(model: CaptionerModel, seed: int) -> None:
    """Draws all weights.

    Matrices get N(0, 1/fan_in), tables and single tokens N(0, 0.02²), biases 0 and norms 1; the picture's
    places and the queries start larger, see `PLACE_STD`.

    Args:
        model: Changed in place.
        seed: Same seed, same weights.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif isinstance(module, (nn.Linear, nn.Conv2d)):
                    parameter.normal_(0.0, (parameter[0].numel()) ** -0.5, generator=draw)
                else:
                    parameter.normal_(0.0, EMBEDDING_STD, generator=draw)
        # The head is tied to the table, which must not keep a matrix's scale: drawn last.
        model.language.get_parameter("embed_tokens.weight").normal_(0.0, EMBEDDING_STD, generator=draw)
        model.vision.position_embedding.normal_(0.0, PLACE_STD, generator=draw)
        model.bridge.get_parameter("qformer.query_tokens").normal_(0.0, QUERY_STD, generator=draw)


def build_miniature(config: TrainingConfig) -> tuple[CaptionerModel, Tokenizer]:
    """A freshly drawn miniature and its tokenizer.

    Args:
        config: The recipe.

    Returns:
        The model in training mode, float32, and the tokenizer that its table was sized for.
    """
    tokenizer = make_tokenizer(config.data.prompts)
    model = CaptionerModel(miniature_config(config.model, tokenizer))
    initialise(model, config.seed)
    return model, tokenizer


def _image_processor() -> dict[str, Any]:
    """The preprocessing in transformers' words."""
    return {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": PREPROCESSING.resize,
        "size": dict(PREPROCESSING.size),
        "resample": PREPROCESSING.resample,
        "do_rescale": PREPROCESSING.do_rescale,
        "rescale_factor": PREPROCESSING.rescale_factor,
        "do_normalize": PREPROCESSING.do_normalize,
        "image_mean": list(PREPROCESSING.mean),
        "image_std": list(PREPROCESSING.std),
    }


def write_checkpoint(
    model: CaptionerModel, tokenizer: Tokenizer, directory: Path, dtype: torch.dtype
) -> None:
    """Writes all files of a `Blip2ForConditionalGeneration` directory.

    Args:
        model: The weights.
        tokenizer: The tokenizer.
        directory: Where to; it exists.
        dtype: How the tensors are stored.
    """
    save_checkpoint(model, directory, dtype=dtype)
    config = model.config
    processor = _image_processor() | {"processor_class": "Blip2Processor"}
    files = {
        "preprocessor_config.json": processor,
        "processor_config.json": {
            "processor_class": "Blip2Processor",
            "num_query_tokens": read_json(directory / "config.json")["num_query_tokens"],
        },
        "tokenizer_config.json": tokenizer_config(config.language.max_positions)
        | {"processor_class": "Blip2Processor"},
        "generation_config.json": {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_ids[0],
            "pad_token_id": config.pad_token_id,
            "max_new_tokens": 20,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
