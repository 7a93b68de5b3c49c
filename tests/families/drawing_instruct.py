"""Random tiny checkpoints of InstructBLIP and InstructBlipVideo, with their two tokenizers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.drawing import randomize

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 120
SLOT = VOCAB - 1
BERT_VOCAB = 60
QUERIES = 5
FRAMES = 4
SIZE = 32
WORDS = ("a", "an", "short", "image", "video", "caption", "photo", "of", "two", "cats", "red", "dog", "what", "is",
         "it", "doing", "Question", "answer", "Short", ":", ".", "?")  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 10,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 1,
        "decoder_start_token_id": 0,
    },
    "llama": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 1,
    },
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 1,
    },
}


def tokenizer(kind: str, slot: str) -> PreTrainedTokenizerFast:
    """Words and w25, w26, …; T5's ends a text, the others begin it; ``slot`` is the last token."""
    vocab = {"<start>": 0, "<pad>": 1, "<s>": 2, "</s>": 3, "<unk>": 4}
    for word in WORDS:
        vocab[word] = len(vocab)
    while len(vocab) < SLOT:
        vocab[f"w{len(vocab)}"] = len(vocab)
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    single, special = ("$A </s>", ("</s>", 3)) if kind == "t5" else ("<s> $A", ("<s>", 2))
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": [slot, "<start>"]})
    assert fast.convert_tokens_to_ids(slot) == SLOT
    return fast


def qformer_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind: other ids than the language model's, [CLS] before and [SEP] behind, and a [DEC] that is unused."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    for word in sorted({word.lower() for word in WORDS}):
        vocab[word] = len(vocab)
    while len(vocab) < BERT_VOCAB - 1:
        vocab[f"##{len(vocab)}"] = len(vocab)
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.add_special_tokens({"bos_token": "[DEC]"})
    return fast


def draw_config(config_class: Any, kind: str, slot: str, qformer: dict[str, Any]) -> Any:
    """A tiny configuration around a language model of a kind."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
    }
    bert = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "vocab_size": BERT_VOCAB,
        "max_position_embeddings": 24,
        **qformer,
    }
    return config_class(
        vision_config=vision,
        qformer_config=bert,
        text_config=AutoConfig.for_model(kind, **TEXT[kind]).to_dict() | {"model_type": kind},
        num_query_tokens=QUERIES,
        tie_word_embeddings=False,
        **{f"{slot}_token_index": SLOT},
    )


def draw_instructblip(
    directory: Path, seed: int, kind: str, **qformer: Any
) -> tuple[InstructBlipForConditionalGeneration, InstructBlipProcessor]:
    """An InstructBLIP with a language model of a kind, saved; the model and its processor."""
    config = draw_config(InstructBlipConfig, kind, "image", qformer)
    torch.manual_seed(seed)
    model = InstructBlipForConditionalGeneration(config).eval()
    randomize(model)
    model.save_pretrained(directory)
    processor = InstructBlipProcessor(
        BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}),
        tokenizer(kind, "<image>"),
        qformer_tokenizer(),
        num_query_tokens=QUERIES,
    )
    processor.save_pretrained(directory)
    return model, processor


class VideoOracle:
    """What ``InstructBlipVideoProcessor`` does, without torchvision, which its video processor needs.

    Frames go through a picture processor, one by one; the text is the processor's own code, step by step.

    Args:
        directory: A checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        values = _read(directory / "processor_config.json")
        settings = values.get("video_processor")
        for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
            settings = _read(directory / name) or None if settings is None else settings
        if settings is None:
            raise OSError(f"{directory} has no settings of a video processor")
        if settings.get("video_processor_type", VIDEO_PROCESSOR) != VIDEO_PROCESSOR:
            raise ValueError(f"unrecognized video processor {settings['video_processor_type']!r}")
        if settings.get("do_sample_frames"):
            raise ValueError("sampling needs the metadata of a video")
        self.images = CLIPImageProcessorPil(**VIDEO_DEFAULTS | settings)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.qformer_tokenizer: Any = AutoTokenizer.from_pretrained(directory, subfolder="qformer_tokenizer")
        self.queries = values.get("num_query_tokens")
        self.video_token: Any = getattr(self.tokenizer, "video_token", "<video>")
        if not hasattr(self.tokenizer, "video_token"):
            token = AddedToken(self.video_token, normalized=False, special=True)
            self.tokenizer.add_tokens([token], special_tokens=True)

    def __call__(self, images: list[Any], text: str, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        qformer = self.qformer_tokenizer(text, return_token_type_ids=False)
        slots = self.tokenizer(self.video_token * self.queries * FRAMES, add_special_tokens=False)
        language = self.tokenizer(text, return_token_type_ids=False)
        pixels = torch.stack([self.images(frame, return_tensors=return_tensors)["pixel_values"][0] for frame in images])
        return {
            "pixel_values": pixels[None],
            "qformer_input_ids": torch.tensor([qformer["input_ids"]]),
            "qformer_attention_mask": torch.tensor([qformer["attention_mask"]]),
            "input_ids": torch.tensor([slots["input_ids"] + language["input_ids"]]),
            "attention_mask": torch.tensor([slots["attention_mask"] + language["attention_mask"]]),
        }


VIDEO_PROCESSOR = "InstructBlipVideoVideoProcessor"
VIDEO_DEFAULTS = {"size": {"height": 384, "width": 384}, "default_to_square": True, "do_center_crop": None}
"""What the video processor's defaults change in those of :class:`CLIPImageProcessorPil`."""


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def save_video_processor(directory: Path, kind: str) -> None:
    """The files that ``InstructBlipVideoProcessor`` writes."""
    tokenizer(kind, "<video>").save_pretrained(directory)
    qformer_tokenizer().save_pretrained(directory / "qformer_tokenizer")
    video = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}).to_dict()
    video.pop("image_processor_type", None)
    values = {
        "processor_class": "InstructBlipVideoProcessor",
        "num_query_tokens": QUERIES,
        "video_processor": video | {"video_processor_type": VIDEO_PROCESSOR},
    }
    (directory / "processor_config.json").write_text(json.dumps(values))


def draw_instructblipvideo(
    directory: Path, seed: int, kind: str, **qformer: Any
) -> tuple[InstructBlipVideoForConditionalGeneration, VideoOracle]:
    """An InstructBlipVideo with a language model of a kind, saved; the model and its processor."""
    config = draw_config(InstructBlipVideoConfig, kind, "video", qformer)
    torch.manual_seed(seed)
    model = InstructBlipVideoForConditionalGeneration(config).eval()
    randomize(model)
    model.save_pretrained(directory)
    save_video_processor(directory, kind)
    return model, VideoOracle(directory)
