"""The table of checkpoint families. Everything that is specific to a family is in its row."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.model.bridges.instruct import InstructedQFormerConfig
from blip2edge.model.bridges.text_head import DRAFT_PREFIX, TEXT_HEAD_RULES
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.config_json import Fields
from blip2edge.model.families.blip import read_blip, write_blip
from blip2edge.model.families.blip2 import VIDEO_FRAMES, read_blip2, write_blip2
from blip2edge.model.families.idefics import IDEFICS_LEFT_OUT, IDEFICS_RULES, read_idefics, write_idefics
from blip2edge.model.families.llava import LLAVA_LEFT_OUT, LLAVA_RENAMED, read_llava, write_llava
from blip2edge.model.families.native import NATIVE_RULES, read_native, write_native
from blip2edge.model.families.retrieval import (
    read_blip2_itm,
    read_blip_itm,
    read_clip,
    write_blip2_itm,
    write_blip_itm,
    write_clip,
)
from blip2edge.model.language.registry import bridged_languages, language_of
from blip2edge.model.models import Config
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.model.vision.registry import vision_encoder
from blip2edge.model.weights.blip import BLIP2_ITM, BLIP_ITM, BLIP_VISION, CLIP
from blip2edge.model.weights.blip2 import BLIP2, INSTRUCTBLIP, LLAVA
from blip2edge.model.weights.rules import Rule, WeightMap, under
from blip2edge.model.weights.ties import Tie

VQA_QUESTION = "Question: {question} Short answer:"
"""BLIP-2's prompt for visual questions (LAVIS, configuration of its VQA task)."""

ELASTIC = "elastic_queries"
"""Key of ``config.json`` for ``CaptionerConfig.elastic``. transformers ignores this key and uses all queries."""


@dataclass(frozen=True)
class Family:
    """One row of the table of families: how the family's checkpoints are read, and how its models are prompted.

    Attributes:
        title: Name of the family in tables.
        read: Function that makes the config from a ``config.json``.
        write: Function that makes the ``config.json`` from a config.
        rules: Names of the checkpoint's tensors for the parameters of vision encoder and bridge (see also
            `vision_prefix`).
        vision_prefix: Prefix of the vision encoder's tensors, if the family works with every encoder of
            ``vision/registry.py``; empty if `rules` name these tensors.
        language_prefix: Prefix of the language model's tensors in a checkpoint.
        template: Template of a text, with the placeholders ``{image}`` and ``{prompt}``.
        default_prompt: Prompt of ``caption`` if none is given; None for no prompt.
        question: Template of the prompt of ``ask``, with the placeholder ``{question}``; empty if the models do not
            answer questions.
        framed: Whether the tokenizer adds its special tokens to a prompt; otherwise only BOS is put before the prompt.
        prompt_required: Whether captions need a prompt.
        model_type: ``model_type`` in ``config.json``; empty if it equals the family's key in :data:`FAMILIES`.
        architectures: Classes of transformers that belong to this family; empty for all of the ``model_type``.
        image_token: The tokenizer's token for a picture in a text; empty if there is no such token.
        around_image: The token before and after ``image_token``, for families whose decoder cross-attends to the
            pictures of a text; empty for other families.
        generation: Whether the end tokens come from ``generation_config.json``, not the language model's config.
        stop: Texts that end a caption, for language models trained to write them instead of an end token.
        left_out: Tensors of a checkpoint that are not used (regular expressions).
        renamed: Tensor names of other versions of transformers, each with its replacement, as in ``re.sub``; applied in
            order, each at the start of a name.
    """

    title: str
    read: Callable[[Fields], Config]
    write: Callable[[Any], dict[str, Any]]
    rules: tuple[Rule, ...]
    vision_prefix: str = ""
    language_prefix: str = "language_model."
    template: str = "{image}{prompt}"
    default_prompt: str | None = None
    question: str = VQA_QUESTION
    framed: bool = True
    prompt_required: bool = False
    model_type: str = ""
    architectures: tuple[str, ...] = ()
    image_token: str = ""
    around_image: str = ""
    generation: bool = False
    stop: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()


FAMILIES: dict[str, Family] = {
    "blip-2": Family(
        title="BLIP-2",
        read=read_blip2,
        write=write_blip2,
        rules=BLIP2,
        architectures=("Blip2ForConditionalGeneration",),
    ),
    "blip": Family(
        title="BLIP captioning",
        read=read_blip,
        write=write_blip,
        rules=BLIP_VISION,
        language_prefix="",
        template="{prompt}",
        question="",
        framed=False,
        architectures=("BlipForConditionalGeneration",),
    ),
    "blip-vqa": Family(
        title="BLIP VQA",
        read=partial(read_blip, family="blip-vqa", reads_question=True),
        write=partial(write_blip, architecture="BlipForQuestionAnswering"),
        rules=BLIP_VISION,
        language_prefix="",
        template="{prompt}",
        question="{question}",
        prompt_required=True,
        model_type="blip",
        architectures=("BlipForQuestionAnswering",),
    ),
    "blip-itm": Family(
        title="BLIP ITM and ITC",
        read=read_blip_itm,
        write=write_blip_itm,
        rules=BLIP_ITM,
        model_type="blip",
        architectures=("BlipForImageTextRetrieval",),
    ),
    "blip-2-itm": Family(
        title="BLIP-2 ITM and ITC",
        read=read_blip2_itm,
        write=write_blip2_itm,
        rules=BLIP2_ITM,
        vision_prefix="vision_model.",
        model_type="blip-2",
        architectures=("Blip2ForImageTextRetrieval",),
    ),
    "clip": Family(
        title="CLIP",
        read=read_clip,
        write=write_clip,
        rules=CLIP,
        architectures=("CLIPModel",),
        left_out=("logit_scale",),
    ),
    "instructblip": Family(
        title="InstructBLIP",
        read=partial(read_blip2, family="instructblip", bridge_config=InstructedQFormerConfig),
        write=partial(write_blip2, architecture="InstructBlip", part="instructblip"),
        rules=INSTRUCTBLIP,
        default_prompt="A short image caption.",
    ),
    "instructblipvideo": Family(
        title="InstructBlipVideo",
        read=partial(
            read_blip2,
            family="instructblipvideo",
            bridge_config=InstructedQFormerConfig,
            slot="video_token",
            frames=VIDEO_FRAMES,
        ),
        write=partial(write_blip2, architecture="InstructBlipVideo", slot="video_token", part="instructblipvideo"),
        rules=INSTRUCTBLIP,
        default_prompt="A short video caption.",
    ),
    "blip2edge": Family(
        title="Attention pool",
        read=read_native,
        write=write_native,
        rules=NATIVE_RULES,
        vision_prefix="vision_model.",
    ),
    "minigpt4": Family(
        title="MiniGPT-4",
        read=partial(read_blip2, family="minigpt4"),
        write=partial(write_blip2, architecture="MiniGPT4"),
        rules=BLIP2,
        template="###Human: <Img>{image}</Img> {prompt}###Assistant:",
        default_prompt="Describe this image in detail.",
        question="{question}",
        stop=("###",),
    ),
    "llava": Family(
        title="LLaVA",
        read=read_llava,
        write=write_llava,
        rules=LLAVA,
        vision_prefix="vision_tower.",
        template="USER: {image}\n{prompt} ASSISTANT:",
        architectures=("LlavaForConditionalGeneration",),
        default_prompt="Describe the image concisely.",
        question="{question}",
        image_token="<image>",
        generation=True,
        left_out=LLAVA_LEFT_OUT,
        renamed=LLAVA_RENAMED,
    ),
    "idefics": Family(
        title="Flamingo (Idefics)",
        read=read_idefics,
        write=write_idefics,
        rules=IDEFICS_RULES,
        language_prefix="",
        question="Question: {question} Answer:",
        image_token="<image>",
        around_image="<fake_token_around_image>",
        generation=True,
        left_out=IDEFICS_LEFT_OUT,
    ),
}


def read_config(config: Any) -> Config:
    """Reads a ``config.json`` of any family.

    Raises:
        UnsupportedModelError: The ``model_type`` or the language model is not supported.
        CheckpointError: A key is missing or has a wrong value.
    """
    f = Fields("config.json", config)
    found = _family_of(f).read(f)
    if f.values.get(ELASTIC) is None or not isinstance(found, CaptionerConfig):
        return found
    return replace(found, elastic=f.integer(ELASTIC, None))


def _family_of(f: Fields) -> Family:
    """Returns the row for a checkpoint's ``model_type``; if several rows have this type, the row for its class.

    Raises:
        UnsupportedModelError: There is no such row.
    """
    model_type = f.values.get("model_type")
    rows = [family for name, family in FAMILIES.items() if (family.model_type or name) == model_type]
    if not rows:
        types = dict.fromkeys(family.model_type or name for name, family in FAMILIES.items())
        raise UnsupportedModelError(
            f"the checkpoint's model_type is {model_type!r}, which is not supported",
            f"supported: {', '.join(types)}; where the language model has a model_type of its own, it must be one of "
            f"{', '.join(bridged_languages())}",
        )
    classes = f.values.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"config.json: architectures must be a list of class names, not {classes!r}")
    for row in rows if classes else rows[:1]:
        if not classes or not row.architectures or set(classes) & set(row.architectures):
            return row
    raise UnsupportedModelError(
        f"the checkpoint is of the class {classes[0]}, which is not supported",
        f"supported of model_type {model_type}: {', '.join(name for row in rows for name in row.architectures)}",
    )


def canonical_name(config: Any, name: str) -> str:
    """Converts the name of a tensor in a checkpoint to the name that the family's rules use."""
    for pattern, replacement in FAMILIES[config.family].renamed:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def write_config(config: Config) -> dict[str, Any]:
    """Makes the ``config.json`` that :func:`read_config` and transformers read."""
    elastic = getattr(config, "elastic", 0)
    return FAMILIES[config.family].write(config) | ({ELASTIC: elastic} if elastic else {})


def weight_map(config: Config) -> WeightMap:
    """Makes the map that gives, for each parameter of this project's model, its tensors in a checkpoint."""
    family = FAMILIES[config.family]
    vision: tuple[Rule, ...] = ()
    if family.vision_prefix:
        row = vision_encoder(config.vision.kind)
        vision = under("vision.", family.vision_prefix, row.rules(config.vision))
    if isinstance(config, RetrievalConfig):
        return WeightMap((*family.rules, *vision), family.left_out)
    language = language_of(config.language.kind)
    rules = _language_rules(config)
    left_out = [
        *family.left_out,
        *(family.language_prefix.replace(".", r"\.") + name for name in language.left_out),
    ]
    if config.language.tie_embeddings:
        table = WeightMap(rules)
        tied = Rule("language.head", table.sources("language.embed_tokens"), table.rows("language.embed_tokens"))
        rules = (*(rule for rule in rules if rule.ours != "language.head"), tied)
    text_head = under(DRAFT_PREFIX, DRAFT_PREFIX, TEXT_HEAD_RULES)
    return WeightMap((*family.rules, *vision, *rules, *text_head), left_out)


def ties_of(config: Config) -> tuple[Tie, ...]:
    """Returns pairs of names of tied tensors in a checkpoint with this config; empty if the embeddings are not tied."""
    if isinstance(config, RetrievalConfig) or not config.language.tie_embeddings:
        return ()
    prefix = FAMILIES[config.family].language_prefix
    return tuple((prefix + target, prefix + source) for target, source in language_of(config.language.kind).ties)


def head_and_table(config: CaptionerConfig) -> list[tuple[str, str]]:
    """Returns the names of the head's weight and of the token table in a checkpoint whose head is not tied.

    There are several pairs (head, table) if the checkpoint stores both in several tensors.
    """
    untied = WeightMap(_language_rules(config))
    return list(
        zip(untied.sources("language.head.weight"), untied.sources("language.embed_tokens.weight"), strict=True)
    )


def _language_rules(config: CaptionerConfig) -> tuple[Rule, ...]:
    rules = language_of(config.language.kind).rules(config.language)
    return under("language.", FAMILIES[config.family].language_prefix, rules)
