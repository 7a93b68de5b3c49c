"""Values of a recipe that are valid alone, but do not work together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from blip2edge.training.config import TrainingConfig


class Conflict(NamedTuple):
    """What does not work together, and how to correct it."""

    problem: str
    fix: str


def conflicts(config: TrainingConfig) -> Iterator[Conflict]:
    """Finds the values of a recipe that do not work together.

    Args:
        config: The recipe; each of its sections is valid.

    Yields:
        Problem and correction of each conflict.
    """
    yield from _loop_conflicts(config)
    for section, data in (("data", config.data), ("validation", config.validation)):
        if data.most_shots and config.bridge != "flamingo":
            yield Conflict(
                f"[{section}] shots = {data.most_shots} does not work with bridge = {config.bridge!r}, whose model"
                " reads one picture in a text",
                "leave shots out, or set bridge = 'flamingo'",
            )
    if config.model.is_miniature and not config.data.only_scenes:
        yield Conflict(
            "[model] names no trained parts, so the recipe trains the miniature model, which supports the data kind"
            f" 'scenes' only, not {config.data.kind!r}",
            "set checkpoint, or vision_from and language_from, in [model]",
        )


def _loop_conflicts(config: TrainingConfig) -> Iterator[Conflict]:
    loop, validation = config.loop, config.validation
    if config.bridge == "flamingo" and loop.frozen_dtype != "float32":
        yield Conflict(
            f"[loop] frozen_dtype = {loop.frozen_dtype!r} does not work with bridge = 'flamingo', which trains"
            " layers inside the language model",
            "leave frozen_dtype out; autocast = 'bfloat16' saves time, and recompute_activations saves memory",
        )
    if loop.cache_features and config.data.augments:
        yield Conflict(
            "[loop] cache_features does not work with crop or flip in [data], which change each picture every time",
            "set cache_features to false, or leave crop and flip out",
        )
    if loop.fsdp and loop.autocast == "float16":
        yield Conflict(
            "[loop] fsdp does not work with autocast = 'float16', whose losses are scaled",
            "set autocast to 'bfloat16' or 'float32'",
        )
    if loop.fsdp and validation.every:
        yield Conflict(
            "[validation] every is above 0, but the parameters are sharded over processes ([loop] fsdp)",
            "leave [validation] out, and score the result with blip2edge eval",
        )
    for phase in (config.stage1, config.stage2, config.instruct):
        if phase.unfreeze_vision and loop.cache_features:
            yield Conflict(
                f"[{phase.section}] unfreeze_vision does not work with [loop] cache_features: the features of a picture"
                " change in every step",
                "set cache_features to false, or unfreeze_vision to false",
            )
    if loop.ema_weights != "everywhere" and not loop.ema_decay:
        yield Conflict(
            f"[loop] ema_weights = {loop.ema_weights!r}, but ema_decay is 0: there are no averaged weights",
            "set ema_decay, for example to 0.999, or leave ema_weights out",
        )
    elif loop.ema_weights != "everywhere" and validation.every and validation.keep_best:
        yield Conflict(
            f"[loop] ema_weights = {loop.ema_weights!r} does not work with keep_best in [validation]: the phase ends"
            " with the weights that were scored best",
            "set [validation] keep_best to false, or leave ema_weights out",
        )
