"""Random tiny checkpoints of BLIP: captioning, VQA and retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from tests.drawing import randomize

VOCABULARY = 90
BOS, SEP, PAD = 88, 3, 0
WORDS = (
    "a",
    "photo",
    "of",
    "two",
    "cats",
    "red",
    "dog",
    "what",
    "is",
    "it",
    "where",
    "how",
    "many",
    "?",
    "the",
)
CLASSES = {
    "caption": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
    "retrieval": BlipForImageTextRetrieval,
}


def bert_tokenizer(size: int = BOS) -> PreTrainedTokenizerFast:
    """A tokenizer of words with BERT's frame; ids from ``size`` on have no token, as [DEC] and [ENC] of BLIP."""
    vocabulary = {"[PAD]": PAD, "[UNK]": 1, "[CLS]": 2, "[SEP]": SEP}
    for word in WORDS:
        vocabulary[word] = len(vocabulary)
    while len(vocabulary) < size:
        vocabulary[f"w{len(vocabulary)}"] = len(vocabulary)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )


def blip_config(**text: Any) -> BlipConfig:
    """A tiny configuration; the text width differs from the picture's where nothing forbids it."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "max_position_embeddings": 40,
        "bos_token_id": BOS,
        "sep_token_id": SEP,
        "pad_token_id": PAD,
        "eos_token_id": SEP,
        **text,
    }
    return BlipConfig(vision_config=vision, text_config=values, image_text_hidden_size=20)


def save_blip(directory: Path, kind: str, seed: int, **text: Any) -> tuple[Any, BlipProcessor]:
    """Draws a model of a kind, saves it with its processor, and gives both."""
    torch.manual_seed(seed)
    if kind == "vqa":
        text = {"hidden_size": 32, "num_attention_heads": 4, **text}
    model = CLASSES[kind](blip_config(**text)).eval()
    randomize(model)
    model.save_pretrained(directory)
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), bert_tokenizer())
    processor.save_pretrained(directory)
    return model, processor


def save_blip2(directory: Path, seed: int) -> tuple[Blip2ForImageTextRetrieval, Blip2Processor]:
    """Draws a BLIP-2 of the first stage, saves it with its processor, and gives both."""
    torch.manual_seed(seed)
    drawn: Any = blip_config().vision_config
    vision = drawn.to_dict() | {"model_type": "blip_2_vision_model"}
    qformer = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 40,
        "use_qformer_text_input": True,
        "pad_token_id": PAD,
    }
    config = Blip2Config(vision_config=vision, qformer_config=qformer, num_query_tokens=5, image_text_hidden_size=20)
    model = Blip2ForImageTextRetrieval(config).eval()
    randomize(model)
    model.save_pretrained(directory)
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), bert_tokenizer())
    processor.save_pretrained(directory)
    return model, processor


def save_clip(directory: Path, seed: int, eos: int = SEP) -> tuple[CLIPModel, CLIPProcessor]:
    """Draws a CLIP, saves it with its processor, and gives both; ``eos`` 2 is what older configs hold by mistake."""
    torch.manual_seed(seed)
    sizes = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config={"hidden_size": 32, "image_size": 32, "patch_size": 8, **sizes},
        text_config={
            "hidden_size": 24,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 20,
            "bos_token_id": 2,
            "eos_token_id": eos,
            **sizes,
        },
        projection_dim=20,
    )
    model = CLIPModel(config).eval()
    randomize(model)
    model.save_pretrained(directory)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(image_processor, bert_tokenizer())
    processor.save_pretrained(directory)
    return model, processor
