"""Builds the model of a run: a new miniature, a whole checkpoint, or a captioner composed of trained parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers.processors import TemplateProcessing

from blip2edge.errors import ConfigError
from blip2edge.model.bridges.text_head import DRAFT_CONFIG
from blip2edge.model.checkpoint.directory import load_checkpoint, read_model_config
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.config import (
    BLIP2_VISION,
    CaptionerConfig,
    DraftConfig,
    QFormerConfig,
)
from blip2edge.model.config_json import Fields
from blip2edge.model.retrieval import RetrievalConfig
from blip2edge.training.config import TrainingConfig
from blip2edge.training.key_rules import QFORMER_BRIDGES
from blip2edge.training.loading.qformer_texts import CLS, SEP, QFormerTexts
from blip2edge.training.phases.stage1 import Stage1Model
from blip2edge.training.phases.stage1_checkpoint import (
    Stage1Source,
    begin_stage2,
    open_stage1,
    save_stage1,
    start_from_bert,
)
from blip2edge.training.setup import pretrained
from blip2edge.training.setup.architecture import captioner_config, family_of, qformer_sizes, stage1_config
from blip2edge.training.setup.checks import (
    check_bert_sizes,
    check_bridge_keys,
    check_stage1_vision,
    check_trained_vision,
    no_instruction_tokenizer,
)
from blip2edge.training.setup.miniature import build_miniature, initialise, miniature_config
from blip2edge.training.setup.model_parts import ModelParts
from blip2edge.training.setup.text_side import QFORMER_TOKENIZER, has_text_side, is_retrieval, own_texts, text_tokenizer

_NEW = "new"  # status of a bridge with new weights


@dataclass(frozen=True)
class PlannedParts:
    """The planned model of a run: all configs are read and checked, but no weights are read yet.

    Attributes:
        config: Config of the captioner.
        bridge: Where the bridge comes from, as a status line; empty for the miniature.
        build: Reads the weights and makes the model.
    """

    config: CaptionerConfig
    bridge: str
    build: Callable[[], ModelParts]

    @property
    def new_bridge(self) -> bool:
        """Returns whether the bridge gets new weights while the other parts of the model come from checkpoints."""
        return self.bridge == _NEW


def plan_parts(stage: str, config: TrainingConfig, base: Path) -> PlannedParts:
    """Plans the captioner of a training run, from the checkpoints that the recipe names or with new weights.

    Args:
        stage: "stage1", "stage2" or "instruct".
        config: The recipe.
        base: Directory of the recipe; its relative paths start there.

    Raises:
        ConfigError: The parts do not fit together.
        CheckpointError: A checkpoint cannot be read.
    """
    kept = _kept(config, base)
    given = _of_checkpoint(config, base)
    own = None if given is None or kept else _text_side_of_checkpoint(stage, config, base, given)
    whole = None if given is None else _whole(stage, config, base, given)
    kept = kept or own
    if config.model.is_miniature:
        planned = _miniature(stage, config, kept)
    else:
        planned = whole or _composed(stage, config, base, kept if has_text_side(stage, config, kept) else None)
    check_trained_vision(planned.config, config)
    if planned.bridge:
        text, own_tokenizer = has_text_side(stage, config, kept), text_tokenizer(config, base)
        check_bridge_keys(
            config,
            planned.config,
            kept,
            text=text,
            new=not (kept or whole),
            tokenizer=None if own_tokenizer is None else own_tokenizer.key,
        )

    def build() -> ModelParts:
        parts = planned.build()
        if kept is not None:
            parts.stage1 = kept.load
        if kept is not None and not (whole and own):  # a checkpoint that is used whole has its own bridge
            begin_stage2(kept.load(), parts.model)
        draft = parts.model.config.draft
        if draft is not None and parts.qformer_texts is not None:
            # an existing draft model may have fewer positions than the recipe sets
            parts.qformer_texts.max_length = min(parts.qformer_texts.max_length, draft.max_positions)
        return parts

    return replace(planned, build=build)


def _kept(config: TrainingConfig, base: Path) -> Stage1Source | None:
    """Opens the trained stage-1 model whose Q-Former the run uses; None if the recipe names no such model.

    The recipe names it as `bridge_from`, or as a `checkpoint` that is a BLIP-2 for image-text retrieval.
    """
    model = config.model
    if model.bridge_from:
        return _opened(model.bridge_from, config, base)
    if not model.checkpoint or model.vision_from or config.bridge not in QFORMER_BRIDGES:
        return None
    if not is_retrieval(pretrained.resolve(model.checkpoint, base)):
        return None
    return _opened(model.checkpoint, config, base)


def _opened(name: str, config: TrainingConfig, base: Path) -> Stage1Source:
    """Opens a stage-1 model. If it has no text head, a new one is added, with a tokenizer that the recipe names."""
    directory = pretrained.resolve(name, base)
    draft = None
    if not (directory / DRAFT_CONFIG).is_file():
        own, given = own_texts(config, base), read_model_config(directory)
        draft = own.draft_config(given.max_positions) if own and isinstance(given, RetrievalConfig) else None
    return open_stage1(directory, draft, config.stage1.embed_dim)


def _miniature(stage: str, config: TrainingConfig, kept: Stage1Source | None) -> PlannedParts:
    instructed = stage == "instruct"
    text = has_text_side(stage, config, kept)
    built = miniature_config(config, draft=text and not instructed, instructed=instructed)
    return PlannedParts(
        built, "", lambda: build_miniature(config, draft=text and not instructed, instructed=instructed)
    )


def _of_checkpoint(config: TrainingConfig, base: Path) -> CaptionerConfig | None:
    """Returns the config of the recipe's checkpoint, if the run can use all its parts.

    Returns None if the recipe names another checkpoint for a part, or another kind of bridge (key `bridge`).
    """
    model = config.model
    if not model.checkpoint or model.vision_from or model.language_from:
        return None
    given = pretrained.captioner_config_of(pretrained.resolve(model.checkpoint, base))
    gated = given.family == "idefics"
    return given if given.bridge.kind in _KINDS[config.bridge] and gated == (config.bridge == "flamingo") else None


def _text_side_of_checkpoint(
    stage: str, config: TrainingConfig, base: Path, given: CaptionerConfig
) -> Stage1Source | None:
    """Opens the checkpoint's Q-Former with its text side, if the run trains both; None if it does not train both.

    Raises:
        ConfigError: The run cannot train the checkpoint's bridge.
    """
    instructed = given.bridge.kind == INSTRUCTED
    begins = config.runs_stage1(stage) or (stage == "instruct" and not instructed and config.bridge in QFORMER_BRIDGES)
    missing = ""
    if begins and (given.draft is None or instructed):
        missing = f"{'stage 1' if config.runs_stage1(stage) else 'instruct'} trains a Q-Former with its text side"
    elif instructed and stage != "instruct":
        missing = f"{stage} trains a Q-Former that does not read the prompt"
    elif stage == "stage2" and config.stage2.itg_weight and given.draft is None:
        missing = "[stage2] itg_weight trains the text head of the Q-Former"
    if missing:
        raise ConfigError(
            f"{missing}, and the checkpoint {config.model.checkpoint} ([model] checkpoint) has a bridge of kind"
            f" {given.bridge.kind!r} {'with' if given.draft else 'without'} a text head",
            "to train a new bridge, name the checkpoint in vision_from and language_from instead of in checkpoint; to"
            " go on with a Q-Former and its text side, set bridge_from to an output of stage 1",
        )
    if not begins:
        return None
    return open_stage1(pretrained.resolve(config.model.checkpoint, base), None, config.stage1.embed_dim)


def _whole(stage: str, config: TrainingConfig, base: Path, given: CaptionerConfig) -> PlannedParts | None:
    """Plans a run that trains the recipe's checkpoint without new modules.

    Returns None if the run needs another kind of Q-Former, or a text head that the checkpoint does not have.
    """
    wanted = stage == "instruct"
    lacks_text = stage == "stage2" and config.stage2.itg_weight > 0 and given.draft is None
    if (given.bridge.kind == INSTRUCTED) != wanted or lacks_text:
        return None
    directory = pretrained.resolve(config.model.checkpoint, base)
    preprocessing = load_preprocessing(directory).preprocessing
    tokenizer = pretrained.load_tokenizer(directory / "tokenizer.json")
    files = pretrained.side_files(directory)
    own = own_texts(config, base)
    if given.instruction_positions and own is None:
        raise no_instruction_tokenizer()
    if wanted and own is not None:  # of a bert, if the checkpoint has none
        files.setdefault(QFORMER_TOKENIZER, own.tokenizer.to_str().encode())

    def build() -> ModelParts:
        return ModelParts(load_checkpoint(directory), preprocessing, tokenizer, own, files, new_projection=False)

    return PlannedParts(given, f"of {config.model.checkpoint}", build)


INSTRUCTED = "instructed-qformer"
_KINDS = {
    "qformer": ("qformer", INSTRUCTED),
    "projection": ("qformer", INSTRUCTED),
    "mlp": ("mlp",),
    "perceiver": ("perceiver",),
    "pool": ("pool",),
    "flamingo": ("perceiver",),
}
"""The kinds of bridge in checkpoints for each value of the recipe's key `bridge`."""


def _composed(stage: str, config: TrainingConfig, base: Path, kept: Stage1Source | None) -> PlannedParts:
    """Plans a captioner of a trained picture encoder, a trained language model and a new bridge.

    If `kept` (a trained model of stage 1) is given, the bridge gets the sizes of that model's Q-Former.
    """
    model = config.model
    vision = pretrained.open_vision(model.vision_from or model.checkpoint, base)
    language = pretrained.open_language(model.language_from or model.checkpoint, base)
    instructed, text = stage == "instruct", has_text_side(stage, config, kept)
    if instructed and vision.config.kind != BLIP2_VISION:
        raise ConfigError(
            f"instruct supports the picture encoder of a BLIP-2 only, and model.vision_from is of kind "
            f"{vision.config.kind}",
            "set model.vision_from to the checkpoint of a BLIP-2, or run stage2",
        )
    family = "instructblip" if instructed else family_of(config.bridge, vision.config)
    tokens = pretrained.picture_tokens(family)
    extra = language.with_tokens(tokens)
    own = own_texts(config, base) or QFormerTexts(language.tokenizer, config.stage1.max_tokens)
    built = captioner_config(
        config.bridge,
        config.model,
        vision.config,
        language.config,
        extra=extra,
        text=_text_config(own, config, base, kept) if text else None,
        instructed=instructed,
    )
    built = _like(kept, pretrained.with_special_tokens(built, language, tokens[0]))

    def build() -> ModelParts:
        captioner = pretrained.assemble_captioner(built, vision, language)
        for module in pretrained.new_modules(captioner):
            initialise(module, config.seed)
        files = pretrained.tokenizer_files(language) | {"preprocessor_config.json": vision.file}
        files |= {"processor_config.json": pretrained.processor_file(captioner.config)}
        if instructed:
            files[QFORMER_TOKENIZER] = own.tokenizer.to_str().encode()
        parts = ModelParts(captioner, vision.preprocessing, language.tokenizer, own if text else None, files)
        if text and config.model.bert and kept is None:
            begin_stage2(new_stage1_model(parts, config, base), captioner)
        return parts

    return PlannedParts(built, _NEW if kept is None else f"the Q-Former of {kept.directory}", build)


def _text_config(own: QFormerTexts, config: TrainingConfig, base: Path, kept: Stage1Source | None) -> DraftConfig:
    """Makes the config of the Q-Former's text side.

    The number of positions is that of the model that initialises the text side: a stage-1 model, or a BERT.
    """
    if kept is not None:
        return kept.draft
    if not config.model.bert:
        return own.draft_config()
    values = read_checkpoint_json(pretrained.resolve(config.model.bert, base) / "config.json")
    check_bert_sizes(config, values)
    return own.draft_config(Fields("config.json", values).integer("max_position_embeddings", 512))


def _like(kept: Stage1Source | None, built: CaptionerConfig) -> CaptionerConfig:
    """Returns the config `built` with the Q-Former sizes of the trained stage-1 model `kept`.

    If `kept` is None or the bridge is no Q-Former, `built` is returned unchanged.
    """
    if kept is None:
        return built
    given: Any = kept.config.text
    bridge: Any = built.bridge
    return replace(built, bridge=replace(bridge, **qformer_sizes(given)))


def new_stage1_model(parts: ModelParts, config: TrainingConfig, base: Path) -> Stage1Model:
    """Builds the model that stage 1 starts from: that of a checkpoint (`parts.stage1`), or a new one.

    Raises:
        ConfigError: The bridge is not a Q-Former.
        CheckpointError: The recipe's BERT cannot be read, or has other sizes.
    """
    bridge, texts = parts.model.config.bridge, parts.qformer_texts
    if not isinstance(bridge, QFormerConfig) or texts is None:
        raise ConfigError(f"stage1 trains a Q-Former, and bridge is {config.bridge!r}", "set bridge to 'qformer'")
    check_stage1_vision(parts.model.config.vision)
    if parts.stage1 is not None:
        torch.manual_seed(config.seed)  # for what the checkpoint does not have
        return parts.stage1()
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
