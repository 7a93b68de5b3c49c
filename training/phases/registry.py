"""The phases that recipes are made of: what each trains, on what, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import ConfigError
from blip2edge.model.config import QFormerConfig
from blip2edge.runtime.text.prompt import InstructionTokenizer
from blip2edge.runtime.text.tokenizer import Tokenizer
from blip2edge.training.config import Stage2Phase, TrainingConfig
from blip2edge.training.data.registry import open_source
from blip2edge.training.data.scenes import Scene
from blip2edge.training.data.sources import Sample
from blip2edge.training.loading.batches import KeywordTexts, SceneSeries, pixel_values
from blip2edge.training.loading.features import FeatureCache, PictureEncoder, encoder_hash
from blip2edge.training.loading.loader import Loader, PictureBatch, Texts
from blip2edge.training.loading.texts import CaptionTexts
from blip2edge.training.loop.loop import Phase
from blip2edge.training.loop.optim import freeze
from blip2edge.training.phases.pretrain import (
    DenseBatch,
    LanguagePretraining,
    VisionPretraining,
    dense_labels,
)
from blip2edge.training.phases.stage1 import Stage1Model, prepare_stage1
from blip2edge.training.phases.stage1_start import begin_stage2
from blip2edge.training.phases.stages import TRAINED, GenerativeStage, match_scale
from blip2edge.training.setup.workshop import Workshop


@dataclass
class Studio:
    """What the phases of one run are made with.

    Attributes:
        config: The recipe.
        workshop: The captioner.
        accelerator: Device and processes.
        base: The recipe's directory, where relative paths start.
        first_stage: Makes the model of stage 1, or reads the one that is kept.
        stage1: That model, from when it is needed.
    """

    config: TrainingConfig
    workshop: Workshop
    accelerator: Accelerator
    base: Path
    first_stage: Callable[[Workshop], Stage1Model]
    stage1: Stage1Model | None = None
    loaders: list[Loader] = field(default_factory=list)

    def series(self, phase: str) -> int:
        """The seed of a phase: each has scenes, an order and chances of its own."""
        return self.config.seed * len(PHASES) + list(PHASES).index(phase)

    def scenes(self, phase: str, rows: int, make: Callable[[list[Scene], list[str]], Any]) -> SceneSeries:
        """Batches of scenes for the miniature's pretraining."""
        here = self.accelerator

        def moved(batch: list[Scene], names: list[str]) -> Any:
            return send_to_device(make(batch, names), here.device)

        return SceneSeries(rows, self.series(phase), moved, (here.process_index, here.num_processes))

    def loader(self, phase: str, rows: int, texts: Texts) -> Loader:
        """Batches of the recipe's data, behind the frozen picture encoder."""
        vision, loop = self.workshop.model.vision, self.config.loop
        freeze(vision)
        cache = None
        if loop.cache_features:
            kind = f"{loop.features_dtype} from {loop.autocast}"
            name = encoder_hash(vision, self.workshop.preprocessing, kind)
            shape = (vision.config.num_embeds, vision.config.hidden_size)
            cache = FeatureCache(cache_directory() / "features" / name, shape, loop.features_dtype)
        encoder = PictureEncoder(vision, self.workshop.preprocessing, self.accelerator, cache)
        source = open_source(self.config.data, seed=self.series(phase), base=self.base)
        made = Loader(source, rows, encoder, texts, self.accelerator, loop.workers)
        self.loaders.append(made)
        return made

    def broken(self) -> dict[str, str]:
        """Samples that the loaders could not use, and why."""
        return {name: problem for each in self.loaders for name, problem in each.broken.items()}

    def close(self) -> None:
        """Ends what the loaders hold."""
        for each in self.loaders:
            each.close()
        self.loaders.clear()


class RepresentationStage(nn.Module):
    """Stage 1 with a factor a loss.

    Args:
        model: Trained, except for its picture encoder.
        weights: Of "itc", "itm" and "itg".
    """

    def __init__(self, model: Stage1Model, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model = model
        self._weights = dict(weights)
        prepare_stage1(model)

    def forward(self, batch: PictureBatch) -> dict[str, Tensor]:
        """The three losses, and `loss`, their weighted sum."""
        losses: dict[str, Tensor] = self.model(batch.image_embeds, batch.texts)
        total = torch.stack([self._weights[name] * loss for name, loss in losses.items()]).sum()
        return {**losses, "loss": total}

    def gauges(self) -> dict[str, float]:
        """The learned temperature."""
        return {"temperature": float(self.model.temperature.detach())}


def _vision(studio: Studio) -> Phase:
    config, model = studio.config, studio.workshop.model
    torch.manual_seed(config.seed)  # the head, which is dropped at the end, is drawn by torch
    module = VisionPretraining(model.vision, config.vision)

    def make(batch: list[Scene], names: list[str]) -> DenseBatch:
        return DenseBatch(tuple(names), pixel_values(batch), dense_labels(batch, config.model.patch_size))

    batches = studio.scenes("vision", config.vision.batch_size, make)
    return Phase("vision", module, batches, config.vision, studio.series("vision"))


def _language(studio: Studio) -> Phase:
    config, workshop = studio.config, studio.workshop
    module = LanguagePretraining(workshop.model.language, config.language)  # type: ignore[arg-type]  # an OPTDecoder
    texts = KeywordTexts(workshop.tokenizer, config.model.num_query_tokens, config.data)
    batches = studio.scenes("language", config.language.batch_size, texts)
    return Phase("language", module, batches, config.language, studio.series("language"))


def _stage1(studio: Studio) -> Phase:
    config = studio.config
    model = studio.first_stage(studio.workshop)
    model.vision = nn.Identity()  # type: ignore[assignment]  # its output comes with the batches
    studio.stage1 = model
    phase = config.stage1
    weights = {"itc": phase.itc_weight, "itm": phase.itm_weight, "itg": phase.itg_weight}
    module = RepresentationStage(model, weights)
    batches = studio.loader("stage1", phase.batch_size, Texts(own=studio.workshop.texts))
    return Phase("stage1", module, batches, phase, studio.series("stage1"), module.gauges)


def _leave_stage1(studio: Studio) -> None:
    """The captioner's bridge, and its draft, begin where stage 1 ends."""
    if studio.stage1 is None:
        return
    studio.stage1.vision = studio.workshop.model.vision
    if isinstance(studio.workshop.model.config.bridge, QFormerConfig):
        begin_stage2(studio.stage1, studio.workshop.model)


def _stage2(studio: Studio) -> Phase:
    return _generative(studio, "stage2", studio.config.stage2)


def _instruct(studio: Studio) -> Phase:
    return _generative(studio, "instruct", studio.config.instruct)


def _generative(studio: Studio, name: str, phase: Stage2Phase) -> Phase:
    config, workshop = studio.config, studio.workshop
    model = workshop.model
    if workshop.fresh:
        match_scale(model)
        workshop.fresh = False
    module = GenerativeStage(
        model, config.bridge, phase.itg_weight, unfreeze_language=phase.unfreeze_language
    )
    captions = CaptionTexts(model.config, workshop.runtime_tokenizer, phase.max_tokens)
    texts = Texts(
        captions,
        workshop.texts if phase.itg_weight else None,
        _instruction(workshop, captions) if model.config.instruction_positions else None,
    )
    batches = studio.loader(name, phase.batch_size, texts)
    return Phase(name, module, batches, phase, studio.series(name), module.gauges)


def _instruction(
    workshop: Workshop, captions: CaptionTexts
) -> Callable[[Sequence[Sample]], tuple[Tensor, Tensor]]:
    """Prompts as the Q-Former reads them; the runtime's own code."""
    if workshop.texts is None:
        raise ConfigError(
            "instruct: the Q-Former has no tokenizer", "give model.bert, or a checkpoint that has one"
        )
    longest = workshop.model.config.instruction_positions
    instructor = InstructionTokenizer(Tokenizer(workshop.texts.tokenizer), longest, 1)

    def rows(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        arrays = instructor([captions.prompt(sample) for sample in samples])
        ids, mask = (torch.from_numpy(array) for array in arrays.values())
        return ids, mask

    return rows


@dataclass(frozen=True)
class PhaseRow:
    """One kind of phase.

    Attributes:
        make: Makes it, when the phases before it are done.
        leave: What is done with its result.
        writes: The parts of the captioner that it, or what is done with its result, changes.
    """

    make: Callable[[Studio], Phase]
    leave: Callable[[Studio], None]
    writes: Callable[[TrainingConfig], tuple[str, ...]]


def _trained(config: TrainingConfig, phase: Stage2Phase) -> tuple[str, ...]:
    own = ("language.",) if phase.unfreeze_language else ()
    # A fresh last layer is scaled as the phase begins, trained or not.
    return (*TRAINED[config.bridge], *own, "bridge.", "draft.")


PHASES: dict[str, PhaseRow] = {
    "vision": PhaseRow(
        _vision, lambda studio: freeze(studio.workshop.model.vision), lambda config: ("vision.",)
    ),
    "language": PhaseRow(
        _language, lambda studio: freeze(studio.workshop.model.language), lambda config: ("language.",)
    ),
    "stage1": PhaseRow(_stage1, _leave_stage1, lambda config: ("bridge.", "draft.")),
    "stage2": PhaseRow(_stage2, lambda studio: None, lambda config: _trained(config, config.stage2)),
    "instruct": PhaseRow(_instruct, lambda studio: None, lambda config: _trained(config, config.instruct)),
}


def phases_of(stage: str, config: TrainingConfig) -> list[str]:
    """The phases that `blip2edge train STAGE` runs.

    Args:
        stage: "stage1", "stage2" or "instruct".
        config: The recipe.

    Raises:
        ConfigError: The stage has no steps.
    """
    first = ["vision"] if config.model.is_miniature else []
    if stage == "stage1":
        if not config.stage1.steps:
            raise ConfigError("[stage1] steps is 0", "give the steps that stage1 is to make")
        return [*first, "stage1"]
    first += ["language"] if config.model.is_miniature else []
    if config.stage1.steps and not config.model.bridge_from:
        first.append("stage1")
    return [*first, stage]
