"""Computes the sizes of a model from its ``config.json`` or from the name of a published model, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.shapes.encoders import CLIP, SIGLIP, SIGLIP_MODEL, encoder_shape
from blip2edge.shapes.features import LAYER, PATCHES, STRATEGY, feature_blocks, is_full
from blip2edge.shapes.languages import LanguageShape, bert, bridged_shape, flamingo
from blip2edge.shapes.model_shape import ModelPart, ModelShape
from blip2edge.shapes.parts import (
    BLIP_VISION,
    CLIP_VISION,
    EVA,
    IDEFICS_VISION,
    LLAVA_VISION,
    PERCEIVER,
    POOL,
    ROOT,
    Sizes,
    mlp,
    perceiver,
    pool,
    qformer,
    text_side,
    vit,
)

CONFIGS = Path(__file__).parent / "published"
PUBLISHED: Mapping[str, str] = {
    "Salesforce/blip-image-captioning-base": "blip-image-captioning-base",
    "Salesforce/blip-image-captioning-large": "blip-image-captioning-large",
    "Salesforce/blip-vqa-base": "blip-vqa-base",
    "Salesforce/blip2-opt-2.7b": "blip2-opt-2.7b",
    "Salesforce/blip2-opt-6.7b": "blip2-opt-6.7b",
    "Salesforce/blip2-flan-t5-xl": "blip2-flan-t5-xl",
    "Salesforce/instructblip-flan-t5-xl": "instructblip-flan-t5-xl",
    "Salesforce/instructblip-vicuna-7b": "instructblip-vicuna-7b",
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "HuggingFaceM4/idefics-9b": "idefics-9b",
    "Vision-CAIR/MiniGPT-4": "minigpt4-vicuna-7b",
}
"""Published captioning models: name of the configuration file in ``published``, by the model's name on the hub."""

WITHOUT_CHECKPOINT = ("Vision-CAIR/MiniGPT-4",)  # its hub repository holds a LAVIS .pth: export it with --base

VIDEO_FRAMES = 4  # frames of an InstructBlipVideo's item


def published_config(name: str) -> dict[str, Any] | None:
    """Returns the ``config.json`` of a published model, from this package's files; None for an unknown name.

    Args:
        name: Name on the hub, in any case, or the name of a file in ``published``.
    """
    names = {hub.lower(): file for hub, file in PUBLISHED.items()}
    path = CONFIGS / f"{names.get(name.lower(), name)}.json"
    if "/" in path.stem or not path.is_file() or path.parent != CONFIGS:
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")))


def checkpoint_name(name: str) -> str | None:
    """Returns the hub name of the checkpoint to export; None if the published configuration has no checkpoint.

    Args:
        name: Name on the hub, or the name of a file in ``published``, as for :func:`published_config`.
    """
    of = {hub.lower(): hub for hub in PUBLISHED} | {file: hub for hub, file in PUBLISHED.items()}
    known = of.get(name.lower()) or of.get(name) or (name if "/" in name else None)
    return None if known in WITHOUT_CHECKPOINT else known


def unknown_model(name: str) -> CheckpointError:
    """Makes the error for a name that is neither a directory, a file, nor a published model."""
    known = [*PUBLISHED, *PUBLISHED.values()]
    similar = get_close_matches(name, known, n=1, cutoff=0.5)
    return CheckpointError(
        f"{name} is no bundle, checkpoint directory or config.json, and no published model of this list: "
        f"{', '.join(PUBLISHED)}",
        f"did you mean {similar[0]}?" if similar else "give the path of its config.json",
    )


def _model(family: str, f: Sizes, vision: ModelPart, connector: ModelPart | None, language: LanguageShape,
           defaults: Mapping[str, int], **rest: Any) -> ModelShape:  # fmt: skip
    sizes = Sizes("vision_config", f.values.get("vision_config"), defaults)
    given: dict[str, Any] = {"keep_class": True, "queries": 0, "slots": 0, **rest}
    return ModelShape(
        family=family,
        parts=(vision, *([] if connector is None else [connector]), *language.parts),
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        max_positions=language.max_positions,
        table=language.table,
        tied=language.tied,
        cache=language.cache,
        width=language.width,
        **given,
    )


def _blip2(f: Sizes, family: str, *, instructed: bool = False, frames: int = 1) -> ModelShape:
    vision = vit(f.values.get("vision_config"), EVA)
    language = bridged_shape(f.values.get("text_config"), "opt")
    section, queries = f.values.get("qformer_config"), f.get("num_query_tokens", 32)
    bridge = qformer(section, _width(f, EVA), queries, language.width, instructed=instructed)
    kind = "instructed-qformer" if instructed else "qformer"
    return _model(family, f, vision, bridge, language, EVA, bridge=kind, queries=queries, slots=queries,
                  frames=f.get("num_frames", frames) if frames > 1 else 1,
                  source="encoder" if language.cache.cross else "",
                  text_side=0 if instructed else text_side(section))  # fmt: skip


def _blip(f: Sizes, family: str, *, reads_question: bool = False) -> ModelShape:
    width = _width(f, BLIP_VISION)
    text = Sizes("text_config", f.values.get("text_config"), {})
    tied = f.flag("tie_word_embeddings", True) or text.flag("tie_word_embeddings", True)
    language = bert({**text.values, "tie_word_embeddings": tied}, width, reads_question=reads_question)
    return _model(family, f, vit(f.values.get("vision_config"), BLIP_VISION), None, language, BLIP_VISION,
                  bridge="none", source="encoder" if reads_question else "embeds")  # fmt: skip


def _llava(f: Sizes, family: str) -> ModelShape:
    section = f.values.get("vision_config")
    defaults = LLAVA_VISION if not section else CLIP_VISION
    given = Sizes("vision_config", section, {}).values
    found = encoder_shape(given, (CLIP, SIGLIP_MODEL)) if given else None
    siglip = found if given.get("model_type") == SIGLIP_MODEL else None
    whole = vit(section, defaults, clip=True) if siglip is None else siglip.part
    layers = feature_blocks(f.values.get(LAYER, -2), whole.attentions[0].count)
    keep = is_full(f.values.get(STRATEGY, PATCHES))
    if siglip is None:
        tower = vit({**(section or {}), "num_hidden_layers": layers}, defaults, clip=True, post_norm=False)
    else:
        tower, defaults = encoder_shape({**given, LAYER: layers}).part, SIGLIP
    text = Sizes("text_config", f.values.get("text_config"), {})
    tied = f.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False)
    language = bridged_shape(text.values, "llama", tied)
    bridge = mlp(_width(f, defaults), language.width, bias=f.flag("multimodal_projector_bias", True))
    shape = _model(family, f, tower, bridge, language, defaults, bridge="mlp", keep_class=keep,
                   unused=whole.parameters - tower.parameters)  # fmt: skip
    shape = shape if siglip is None else replace(shape, prefix=siglip.prefix)
    return replace(shape, slots=shape.embeds, source="encoder" if language.cache.cross else "")


def _idefics(f: Sizes, family: str) -> ModelShape:
    section = Sizes("vision_config", f.values.get("vision_config"), {})
    own = dict(section.values)
    width = section.get("embed_dim", section.get("hidden_size", IDEFICS_VISION["hidden_size"]))
    vision = vit({**own, "hidden_size": width}, IDEFICS_VISION, clip=True, post_norm=False)
    language = flamingo(f.values, width)
    if not f.flag("use_resampler", False):
        return _model(family, f, vision, None, language, IDEFICS_VISION, bridge="none", source="embeds",
                      unused=2 * width)  # fmt: skip
    latents = Sizes("perceiver_config", f.values.get("perceiver_config"), PERCEIVER)["resampler_n_latents"]
    bridge = perceiver(f.values.get("perceiver_config"), width)
    return _model(family, f, vision, bridge, language, IDEFICS_VISION, bridge="perceiver", queries=latents,
                  source="queries", unused=2 * width)  # fmt: skip


def _native(f: Sizes, family: str) -> ModelShape:
    encoder = encoder_shape(Sizes("vision_config", f.values.get("vision_config"), {}).values)
    vision, width = encoder.part, encoder.width
    section = Sizes("bridge_config", f.values.get("bridge_config"), {})
    text = Sizes("text_config", f.values.get("text_config"), {})
    language = bridged_shape(text.values, "opt")
    output, kind = language.table[1], section.values.get("kind")
    queries = 0
    if kind == "mlp":
        bridge = mlp(width, output, bias=section.flag("multimodal_projector_bias", True))
    elif kind == "perceiver":
        bridge = perceiver(section.values, width, output)
        queries = section.get("resampler_n_latents", PERCEIVER["resampler_n_latents"])
    elif kind == "qformer":
        queries = section.get("num_query_tokens", 32)
        bridge = qformer(section.values, width, queries, language.width)
    elif kind == "pool":
        bridge = pool(section.values, width, output)
        queries = section.get("num_query_tokens", POOL["num_query_tokens"])
    else:
        raise UnsupportedModelError(f"the bridge is of kind {kind!r}, expected one of pool, mlp, perceiver, qformer")
    sizes = {"image_size": encoder.image_size, "patch_size": encoder.patch_size}
    shape = _model(family, f, vision, bridge, language, sizes, bridge=kind, queries=queries,
                   source="encoder" if language.cache.cross else "", cells=encoder.cells,
                   prefix=encoder.prefix, keep_class=encoder.keep_prefix)  # fmt: skip
    return replace(shape, slots=shape.visual_tokens)


def _width(f: Sizes, defaults: Mapping[str, int]) -> int:
    return Sizes("vision_config", f.values.get("vision_config"), defaults)["hidden_size"]


READERS: Mapping[str, Callable[[Sizes, str], ModelShape]] = {
    "blip-2": _blip2,
    "minigpt4": _blip2,
    "instructblip": lambda f, name: _blip2(f, name, instructed=True),
    "instructblipvideo": lambda f, name: _blip2(f, name, instructed=True, frames=VIDEO_FRAMES),
    "blip": _blip,
    "blip-vqa": lambda f, name: _blip(f, name, reads_question=True),
    "llava": _llava,
    "idefics": _idefics,
    "blip2edge": _native,
}
"""Function that reads the sizes of a model from its ``config.json``, by family."""

MATCHING = ("BlipForImageTextRetrieval", "Blip2ForImageTextRetrieval", "CLIPModel")


def shape_of(config: Any) -> ModelShape:
    """Computes the sizes of a captioning model from the content of its ``config.json``.

    Raises:
        UnsupportedModelError: The model is of another type, or a matching model.
        CheckpointError: A key is missing or has a wrong value.
    """
    f = Sizes(ROOT, config, {})
    kind, classes = f.values.get("model_type"), f.values.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"config.json: architectures must be a list of class names, not {classes!r}")
    if kind == "clip" or any(name in MATCHING for name in classes):
        raise UnsupportedModelError(
            f"this is a matching model ({', '.join(classes) or kind}), and `plan` supports captioning models only",
            "measure it on this machine: blip2edge bench BUNDLE",
        )
    family = "blip-vqa" if "BlipForQuestionAnswering" in classes else kind
    if not isinstance(family, str) or family not in READERS:
        raise UnsupportedModelError(
            f"the checkpoint's model_type is {kind!r}, which is not supported", f"supported: {', '.join(READERS)}"
        )
    return READERS[family](f, family)
