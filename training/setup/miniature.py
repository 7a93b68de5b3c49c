"""Builds the miniature: a small BLIP-2 with an OPT language model, trained from scratch on generated scenes."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.checkpoint.generation import MAX_NEW_TOKENS
from blip2edge.model.config import CaptionerConfig, VisionConfig
from blip2edge.model.language.opt import OPTConfig
from blip2edge.model.layers import RMSNorm
from blip2edge.training.config import TrainingConfig
from blip2edge.training.data.scenes import PICTURE_SIZE
from blip2edge.training.loading.batches import PREPROCESSING
from blip2edge.training.loading.qformer_texts import QFormerTexts
from blip2edge.training.model_config import ModelConfig
from blip2edge.training.setup.architecture import captioner_config
from blip2edge.training.setup.model_parts import ModelParts
from blip2edge.training.setup.pretrained import PROCESSORS, json_file, processor_file
from blip2edge.training.setup.vocabulary import END_ID, IMAGE_TOKEN, PAD_ID, make_tokenizer, tokenizer_config

EMBEDDING_STD = 0.02  # of token and position tables, as in OPT and BERT
# Position embeddings and queries are added to values of size 1 (normalised patches, the output of a LayerNorm), and
# Adam changes small and large values at the same speed. If they start small, they have no effect for many steps.
POSITION_STD = 0.4
QUERY_STD = 1.0
# Drawn after all matrices: the language model's head shares the token table, which needs the small scale.
_SPECIAL_STD = {
    "language.embed_tokens.weight": EMBEDDING_STD,
    "vision.position_embedding": POSITION_STD,
    "query_tokens": QUERY_STD,
    "latents": QUERY_STD,
}


def _vision(sizes: ModelConfig) -> VisionConfig:
    return VisionConfig(**asdict(sizes.vision), image_size=PICTURE_SIZE, patch_size=sizes.patch_size)


def _language(sizes: ModelConfig, tokenizer: Tokenizer) -> OPTConfig:
    block = sizes.language
    return OPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=block.hidden_size,
        ffn_dim=block.intermediate_size,
        num_layers=block.num_layers,
        num_heads=block.num_heads,
        max_positions=sizes.max_positions,
        dropout=0.0,
    )


def initialise(model: nn.Module, seed: int) -> None:
    """Initialises all weights of a miniature, of its stage-1 model, or of a new bridge.

    Matrices are drawn from N(0, 1/fan_in), embedding tables and single tokens from N(0, 0.02²); biases and gates are 0,
    norms 1. Position embeddings of the picture, and queries, are drawn with a larger deviation, see `POSITION_STD`.

    Args:
        model: The model; changed in place.
        seed: The same seed gives the same weights.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
                continue
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias" or name.endswith("_gate"):
                    parameter.zero_()
                elif isinstance(module, (nn.Linear, nn.Conv2d)):
                    parameter.normal_(0.0, (parameter[0].numel()) ** -0.5, generator=draw)
                elif name != "temperature":
                    parameter.normal_(0.0, EMBEDDING_STD, generator=draw)
        for name, parameter in model.named_parameters():
            for end, std in _SPECIAL_STD.items():
                if name.endswith(end):
                    parameter.normal_(0.0, std, generator=draw)


def miniature_config(config: TrainingConfig, *, draft: bool = False, instructed: bool = False) -> CaptionerConfig:
    """Makes the config of a miniature, without its weights. The arguments are those of :func:`build_miniature`."""
    tokenizer = make_tokenizer(config.data.prompts)
    texts = QFormerTexts(tokenizer, config.stage1.max_tokens)
    sizes = config.model
    built = captioner_config(
        config.bridge,
        sizes,
        _vision(sizes),
        _language(sizes, tokenizer),
        text=texts.draft_config() if draft or instructed else None,
        instructed=instructed,
    )
    return replace(
        built,
        bos_token_id=END_ID,
        eos_token_ids=(END_ID,),
        pad_token_id=PAD_ID,
        image_token_id=tokenizer.token_to_id(IMAGE_TOKEN),
    )


def build_miniature(config: TrainingConfig, *, draft: bool = False, instructed: bool = False) -> ModelParts:
    """Builds a miniature with new weights.

    Args:
        config: The recipe.
        draft: Whether the Q-Former has its own text head.
        instructed: Whether the Q-Former reads the prompt.

    Returns:
        The model in float32 with its tokenizers and files. It has no dropout, because no training scene is used twice.
    """
    tokenizer = make_tokenizer(config.data.prompts)
    texts = QFormerTexts(tokenizer, config.stage1.max_tokens)
    model = CaptionerModel(miniature_config(config, draft=draft, instructed=instructed))
    initialise(model, config.seed)
    files = _files(model, tokenizer)
    if instructed:
        files["qformer_tokenizer/tokenizer.json"] = texts.tokenizer.to_str().encode()
    return ModelParts(model, PREPROCESSING, tokenizer, texts, files)


def _image_processor() -> dict[str, Any]:
    """Returns the preprocessing of the pictures as the content of `preprocessor_config.json` (transformers)."""
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


def _files(model: CaptionerModel, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns the content of the files, besides weights, with which transformers' processor loads the directory."""
    config = model.config
    named = {"processor_class": PROCESSORS[config.family]}
    files = {
        "preprocessor_config.json": _image_processor() | named,
        "tokenizer_config.json": tokenizer_config(config.language.max_positions) | named,
        "generation_config.json": {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_ids[0],
            "pad_token_id": config.pad_token_id,
            "max_new_tokens": MAX_NEW_TOKENS,
        },
    }
    content = {name: json_file(values) for name, values in files.items()}
    content["processor_config.json"] = processor_file(config)
    return content | {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
