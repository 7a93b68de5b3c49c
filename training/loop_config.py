"""Settings in a recipe that all phases share: the training loop and validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from blip2edge.runtime.decoding.options import MAX_BEAMS
from blip2edge.training.data.config import DataConfig
from blip2edge.training.fields import (
    NOT_NEGATIVE,
    OBJECTS,
    POSITIVE,
    SIZES,
    RecipeSection,
    ValidValues,
    at_least,
    one_of,
)

EMA_DECAY = ValidValues(lambda value: bool(0 <= value < 1), "be at least 0 and less than 1")
BEAMS = ValidValues(lambda value: bool(1 <= value <= MAX_BEAMS), f"be from 1 to {MAX_BEAMS}")
VALIDATION_METRICS = ("exact_match", "cider_d", "bleu_4", "rouge_l", "vqa_accuracy")


@dataclass(frozen=True)
class LoopConfig(RecipeSection):
    """Settings of the training loop, shared by all phases."""

    autocast: Annotated[str, one_of("float32", "bfloat16", "float16")] = "float32"
    """Arithmetic of the forward pass: "float32", "bfloat16" or "float16" (with loss scaling)."""
    frozen_dtype: Annotated[str, one_of("float32", "bfloat16", "float16")] = "float32"
    """Type in which the frozen picture encoder and the frozen language model are stored and run. The checkpoint gets
    their rounded weights, because the bridge was trained with them. A part that is trained stays in float32."""
    recompute_activations: bool = False
    """Save memory (activation checkpointing): the backward pass runs each layer of language model, bridge and trained
    picture encoder again, instead of keeping what the forward pass computed. Losses and gradients stay the same."""
    fsdp: bool = False
    """Save memory with several processes (FSDP): each process holds a share of the parameters (also of frozen ones),
    gradients and optimizer states, and gathers the other shares layer by layer."""
    ema_decay: Annotated[float, EMA_DECAY] = 0.0
    """Decay of an exponential moving average of the trained weights (EMA), such as 0.999; 0: no average. It needs
    4 more bytes for each trained weight."""
    ema_weights: Annotated[str, one_of("everywhere", "checkpoint", "validation")] = "everywhere"
    """Use of the averaged weights: "validation" (validation scores them), "checkpoint" (the phase ends with them), or
    "everywhere" (both). "checkpoint" and "validation" need keep_best = false if the run is validated."""
    snapshot_every: Annotated[int, POSITIVE] = 500
    """Steps between two snapshots. An interrupted run resumes from the newest."""
    log_every: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between two lines of the log; 0: about 200 lines for each phase."""
    cache_features: bool = False
    """Cache the frozen picture encoder's output on disk. Each picture is then encoded once, for all runs."""
    encoder_autocast: bool = True
    """Whether the frozen picture encoder runs in the arithmetic of `autocast` too. If false, it runs in float32, so
    that phases and runs with different values of `autocast` share the cached features."""
    features_dtype: Annotated[str, one_of("float32", "float16")] = "float32"
    """Type of the cached output: "float32" or "float16"."""
    workers: Annotated[int, NOT_NEGATIVE, OBJECTS] = 0
    """Threads that open the pictures of the next batch during the current step; 0: none."""
    data_streams: Annotated[int, POSITIVE, SIZES] = 1
    """Number of parts that the data is split into; each gives an equal share of a batch's rows. 1: every process reads
    all texts. A multiple of the number of processes: a process reads only the parts of its own rows."""
    trackers: tuple[str, ...] = ()
    """Programs that show the run, by accelerate's names, such as "tensorboard" or "wandb". Each needs its package. They
    get losses, learning rate, scores of validations, and values of a phase such as its temperature."""
    tracker_project: str = "blip2edge"
    """Name of the project that the trackers record the run in."""
    tensorboard: bool = False
    """Whether TensorBoard shows the run, as with "tensorboard" in `trackers`."""

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """Returns the names of the trackers, without duplicates."""
        return tuple(dict.fromkeys([*self.trackers, *(["tensorboard"] if self.tensorboard else [])]))


@dataclass(frozen=True)
class ValidationConfig(DataConfig):
    """Validation while `stage2` or `instruct` trains: captions of held-out pictures are scored.

    The keys of `[data]` can be used here to name the pictures. Keys of `[data]` that change or shuffle samples, or make
    their prompts, are refused. With `kind = "scenes"`, the pictures are scenes with pairs of objects that training
    never shows.
    """

    every: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between two validations; the last step is validated too. 0: no validation."""
    pictures: Annotated[int, at_least(2)] = 200
    """Largest number of pictures, taken from the beginning of the data."""
    metric: Annotated[str, one_of("", *VALIDATION_METRICS)] = ""
    """The score that decides which weights are best: "exact_match" (scenes), "cider_d", "bleu_4", "rouge_l" (captions)
    or "vqa_accuracy" (questions). If it is empty: exact_match for scenes, cider_d for captions, vqa_accuracy for
    questions."""
    keep_best: bool = True
    """Whether the phase ends with the weights of its best validation, instead of those of its last step."""
    patience: Annotated[int, NOT_NEGATIVE] = 0
    """Stop the phase after this many validations in a row without a better score; 0: never."""
    batch_size: Annotated[int, POSITIVE, SIZES] = 16
    """Pictures that are captioned together."""
    max_new_tokens: Annotated[int, POSITIVE, SIZES] = 30
    """Longest generated text in tokens."""
    num_beams: Annotated[int, BEAMS] = 1
    """Beams of the search for each text; 1: greedy decoding."""
