"""The table of training phases: for each phase, the trained parts, the data, and a function that runs after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list, send_to_device
from torch import Tensor, nn

from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import ConfigError
from blip2edge.runtime.text.prompt import InstructionTokenizer
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.config import TrainingConfig
from blip2edge.training.data.scenes import Scene
from blip2edge.training.data.sources import Sample
from blip2edge.training.evaluation.checkpoints.models import CheckpointCaptioner
from blip2edge.training.evaluation.checkpoints.together import CaptionerTogether
from blip2edge.training.evaluation.validation import validation_scores
from blip2edge.training.loading.batches import KeywordTexts, SceneBatches, pixel_values
from blip2edge.training.loading.caption_texts import CaptionTexts
from blip2edge.training.loading.features import FeatureCache, FrozenEncoder, PictureReader, encoder_hash
from blip2edge.training.loading.loader import Loader, TextMakers
from blip2edge.training.loading.run_data import check_usable, open_sources
from blip2edge.training.loop.loop import Phase
from blip2edge.training.loop.optim import freeze, layer_number, layer_rates, recompute_activations
from blip2edge.training.loop.training_run import TrainingRun
from blip2edge.training.loop.validation import Validation
from blip2edge.training.phase_config import BridgePhase, Stage2Phase
from blip2edge.training.phases.pretrain import (
    DenseBatch,
    LanguagePretraining,
    VisionPretraining,
    dense_labels,
)
from blip2edge.training.phases.stage1 import RepresentationStage
from blip2edge.training.phases.stage1_checkpoint import begin_stage2
from blip2edge.training.phases.stage2 import TRAINED, GenerativeStage, elastic_draw, match_scale
from blip2edge.training.setup.build import new_stage1_model
from blip2edge.training.setup.checks import no_instruction_tokenizer
from blip2edge.training.setup.lora import add_lora, merge_lora
from blip2edge.training.setup.model_parts import DTYPES, ModelParts

MakeSceneBatch = Callable[[list[Scene], list[str]], Any]
"""A function that makes a batch from scenes and their names."""


def _seed(run: TrainingRun, phase: str) -> int:
    """Returns the seed of a phase. Each phase has its own seed, so scenes, order and random draws differ by phase."""
    return run.config.seed * len(PHASES) + list(PHASES).index(phase)


def _scene_batches(run: TrainingRun, phase: str, rows: int, make: MakeSceneBatch) -> SceneBatches:
    """Returns the batches of scenes for a pretraining phase of the miniature; the batches are on the device."""
    here = run.accelerator

    def moved(batch: list[Scene], names: list[str]) -> Any:
        return send_to_device(make(batch, names), here.device)

    return SceneBatches(rows, _seed(run, phase), moved, (here.process_index, here.num_processes))


def _loader(run: TrainingRun, phase: str, config: BridgePhase, texts: TextMakers) -> Loader:
    """Returns the loader of the recipe's data. If the picture encoder is frozen, the loader encodes the pictures."""
    if config.unfreeze_vision:
        encoder: FrozenEncoder | PictureReader = PictureReader(run.parts.preprocessing, run.accelerator)
    else:
        encoder = _frozen_encoder(run)
    sources = open_sources(run.config, run.base, run.accelerator, _seed(run, phase))
    check_usable(sources, texts.check)
    loader = Loader(sources, config.batch_size, encoder, texts, run.accelerator, run.config.loop.workers)
    run.loaders.append(loader)
    return loader


def _trained_vision(run: TrainingRun, phase: BridgePhase) -> nn.Module | None:
    """Returns the picture encoder if the phase trains it, else None.

    The encoder is converted to float32, because an earlier phase may have used half precision.
    """
    vision = run.parts.model.vision
    if not phase.unfreeze_vision:
        return None
    vision.to(run.accelerator.device, torch.float32)
    if run.config.loop.recompute_activations:
        recompute_activations(vision)
    return vision


def _rates(run: TrainingRun, phase: BridgePhase) -> Callable[[str], float]:
    """Returns a function from a parameter's name to its factor on the learning rate.

    A parameter of the picture encoder has the factor of its layer; every other parameter has the factor 1.
    """
    if not phase.unfreeze_vision:
        return lambda name: 1.0
    vision: Any = run.parts.model.vision
    layers = len(vision.layers)
    rates = layer_rates(layers, phase.layer_decay)

    def rate_of(name: str) -> float:
        part, _, rest = name.partition(".")
        return rates[layer_number(rest, layers)] if part == "vision" else 1.0

    return rate_of


def _frozen(run: TrainingRun, phase: BridgePhase) -> Sequence[nn.Module]:
    """Returns the frozen modules to shard with the phase: the picture encoder, or no module.

    There is no such module if the phase trains the encoder, or if its output is cached. With a cache, the processes run
    the encoder at different times, but a sharded module must run in all processes at once.
    """
    return () if phase.unfreeze_vision or run.config.loop.cache_features else (run.parts.model.vision,)


def _frozen_encoder(run: TrainingRun) -> FrozenEncoder:
    """Freezes the picture encoder and returns it, with a cache of its output if the recipe sets `cache_features`."""
    vision, loop, preprocessing = run.parts.model.vision, run.config.loop, run.parts.preprocessing
    freeze(vision)
    vision.to(DTYPES[loop.frozen_dtype])
    cache = None
    if loop.cache_features:
        arithmetic = loop.autocast if loop.encoder_autocast else "float32"
        name = encoder_hash(vision, preprocessing, f"{loop.features_dtype} from {arithmetic}")
        shape = (vision.config.num_embeds, vision.config.hidden_size)
        cache = FeatureCache(cache_directory() / "features" / name, shape, loop.features_dtype)
    return FrozenEncoder(vision, preprocessing, run.accelerator, cache, autocast=loop.encoder_autocast)


def _vision(run: TrainingRun) -> Phase:
    config, model = run.config, run.parts.model
    torch.manual_seed(config.seed)  # for the initial weights of the head
    vision: Any = model.vision  # the miniature's ViT
    module = VisionPretraining(vision, config.vision)

    def make(batch: list[Scene], names: list[str]) -> DenseBatch:
        return DenseBatch(tuple(names), pixel_values(batch), dense_labels(batch, config.model.patch_size))

    batches = _scene_batches(run, "vision", config.vision.batch_size, make)
    return Phase("vision", module, batches, config.vision, _seed(run, "vision"))


def _language(run: TrainingRun) -> Phase:
    config, parts = run.config, run.parts
    module = LanguagePretraining(parts.model.language, config.language)  # type: ignore[arg-type]  # an OPTDecoder
    texts = KeywordTexts(parts.tokenizer, config.model.num_query_tokens, config.data)
    batches = _scene_batches(run, "language", config.language.batch_size, texts)
    return Phase("language", module, batches, config.language, _seed(run, "language"))


def _stage1(run: TrainingRun) -> Phase:
    config = run.config
    model = new_stage1_model(run.parts, config, run.base)
    model.vision = nn.Identity()  # type: ignore[assignment]  # the batches hold its output
    if config.loop.recompute_activations:
        recompute_activations(model)
    run.stage1 = model
    phase = config.stage1
    weights = {"itc": phase.itc_weight, "itm": phase.itm_weight, "itg": phase.itg_weight}
    module = RepresentationStage(model, weights, _trained_vision(run, phase))
    batches = _loader(run, "stage1", phase, TextMakers(own=run.parts.qformer_texts))
    return Phase(
        "stage1",
        module,
        batches,
        phase,
        _seed(run, "stage1"),
        module.gauges,
        rate_of=_rates(run, phase),
        frozen=_frozen(run, phase),
    )


def _finish_stage1(run: TrainingRun) -> None:
    """Copies the trained weights of stage 1 into the captioner's bridge and draft model."""
    if run.stage1 is None:
        return
    run.stage1.vision = run.parts.model.vision
    begin_stage2(run.stage1, run.parts.model)


def _stage2(run: TrainingRun) -> Phase:
    return _generative(run, "stage2", run.config.stage2)


def _instruct(run: TrainingRun) -> Phase:
    return _generative(run, "instruct", run.config.instruct)


def _generative(run: TrainingRun, name: str, phase: Stage2Phase) -> Phase:
    config, parts = run.config, run.parts
    model = parts.model
    if parts.new_projection:
        match_scale(model)
        parts.new_projection = False
    if not phase.unfreeze_language:
        model.language.to(DTYPES[config.loop.frozen_dtype])
    if phase.lora_rank:
        torch.manual_seed(_seed(run, name))  # the same first values in every process and in a resumed run
        add_lora(model.language, phase.lora_rank, phase.lora_alpha, phase.lora_targets)
    if config.loop.recompute_activations:
        recompute_activations(model.bridge)
        recompute_activations(model.language)
    elastic = elastic_draw(model.config, phase, _seed(run, name))
    model.config = replace(model.config, elastic=phase.elastic_min if phase.elastic else 0)
    _trained_vision(run, phase)
    module = GenerativeStage(
        model,
        config.bridge,
        phase.itg_weight,
        unfreeze_language=phase.unfreeze_language,
        unfreeze_vision=phase.unfreeze_vision,
        elastic=elastic,
    )
    captions = CaptionTexts(model.config, parts.runtime_tokenizer, phase.max_tokens)
    texts = TextMakers(
        captions,
        parts.qformer_texts if phase.itg_weight else None,
        _instruction(parts, captions) if model.config.instruction_positions else None,
    )
    batches = _loader(run, name, phase, texts)
    return Phase(
        name,
        module,
        batches,
        phase,
        _seed(run, name),
        module.gauges,
        _validation(run),
        module.begin_step,
        _rates(run, phase),
        _frozen(run, phase),
    )


def _validation(run: TrainingRun) -> Validation | None:
    """Makes the validation of a phase that trains the captioner; None if the run has no validation."""
    config, parts, data = run.config.validation, run.parts, run.validation
    if data is None:
        return None
    instructions = None
    if parts.model.config.instruction_positions and parts.qformer_texts is not None:
        instructions = Tokenizer(parts.qformer_texts.tokenizer)
    captioner = CheckpointCaptioner(
        parts.model,
        parts.runtime_tokenizer,
        parts.preprocessing,
        instructions,
        batch_size=config.batch_size,
        generation={"max_new_tokens": config.max_new_tokens, "num_beams": config.num_beams},
        agree=broadcast if run.config.loop.fsdp else None,
    )
    if not run.config.loop.fsdp:
        return Validation(config, validation_scores(data, captioner), data.metric, run.accelerator)
    together = CaptionerTogether(captioner, broadcast_object_list)
    scores = validation_scores(data, together)
    return Validation(config, scores, data.metric, run.accelerator, together)


def _instruction(parts: ModelParts, captions: CaptionTexts) -> Callable[[Sequence[Sample]], tuple[Tensor, Tensor]]:
    """Returns a function that makes, from samples, the token ids and mask of the prompts for the Q-Former.

    The function uses the runtime's tokenization, so training and inference give the same ids.
    """
    if parts.qformer_texts is None:
        raise no_instruction_tokenizer()
    longest = parts.model.config.instruction_positions
    instructor = InstructionTokenizer(Tokenizer(parts.qformer_texts.tokenizer), longest, 1)

    def rows(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        arrays = instructor([captions.prompt(sample) for sample in samples])
        ids, mask = (torch.from_numpy(array) for array in arrays.values())
        return ids, mask

    return rows


def _merge_lora(run: TrainingRun) -> None:
    merge_lora(run.parts.model.language)


@dataclass(frozen=True)
class PhaseKind:
    """The functions that make and finish one kind of phase.

    Attributes:
        make: Function that makes the phase, called after the earlier phases have ended.
        finish: Function that is called after the phase's last step; stage 1 copies its result into the captioner here.
        changes: Prefixes of the captioner's parameters that the phase or `finish` changes.
    """

    make: Callable[[TrainingRun], Phase]
    finish: Callable[[TrainingRun], None]
    changes: Callable[[TrainingConfig], tuple[str, ...]]


def _changed(config: TrainingConfig, phase: Stage2Phase) -> tuple[str, ...]:
    language = ("language.",) if phase.unfreeze_language or phase.lora_rank else ()
    vision = ("vision.",) if phase.unfreeze_vision else ()
    # The bridge is always included: a new projection is scaled as the phase begins, even if it is not trained.
    return (*TRAINED[config.bridge], *language, *vision, "bridge.", "draft.")


def _changed_in_stage1(config: TrainingConfig) -> tuple[str, ...]:
    return ("bridge.", "draft.", *(("vision.",) if config.stage1.unfreeze_vision else ()))


PHASES: dict[str, PhaseKind] = {
    "vision": PhaseKind(_vision, lambda run: freeze(run.parts.model.vision), lambda config: ("vision.",)),
    "language": PhaseKind(_language, lambda run: freeze(run.parts.model.language), lambda config: ("language.",)),
    "stage1": PhaseKind(_stage1, _finish_stage1, _changed_in_stage1),
    "stage2": PhaseKind(_stage2, _merge_lora, lambda config: _changed(config, config.stage2)),
    "instruct": PhaseKind(_instruct, _merge_lora, lambda config: _changed(config, config.instruct)),
}


def phases_of(stage: str, config: TrainingConfig) -> list[str]:
    """Returns the names of the phases that `blip2edge train STAGE` runs, in order.

    Args:
        stage: "stage1", "stage2" or "instruct".
        config: The recipe.

    Raises:
        ConfigError: Stage 1 has no steps, or the recipe has the section of another stage instead of that of this stage.
    """
    for other in ("stage2", "instruct"):
        if other != stage != "stage1" and other in config.written and stage not in config.written:
            raise ConfigError(
                f"train {stage} does not use [{other}], and the recipe has no section [{stage}]",
                f"run train {other}, or add [{stage}] with its steps",
            )
    phases = ["vision"] if config.model.is_miniature else []
    if stage == "stage1":
        if not config.stage1.steps:
            raise ConfigError("[stage1] steps is 0", "set [stage1] steps to the number of optimizer steps")
        return [*phases, "stage1"]
    phases += ["language"] if config.model.is_miniature else []
    if config.runs_stage1(stage):
        phases.append("stage1")
    return [*phases, stage]
