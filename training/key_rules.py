"""Tables of the recipe's keys that have an effect only together with other keys. A key without effect is refused.

A key counts as set if the recipe has it, also with the value of its default. A key that switches others off, such as
`every = 0`, may be written with the keys that it switches: then they are off on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blip2edge.training.data.config import DATA_KINDS, MIXTURE, DataConfig
from blip2edge.training.fields import table_title

Recipe = Any
"""A ``TrainingConfig``; not imported, because ``config.py`` imports this module."""

QFORMER_BRIDGES = ("qformer", "projection")
_FILES = tuple(kind for kind in DATA_KINDS if kind not in ("scenes", MIXTURE))
_STREAMED = ("shards", "parquet")

KINDS_OF_KEY: Mapping[str, tuple[str, ...]] = {
    "path": _FILES,
    "images": ("coco-captions", "coco-vqa", "karpathy", "table", "parquet"),
    "annotations": ("coco-vqa",),
    "splits": ("karpathy",),
    "image_column": ("table", "parquet"),
    "text_column": ("table", "parquet"),
    "question": ("coco-vqa", "table", "shards", "parquet"),
    "more_questions": ("coco-vqa", "table", "shards", "parquet"),
    "max_broken": _FILES,
    "shuffle_buffer": _STREAMED,
    "copies_gib": _STREAMED,
    "count": ("scenes",),
    "series": ("scenes",),
    "prompts": tuple(kind for kind in DATA_KINDS if kind != "coco-vqa"),
    "prompt_share": tuple(kind for kind in DATA_KINDS if kind != "coco-vqa"),
}
"""The kinds of data whose reader uses a key of `[data]`; other keys are for all kinds."""

BRIDGE_SIZES: Mapping[str, tuple[str, ...]] = {
    "qformer": ("hidden_size", "intermediate_size", "num_layers", "num_heads"),
    "projection": ("hidden_size", "intermediate_size", "num_layers", "num_heads"),
    "mlp": (),
    "perceiver": ("hidden_size", "num_layers", "num_heads"),
    "pool": ("hidden_size", "num_heads"),
    "flamingo": ("hidden_size", "num_layers", "num_heads"),
}
"""By the value of the key `bridge`: the keys of `[model.qformer]` that set the sizes of a new bridge."""


@dataclass(frozen=True)
class KeyRule:
    """Keys of one section that have an effect only under a condition.

    Attributes:
        keys: The keys; empty for all keys of the section except those in `but`.
        works: Function of the recipe and the section that returns whether the keys have an effect.
        reason: Why the keys have no effect, for the error.
        fix: What to change so that the keys have an effect, for the error.
        switches: Keys that turn the others on or off; the rule is not applied if one of them is written.
        but: Keys to which the rule does not apply.
    """

    keys: tuple[str, ...]
    works: Callable[[Recipe, Any], bool]
    reason: str
    fix: str
    switches: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def without_effect(self, config: Recipe, section: Any) -> list[str]:
        """Returns the written keys of a section that have no effect, in the order of the section's fields."""
        given = section.written
        if self.works(config, section) or any(key in given for key in self.switches):
            return []
        wanted = self.keys or tuple(key for key in section.key_names() if key not in self.but)
        return [key for key in wanted if key in given]


def _vision_trained(_: Recipe, section: Any) -> bool:
    return bool(section.unfreeze_vision)


_LAYER_DECAY = KeyRule(
    ("layer_decay",), _vision_trained, "the picture encoder is frozen", "set unfreeze_vision", ("unfreeze_vision",)
)
_GENERATIVE = (
    _LAYER_DECAY,
    KeyRule(
        ("lora_alpha", "lora_targets"),
        lambda _, phase: phase.lora_rank > 0,
        "lora_rank is 0, so there is no LoRA",
        "set lora_rank, for example to 8",
        ("lora_rank",),
    ),
    KeyRule(("elastic_min",), lambda _, phase: phase.elastic, "elastic is false", "set elastic", ("elastic",)),
)
_MINIATURE_ONLY = KeyRule(
    (),
    lambda config, _: config.model.is_miniature,
    "only the miniature is pretrained, and [model] names trained parts",
    "leave checkpoint, vision_from and language_from out of [model]",
)

RULES: Mapping[str, tuple[KeyRule, ...]] = {
    "loop": (
        KeyRule(
            ("ema_weights",),
            lambda _, loop: loop.ema_decay > 0,
            "ema_decay is 0, so there are no averaged weights",
            "set ema_decay, for example to 0.999",
            ("ema_decay",),
        ),
        KeyRule(
            ("features_dtype",),
            lambda _, loop: loop.cache_features,
            "cache_features is false",
            "set cache_features",
            ("cache_features",),
        ),
        KeyRule(
            ("encoder_autocast",),
            lambda _, loop: loop.autocast != "float32",
            "autocast is 'float32', in which the encoder runs anyway",
            "set autocast",
            ("autocast",),
        ),
        KeyRule(
            ("tracker_project",),
            lambda _, loop: bool(loop.tracker_names),
            "there are no trackers",
            "set trackers",
            ("trackers", "tensorboard"),
        ),
    ),
    "validation": (
        KeyRule(
            (),
            lambda _, validation: validation.every > 0,
            "every is 0, so nothing is validated",
            "set every to a number of steps",
            ("every",),
        ),
        KeyRule(
            ("ratio", "size", "crop", "flip", "flip_except", "shuffle_buffer"),
            lambda *_: False,
            "validation reads each picture once, in order and unchanged",
            "set it in [data]",
        ),
        KeyRule(
            ("prompts", "prompt_share", "question", "more_questions"),
            lambda *_: False,
            "validation uses the prompt and the question template of the model's family, as eval does",
            "set it in [data]",
        ),
        KeyRule(
            ("count", "series"),
            lambda *_: False,
            "validation always uses the same held-out scenes",
            "set pictures to their number",
        ),
    ),
    "vision": (_MINIATURE_ONLY,),
    "language": (_MINIATURE_ONLY,),
    "stage1": (
        KeyRule(
            (),
            lambda _, phase: phase.steps > 0,
            "steps is 0, so stage 1 does not run",
            "set steps",
            ("steps",),
            ("max_tokens",),
        ),
        KeyRule(
            ("max_tokens",),
            lambda config, phase: phase.steps > 0 or config.bridge in QFORMER_BRIDGES,
            "only a Q-Former has a text side",
            "set bridge to 'qformer'",
        ),
        _LAYER_DECAY,
    ),
    "stage2": _GENERATIVE,
    "instruct": _GENERATIVE,
    "model": (
        KeyRule(
            ("patch_size", "max_positions", "vision", "language"),
            lambda config, model: model.is_miniature,
            "it is a size of the miniature, and [model] names trained parts",
            "leave checkpoint, vision_from and language_from out",
        ),
        KeyRule(
            ("dropout",),
            lambda config, model: not model.is_miniature and config.bridge in QFORMER_BRIDGES,
            "only a new Q-Former has dropout, and not in the miniature, whose data never repeats",
            "set bridge to 'qformer', and name trained parts",
        ),
        KeyRule(
            ("bert", "bridge_from"),
            lambda config, _: config.bridge in QFORMER_BRIDGES,
            "this bridge has no Q-Former",
            "set bridge to 'qformer' or 'projection'",
        ),
        KeyRule(
            ("num_query_tokens", "qformer"),
            lambda config, _: config.bridge != "mlp",
            "bridge = 'mlp' maps every patch of the picture by two layers, whose sizes the other parts decide",
            "set another bridge",
        ),
        KeyRule(
            ("checkpoint",),
            lambda config, model: (
                not (model.vision_from and model.language_from) or config.bridge in QFORMER_BRIDGES
            ),  # it may give the tokenizer of the Q-Former's text side: `setup/checks.py` has the rest of this rule
            "vision_from and language_from name both of its parts",
            "leave one of them out",
        ),
    ),
}
"""The rules of each section, except those for the kinds of data (:data:`KINDS_OF_KEY`)."""


def keys_without_effect(config: Recipe) -> Iterator[tuple[str, str]]:
    """Yields problem and correction for the keys of a recipe that have no effect."""
    for name, rules in RULES.items():
        section = getattr(config, name)
        for rule in rules:
            found = rule.without_effect(config, section)
            if found:
                yield _refusal(name, found, rule.reason, rule.fix)
    for name, data in (("data", config.data), ("validation", config.validation)):
        mixed = len(data.parts) > 1
        for number, part in enumerate(data.parts):
            yield from _unread(name, f"{name}[{number}]" if mixed else name, part, mixed=mixed)
    sizes = config.model.qformer
    unused = [key for key in sizes.key_names() if key in sizes.written and key not in BRIDGE_SIZES[config.bridge]]
    if "qformer" in config.model.written and unused:
        yield _refusal(
            "model.qformer", unused, f"a bridge of the kind {config.bridge!r} has no such size", "set another bridge"
        )


def _unread(name: str, path: str, part: DataConfig, *, mixed: bool) -> Iterator[tuple[str, str]]:
    """Yields problem and correction for keys that the reader of a data set does not use."""
    for key in part.written:
        kinds = KINDS_OF_KEY.get(key, DATA_KINDS)
        if part.kind not in kinds:
            yield _refusal(path, [key], f"the kind {part.kind!r} does not use it", f"set kind to {choice(kinds)}")
    single = [key for key in ("ratio", "size") if key in part.written]
    if single and not mixed:
        yield _refusal(name, single, "it balances a mixture, and there is one data set", f"write several [[{name}]]")
    if mixed and part.ratio and "size" in part.written:
        yield _refusal(path, ["size"], "the ratios decide the shares of the mixture", "leave all ratios out")
    if "flip_except" in part.written and not part.flip and "flip" not in part.written:
        yield _refusal(path, ["flip_except"], "flip is 0, so no picture is mirrored", "set flip")


def choice(names: Sequence[str]) -> str:
    """Returns names as a choice in a sentence: ``a``, ``a or b``, ``a, b or c``."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _refusal(section: str, keys: Sequence[str], reason: str, fix: str) -> tuple[str, str]:
    """Returns problem and correction of the error for keys that the recipe has, but that have no effect."""
    names, several = ", ".join(keys), len(keys) > 1
    return (
        f"{table_title(section)} {names} {'have' if several else 'has'} no effect: {reason}",
        f"{fix}, or leave {names} out",
    )
