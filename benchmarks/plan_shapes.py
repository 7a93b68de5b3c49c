"""Configurations of small models for ``plan_check.py``.

The constants of ``plan`` were chosen on some of these models; three models were not used for that choice.
"""

from __future__ import annotations

from typing import Any

SMALL_LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 31999,
    "vision_feature_layer": -2,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
}
"""A small LLaVA: ViT-B/16, and a Llama of twelve layers with width 1024."""

T5: dict[str, Any] = {
    "model_type": "blip-2",
    "architectures": ["Blip2ForConditionalGeneration"],
    "num_query_tokens": 24,
    "image_token_index": 32100,
    "vision_config": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 9,
        "num_attention_heads": 6,
        "image_size": 224,
        "patch_size": 14,
        "qkv_bias": True,
    },
    "qformer_config": {
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "cross_attention_frequency": 2,
        "encoder_hidden_size": 384,
    },
    "text_config": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 512,
        "d_ff": 1024,
        "d_kv": 64,
        "num_layers": 8,
        "num_decoder_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
}
"""BLIP-2 with the sizes of Flan-T5-small: an encoder, and a decoder that cross-attends to its states."""

IDEFICS: dict[str, Any] = {
    "model_type": "idefics",
    "architectures": ["IdeficsForVisionText2Text"],
    "vocab_size": 24000,
    "additional_vocab_size": 2,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "cross_layer_interval": 2,
    "qk_layer_norms": True,
    "use_resampler": True,
    "alpha_type": "float",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "vision_config": {
        "model_type": "idefics_vision",
        "embed_dim": 512,
        "image_size": 192,
        "intermediate_size": 2048,
        "patch_size": 16,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
    },
    "perceiver_config": {
        "model_type": "idefics_perciever",
        "use_resampler": True,
        "resampler_n_latents": 48,
        "resampler_depth": 3,
        "resampler_n_heads": 8,
        "resampler_head_dim": 64,
        "qk_layer_norms_perceiver": True,
    },
}
"""Flamingo: a perceiver, and gated cross-attention in every second layer."""

LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 39999,
    "vision_feature_layer": -2,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 576,
        "intermediate_size": 2304,
        "num_hidden_layers": 10,
        "num_attention_heads": 9,
        "image_size": 256,
        "patch_size": 16,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 40000,
        "hidden_size": 896,
        "intermediate_size": 2432,
        "num_hidden_layers": 14,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
}
"""LLaVA with 256 visual tokens, and a Llama with two key heads that all query heads share."""

SHAPES = {"small-llava": SMALL_LLAVA, "check-t5": T5, "check-idefics": IDEFICS, "check-llava": LLAVA}
FITTED = ("miniature", "blip-image-captioning-base", "small-llava")
"""The models with which the constants of ``plan`` were fitted, in fp32."""

INDEPENDENT = ("check-t5", "check-idefics", "check-llava")
"""Models that were not used to fit the constants of ``plan``; they have other families, widths, depths and numbers of
heads."""
