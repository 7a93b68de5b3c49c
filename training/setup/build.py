"""Builds the model of a run: a new miniature, a whole checkpoint, or a captioner composed of trained parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers.processors import TemplateProcessing

from blip2edge.bundle.schema import DRAFT_TOKENIZER_FILE
from blip2edge.errors import ConfigError
from blip2edge.model.checkpoint.directory import load_checkpoint
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.config import BLIP2_VISION, CLIP_VISION, CaptionerConfig, DraftConfig, QFormerConfig
from blip2edge.model.config_json import Fields
from blip2edge.model.vision.vit import VisionTransformer
from blip2edge.training.config import TrainingConfig
from blip2edge.training.loading.qformer_texts import CLS, SEP, QFormerTexts
from blip2edge.training.phases.stage1 import Stage1Model
from blip2edge.training.phases.stage1_checkpoint import (
    begin_stage2,
    load_stage1,
    save_stage1,
    start_from_bert,
)
from blip2edge.training.setup import pretrained
from blip2edge.training.setup.architecture import captioner_config, family_of, qformer_sizes, stage1_config
from blip2edge.training.setup.miniature import build_miniature, initialise
from blip2edge.training.setup.model_parts import ModelParts

QFORMER_TOKENIZER = "qformer_tokenizer/tokenizer.json"  # of InstructBLIP, in its directory


def has_text_side(stage: str, config: TrainingConfig) -> bool:
    """Returns whether the Q-Former has its own text modules in this run."""
    if config.bridge not in ("qformer", "projection"):
        return False
    kept = config.stage1.steps or config.model.bridge_from or config.stage2.itg_weight
    return stage in ("stage1", "instruct") or bool(kept)


def build_parts(stage: str, config: TrainingConfig, base: Path) -> ModelParts:
    """Builds the captioner of a training run, from the checkpoints that the recipe names or with new weights.

    Args:
        stage: "stage1", "stage2" or "instruct".
        config: The recipe.
        base: Directory of the recipe; its relative paths start there.

    Raises:
        ConfigError: The parts do not fit together.
        CheckpointError: A checkpoint cannot be read.
    """
    kept = None
    if config.model.bridge_from:
        kept = load_stage1(pretrained.resolve(config.model.bridge_from, base))
    instructed = stage == "instruct"
    text = has_text_side(stage, config)
    if config.model.is_miniature:
        parts = build_miniature(config, draft=text and not instructed, instructed=instructed)
    else:
        parts = _whole(stage, config, base) or _composed(stage, config, base, kept if text else None)
    _check_trained_vision(parts, config)
    if kept is not None:
        begin_stage2(kept, parts.model)
    draft = parts.model.config.draft
    if (
        draft is not None and parts.qformer_texts is not None
    ):  # an existing draft model may have fewer positions than the recipe sets
        parts.qformer_texts.max_length = min(parts.qformer_texts.max_length, draft.max_positions)
    return parts


def _check_trained_vision(parts: ModelParts, config: TrainingConfig) -> None:
    """Raises ConfigError if the recipe trains a picture encoder whose training is not supported."""
    trained = [each.section for each in (config.stage1, config.stage2, config.instruct) if each.unfreeze_vision]
    if trained and not isinstance(parts.model.vision, VisionTransformer):
        raise ConfigError(
            f"[{trained[0]}] unfreeze_vision trains picture encoders of the kinds {BLIP2_VISION} (BLIP-2, BLIP) and "
            f"{CLIP_VISION} (CLIP), and this one is of the kind {parts.model.config.vision.kind!r}",
            "set unfreeze_vision to false, or give another encoder",
        )


def _whole(stage: str, config: TrainingConfig, base: Path) -> ModelParts | None:
    """Loads the recipe's checkpoint as it is, if it has the picture encoder, bridge and language model of the recipe.

    Returns None if one of these three, or the needed text head, is missing or of another kind.
    """
    model = config.model
    if not model.checkpoint or model.vision_from or model.language_from:
        return None
    directory = pretrained.resolve(model.checkpoint, base)
    given = load_checkpoint(directory)
    wanted = "instructed-qformer" if stage == "instruct" else _KINDS[config.bridge]
    gated = given.config.family == "idefics"
    lacks_text = config.stage2.itg_weight > 0 and given.draft is None and stage == "stage2"
    if given.config.bridge.kind != wanted or gated != (config.bridge == "flamingo") or lacks_text:
        return None
    preprocessing = load_preprocessing(directory).preprocessing
    tokenizer = pretrained.load_tokenizer(directory / "tokenizer.json")
    files = pretrained.side_files(directory)
    return ModelParts(given, preprocessing, tokenizer, _own_texts(config, base), files, new_projection=False)


_KINDS = {
    "qformer": "qformer",
    "projection": "qformer",
    "mlp": "mlp",
    "perceiver": "perceiver",
    "pool": "pool",
    "flamingo": "perceiver",
}
"""The kind of bridge for each value of the recipe's key `bridge`."""


def _own_texts(config: TrainingConfig, base: Path) -> QFormerTexts | None:
    """Loads the tokenizer of the Q-Former's text side, from the first of the recipe's checkpoints that has it.

    Returns None if no checkpoint has such a tokenizer.
    """
    for name in (config.model.bridge_from, config.model.checkpoint, config.model.bert):
        if not name:
            continue
        directory = pretrained.resolve(name, base)
        for file in (DRAFT_TOKENIZER_FILE, QFORMER_TOKENIZER):
            if (directory / file).is_file():
                return QFormerTexts(pretrained.load_tokenizer(directory / file), config.stage1.max_tokens)
        if name == config.model.bert:
            return QFormerTexts(pretrained.load_tokenizer(directory / "tokenizer.json"), config.stage1.max_tokens)
    return None


def _composed(stage: str, config: TrainingConfig, base: Path, kept: Stage1Model | None) -> ModelParts:
    """Builds a captioner from a trained picture encoder, a trained language model and a new bridge.

    If `kept` (a trained stage-1 model) is given, the bridge gets the sizes of its Q-Former.
    """
    model = config.model
    vision = pretrained.load_vision(model.vision_from or model.checkpoint, base)
    language = pretrained.load_language(model.language_from or model.checkpoint, base)
    instructed, text = stage == "instruct", has_text_side(stage, config)
    if instructed and vision.module.config.kind != BLIP2_VISION:
        raise ConfigError(
            f"instruct supports the picture encoder of a BLIP-2 only, and model.vision_from is of kind "
            f"{vision.module.config.kind}",
            "set model.vision_from to the checkpoint of a BLIP-2, or run stage2",
        )
    family = "instructblip" if instructed else family_of(config.bridge, vision.module.config)
    tokens = pretrained.picture_tokens(family)
    extra = language.with_tokens(tokens)
    own = _own_texts(config, base) or QFormerTexts(language.tokenizer, config.stage1.max_tokens)
    built = captioner_config(
        config.bridge,
        config.model,
        vision.module.config,
        language.config,
        extra=extra,
        text=_text_config(own, config, base, kept) if text else None,
        instructed=instructed,
    )
    built = pretrained.with_special_tokens(built, language, tokens[0])
    captioner = pretrained.assemble_captioner(_like(kept, built), vision, language)
    for module in pretrained.new_modules(captioner):
        initialise(module, config.seed)
    files = pretrained.tokenizer_files(language) | {"preprocessor_config.json": vision.file}
    files |= {"processor_config.json": pretrained.processor_file(captioner.config)}
    if instructed:
        files[QFORMER_TOKENIZER] = own.tokenizer.to_str().encode()
    parts = ModelParts(captioner, vision.preprocessing, language.tokenizer, own if text else None, files)
    if text and config.model.bert and not config.model.bridge_from:
        begin_stage2(new_stage1_model(parts, config, base), captioner)
    return parts


def _text_config(own: QFormerTexts, config: TrainingConfig, base: Path, kept: Stage1Model | None) -> DraftConfig:
    """Makes the config of the Q-Former's text side; the positions are those of the model that initialises it."""
    if kept is not None:
        return kept.draft_config
    if not config.model.bert:
        return own.draft_config()
    values = read_checkpoint_json(pretrained.resolve(config.model.bert, base) / "config.json")
    return own.draft_config(Fields("config.json", values).integer("max_position_embeddings", 512))


def _like(kept: Stage1Model | None, built: CaptionerConfig) -> CaptionerConfig:
    """Returns the config `built`, but with the Q-Former sizes of the trained stage-1 model `kept`."""
    if kept is None or not isinstance(built.bridge, QFormerConfig):
        return built
    given: Any = kept.config.text
    return replace(built, bridge=replace(built.bridge, **qformer_sizes(given)))


def new_stage1_model(parts: ModelParts, config: TrainingConfig, base: Path) -> Stage1Model:
    """Builds a new stage-1 model around the captioner's picture encoder.

    Raises:
        ConfigError: The bridge is not a Q-Former.
        CheckpointError: The recipe's BERT cannot be read, or has other sizes.
    """
    bridge, texts = parts.model.config.bridge, parts.qformer_texts
    if not isinstance(bridge, QFormerConfig) or texts is None:
        raise ConfigError(f"stage1 trains a Q-Former, and bridge is {config.bridge!r}", "set bridge to 'qformer'")
    if parts.model.config.vision.kind == CLIP_VISION:
        raise ConfigError(
            "stage1 does not support the picture encoder of a CLIP, and model.vision_from is one",
            "set model.vision_from to another encoder, such as a BLIP-2's, or run stage2",
        )
    draft = parts.model.config.draft or _text_config(texts, config, base, None)
    vision = parts.model.config.vision
    model = Stage1Model(stage1_config(vision, bridge, draft, config.stage1.embed_dim), draft)
    if config.model.bert:
        generator = torch.Generator().manual_seed(config.seed)
        start_from_bert(model, pretrained.resolve(config.model.bert, base), generator)
    else:
        initialise(model, config.seed)
    return model


def write_stage1(parts: ModelParts, model: Stage1Model, directory: Path) -> None:
    """Writes the stage-1 model to a checkpoint directory, with its tokenizer and preprocessing."""
    save_stage1(model, directory)
    name = "preprocessor_config.json"
    (directory / name).write_bytes(parts.files[name])
    if parts.qformer_texts is not None:
        parts.qformer_texts.save(directory)
        framed = tokenizers.Tokenizer.from_str(parts.qformer_texts.tokenizer.to_str())
        ends = [(token, framed.token_to_id(token)) for token in (CLS, SEP)]
        framed.post_processor = TemplateProcessing(single=f"{CLS} $A {SEP}", special_tokens=ends)
        framed.save(str(directory / "tokenizer.json"))
