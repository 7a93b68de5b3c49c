"""BLIP-2 with T5 and Flan-T5, compared with transformers.

An encoder reads picture and prompt; the decoder has a growing cache with relative positions; keys and values of the
encoder's states are computed once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    T5Config,
)

from blip2edge import Captioner
from blip2edge.bundle.bundle import Bundle
from blip2edge.errors import BundleError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.language.t5 import bucket_thresholds
from blip2edge.optimization.pipeline import optimize
from tests.drawing import BOS, IMAGE, PAD, VOCABULARY, Variant, draw_pictures, draw_processor, randomize

END = 3
PROMPTS = [None, "a photo of", "Question: what is two? Short answer:"]
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"num_beams": 3, "length_penalty": -1.0, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.5, "min_new_tokens": 5},
    {"forced_bos_token_id": 20, "no_repeat_ngram_size": 1, "min_length": 5, "num_beams": 2},
)
KINDS: tuple[dict[str, Any], ...] = (
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},  # Flan-T5
    {"feed_forward_proj": "relu", "tie_word_embeddings": True},  # T5 1.0, which scales its output
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 10, "num_layers": 3},
)


def draw(seed: int, directory: Path, **changes: Any) -> Blip2ForConditionalGeneration:
    variant = Variant(seed=seed)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
    ids = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "decoder_start_token_id": 0}
    relative = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    values: dict[str, Any] = {"vocab_size": VOCABULARY, **ids, **relative, **sizes, **changes}
    text = T5Config(**values).to_dict()
    vision = Blip2VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=variant.image_size,
        patch_size=variant.patch_size,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, vocab_size=50
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config={**text, "tie_word_embeddings": changes["tie_word_embeddings"]},
        num_query_tokens=variant.queries,
        image_token_index=IMAGE,
    )
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config).eval()
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shared" in name or "relative" in name:
                parameter.normal_(0, 0.7)
    model.save_pretrained(directory)
    draw_processor(variant).save_pretrained(directory)
    return model


def expected(model: Any, image: Any, prompt: str | None, **options: Any) -> tuple[int, ...]:
    processor = draw_processor(Variant())
    text = {} if prompt is None else {"text": prompt}
    inputs = processor(images=image, return_tensors="pt", **text)
    row = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)[0].tolist()
    return tuple(row[: row.index(END) + 1] if END in row else row)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(0, id="flan"),
        pytest.param(1, id="t5", marks=pytest.mark.slow),
        pytest.param(2, id="narrow heads", marks=pytest.mark.slow),
    ],
)
def test_the_same_ids_as_transformers(seed: int, tmp_path: Path) -> None:
    model = draw(seed, tmp_path / "checkpoint", **KINDS[seed])
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", verify="full" if seed else "sample")
    captioner = Captioner.load(tmp_path / "bundle", threads=1)
    images = draw_pictures(3, seed)
    seen = set()
    for options in OPTIONS:
        wanted = [expected(model, image, prompt, **options) for image, prompt in zip(images, PROMPTS, strict=True)]
        batch = captioner.caption_many(images, prompts=PROMPTS, batch_size=3, max_new_tokens=12, **options)
        assert [result.tokens for result in batch] == wanted
        alone = list(captioner.caption_many(images, prompts=PROMPTS, max_new_tokens=12, **options))
        assert [result.tokens for result in alone] == wanted
        assert [result.new_tokens for result in alone] == [len(ids) - 1 for ids in wanted]  # without the start token
        seen.update(wanted)
    assert len(seen) > 3  # captions vary
    optimize(tmp_path / "bundle")
    fast = Captioner.load(tmp_path / "bundle", threads=1)
    assert fast.graphs.copied
    for options in OPTIONS[:2]:
        again = fast.caption_many(images, prompts=PROMPTS, batch_size=3, max_new_tokens=12, **options)
        alone = list(captioner.caption_many(images, prompts=PROMPTS, max_new_tokens=12, **options))
        assert [result.tokens for result in again] == [result.tokens for result in alone]
    with pytest.raises(BundleError, match=r"which has cross-attention .*; there are no CUDA kernels for T5"):
        optimize(tmp_path / "bundle", "cuda-decoder")
    assert not (tmp_path / "bundle" / "optimized" / "cuda-decoder").exists()


def test_the_feed_forward_output_stays_fp32_in_fp16(tmp_path: Path) -> None:
    draw(0, tmp_path / "checkpoint", **KINDS[0])
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", precision="fp16")
    graphs = Bundle.open(tmp_path / "bundle").manifest.graphs
    for name in ("text_encoder", "decoder"):
        reasons = " ".join(graphs[name].fp32_exceptions)
        assert "T5 feed-forward output" in reasons
        assert "T5 residual" in reasons
    assert "T5 selection" in " ".join(graphs["decoder"].fp32_exceptions)
    assert Captioner.load(tmp_path / "bundle", threads=1).caption(draw_pictures(1, 0)[0], prompt="a").tokens


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (16, 128), (8, 20), (4, 5)])
def test_bucket_thresholds_are_transformers_formula(buckets: int, farthest: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(3 * farthest)
    theirs = T5Attention._relative_position_bucket(
        -distances, bidirectional=False, num_buckets=buckets, max_distance=farthest
    )
    ours = sum((distances >= threshold).long() for threshold in bucket_thresholds(buckets, farthest))
    assert torch.equal(torch.as_tensor(ours), theirs)
