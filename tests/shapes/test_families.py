"""Shapes from a config: parameters equal those of transformers' classes and of this project's modules."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("torch", reason="the parameters are compared with real modules")
pytest.importorskip("transformers", reason="the parameters are compared with transformers' classes")

import torch
import transformers

from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.model.families.registry import read_config
from blip2edge.model.models import build_model
from blip2edge.model.vision.registry import VISION_ENCODERS
from blip2edge.shapes.encoders import READERS
from blip2edge.shapes.families import CONFIGS, PUBLISHED, published_config, shape_of
from blip2edge.shapes.languages import LANGUAGES
from blip2edge.shapes.sources import find_shape

NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
MATCHING = ("blip-itm-base-coco", "blip2-itm-vit-g", "clip-vit-base-patch32")
CAPTIONING = [name for name in NAMES if name not in MATCHING]
SEPARATE_HEADS = {"blip2-flan-t5-xl": 32128 * 2048, "instructblip-flan-t5-xl": 32128 * 2048}
"""Flan-T5's published files hold a head of their own; transformers ties it in the constructor."""


def values_of(name: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / f"{name}.json").read_text()))


def distinct(module: Any) -> int:
    return 0 if module is None else sum(one.numel() for one in {id(one): one for one in module.parameters()}.values())


def module_counts(values: dict[str, Any]) -> dict[str, int]:
    with torch.device("meta"):
        model: Any = build_model(read_config(values))
    parts = {"vision": model.vision, "bridge": model.bridge, "language": model.language, "total": model}
    return {name: distinct(part) for name, part in parts.items()}


@pytest.mark.parametrize("name", [name for name in CAPTIONING if name != "attention-pool-opt-2.7b"])
def test_parameters_are_those_of_transformers(name: str) -> None:
    values = values_of(name)
    shape = shape_of(values)
    kind = values["architectures"][0]
    if kind.startswith("MiniGPT4"):  # BLIP-2's modules around another language model
        kind, values = "Blip2ForConditionalGeneration", {**values, "model_type": "blip-2"}
    model_class: Any = getattr(transformers, kind)
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(values))
    found = shape.parameters()["total"] + shape.unused
    assert found == distinct(model) + SEPARATE_HEADS.get(name, 0)


@pytest.mark.parametrize("name", CAPTIONING)
def test_parts_are_those_of_the_modules(name: str) -> None:
    own, extra = module_counts(values_of(name)), SEPARATE_HEADS.get(name, 0)
    own = {**own, "language": own["language"] + extra, "total": own["total"] + extra}
    assert shape_of(values_of(name)).parameters() == own


@pytest.mark.parametrize("kind", LANGUAGES)
@pytest.mark.parametrize("family", ["blip-2", "blip2edge"])
def test_defaults_of_empty_sections(family: str, kind: str) -> None:
    values = {"model_type": family, "text_config": {"model_type": kind}, "bridge_config": {"kind": "perceiver"}}
    assert shape_of(values).parameters() == module_counts(values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model_type": "blip-2"}, {"word_embed_proj_dim": 512, "hidden_size": 768, "do_layer_norm_before": False}),
        ({"model_type": "blip-2"}, {"layer_norm_elementwise_affine": False, "enable_bias": False}),
        ({"model_type": "llava"}, {"model_type": "llama", "attention_bias": True, "mlp_bias": True}),
        ({"model_type": "llava"}, {"model_type": "qwen3", "num_key_value_heads": 4, "tie_word_embeddings": True}),
        ({"model_type": "llava", "multimodal_projector_bias": False, "vision_feature_layer": 3}, {}),
        ({"model_type": "blip2edge", "bridge_config": {"kind": "pool", "num_query_tokens": 7}}, {"model_type": "opt"}),
        ({"model_type": "blip2edge", "bridge_config": {"kind": "mlp"}}, {"model_type": "mistral"}),
        ({"model_type": "idefics"}, {}),
        ({"model_type": "idefics", "use_resampler": True, "alpha_type": "vector", "cross_layer_interval": 8}, {}),
        ({"model_type": "blip", "text_config": {}}, {}),
        ({"model_type": "instructblip", "num_query_tokens": 5}, {"model_type": "t5", "feed_forward_proj": "relu"}),
    ],
)
def test_variants(values: dict[str, Any], text: dict[str, Any]) -> None:
    values = {**values, "text_config": text} if text else values
    assert shape_of(values).parameters() == module_counts(values)


ENCODERS: tuple[dict[str, Any], ...] = (
    {"model_type": "blip_2_vision_model", "num_hidden_layers": 3},
    {"model_type": "clip_vision_model"},
    {"model_type": "efficientnet_lite"},
    {"model_type": "efficientnet_lite", "width_coefficient": 1.2, "depth_coefficient": 1.4, "image_size": 260},
    {"model_type": "siglip_vision_model"},
    {"model_type": "siglip_vision_model", "vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    {"model_type": "dinov2", "image_size": 518},
    {"model_type": "dinov2", "use_swiglu_ffn": True, "hidden_size": 1536, "num_attention_heads": 24, "qkv_bias": False},
    {"model_type": "dinov2_with_registers", "vision_feature_select_strategy": "default"},
    {"model_type": "dinov3_vit", "num_register_tokens": 4, "vision_feature_layer": 3},
    {"model_type": "dinov3_vit", "use_gated_mlp": True, "key_bias": True, "proj_bias": False},
)


@pytest.mark.parametrize("vision", ENCODERS, ids=lambda values: values["model_type"])
@pytest.mark.parametrize("kind", ["pool", "qformer"])
def test_other_encoders(kind: str, vision: dict[str, Any]) -> None:
    bridge = {"kind": kind, "num_query_tokens": 7}
    values = {"model_type": "blip2edge", "vision_config": vision, "bridge_config": bridge, "text_config": {}}
    shape = shape_of(values)
    assert shape.parameters() == module_counts(values)
    assert shape.embeds == read_config(values).vision.num_embeds


def test_the_encoders_are_those_of_the_modules() -> None:
    assert set(READERS) == set(VISION_ENCODERS)


def test_an_efficientnet_lite() -> None:
    """Lite0 has about 0.4 billion multiplications, each with an addition, and 49 cells."""
    values = {"model_type": "blip2edge", "vision_config": {"model_type": "efficientnet_lite"}}
    shape = shape_of({**values, "bridge_config": {"kind": "pool"}, "text_config": {}})
    tokens = shape.tokens(1, 0)
    assert (tokens["grid"], tokens["patches"], tokens["embeds"]) == (49, 49, 49)
    operations = sum(each.operations(tokens) for each in shape.parts[0].matrices)
    assert 0.7e9 < operations < 0.9e9


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_a_llava_with_a_siglip(strategy: str) -> None:
    vision = {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": 56, "vision_use_head": False}
    values: dict[str, Any] = {"model_type": "llava", "vision_config": vision}
    values |= {
        "vision_feature_select_strategy": strategy,
        "vision_feature_layer": -3,
        "text_config": {"model_type": "qwen2", "num_hidden_layers": 2},
    }
    shape, config = shape_of(values), read_config(values)
    assert shape.parameters() == module_counts(values)
    assert shape.slots == config.vision.num_embeds == 16 - (strategy == "default")
    model_class: Any = transformers.LlavaForConditionalGeneration
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(values))
    assert shape.parameters()["total"] + shape.unused == distinct(model)


def test_the_qformer_with_and_without_its_text_side() -> None:
    """BLIP-2 with OPT-2.7b.

    Self-attention 4 x (768 x 768 + 768) and feed-forward 2 x 768 x 3,072 + 3,840, each with a norm of 1,536, in 12
    layers; cross-attention to 1,408 channels in 6 layers; queries, first norm, projection to 2,560 channels.
    """
    shape = shape_of(values_of("blip2-opt-2.7b"))
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3840 + 2 * 1536
    cross = 2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + 1536
    bridge = 12 * layer + 6 * cross + 32 * 768 + 1536 + 768 * 2560 + 2560
    assert shape.parameters()["bridge"] == bridge == 107_130_880
    text = 12 * (2 * 768 * 3072 + 3840 + 1536) + (30523 + 512) * 768  # a feed-forward a layer, words and positions
    assert shape.text_side == text == 80_522_496
    assert round((bridge + text) / 1e6) == 188


def test_the_text_side_is_that_of_a_stage_1_checkpoint() -> None:
    values = values_of("blip2-itm-vit-g")
    model_class: Any = transformers.Blip2ForImageTextRetrieval
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(values))
    qformer = distinct(model.qformer) + distinct(model.embeddings)
    deployed = shape_of(values_of("blip2-opt-2.7b"))
    projection, queries = 768 * 2560 + 2560, 32 * 768
    assert qformer == deployed.parameters()["bridge"] - projection - queries + deployed.text_side


def test_tokens_of_a_film() -> None:
    blip2, llava = shape_of(values_of("blip2-opt-2.7b")), shape_of(values_of("llava-1.5-7b"))
    assert 60 * blip2.visual_tokens == 1920
    assert 60 * llava.visual_tokens == 60 * (336 // 14) ** 2 == 34_560


@pytest.mark.parametrize("name", MATCHING)
def test_matching_models_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="matching model"):
        shape_of(values_of(name))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "whisper"}, "model_type is 'whisper', which is not supported; supported: blip-2"),
        ({"model_type": "blip-2", "text_config": {"model_type": "bloom"}}, "of type 'bloom'"),
        ({"model_type": "blip-2", "vision_config": []}, "vision_config must be an object, not list"),
        (
            {"model_type": "blip-2", "num_query_tokens": 0},
            "json: num_query_tokens must be a positive integer up to 2147483647, not 0",
        ),
        ({"model_type": "blip-2", "vision_config": {"patch_size": "x"}}, "vision_config.patch_size"),
        ({"model_type": "llava", "vision_feature_layer": 99}, "vision_feature_layer must be from 1 to 24"),
        (
            {"model_type": "blip2edge", "vision_config": {"model_type": "convnext"}, "bridge_config": {"kind": "mlp"}},
            "vision encoder is of type 'convnext', which is not supported; supported: blip_2_vision_model, clip",
        ),
        (
            {"model_type": "llava", "vision_config": {"model_type": "dinov2"}},
            "is of type 'dinov2', which is not supported; supported: clip_vision_model, siglip_vision_model",
        ),
        (
            {"model_type": "blip2edge", "vision_config": {"model_type": "efficientnet_lite", "width_coefficient": 0}},
            "width_coefficient and depth_coefficient must be above 0 and at most 10, not 0 and 1.0",
        ),
        ({"model_type": "blip2edge", "bridge_config": {"kind": "lstm"}}, "kind 'lstm', expected one of pool"),
        ([], "config.json: the content must be an object"),
    ],
)
def test_a_wrong_config(values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shape_of(values)


def test_published_names() -> None:
    for hub, file in PUBLISHED.items():
        assert published_config(hub) == published_config(hub.upper()) == published_config(file) is not None
    assert published_config("nobody/nothing") is None
    assert published_config("../published/llava-1.5-7b") is None
    shape, origin = find_shape("Salesforce/blip2-opt-2.7b")
    assert (shape.family, origin) == ("blip-2", "from the list of published models")
    with pytest.raises(
        CheckpointError, match=r"is no bundle, checkpoint directory or config\.json.*did you mean Salesforce"
    ):
        find_shape("Salesforce/blip2-opt-2.7")
