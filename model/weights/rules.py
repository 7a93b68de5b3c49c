"""Maps parameter names of this project's models to a checkpoint's tensors, by tables of rules.

A :class:`Rule` renames a module path. ``*`` matches one path component (a layer's number). Of the rules that
match, the longest is used; the rest of the name is kept. A rule may name several tensors of the checkpoint, if they are
one matrix in this project's model: they are stacked along dimension 0. They have equal numbers of rows unless ``rows``
gives the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2edge.errors import CheckpointError, some

BUFFERS = (
    r"(.*\.)?position_ids",
    r"(.*\.)?embeddings\.token_type_ids",
    r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)",
    r"(.*\.)?masked_bias",
    r"(.*\.)?causal_mask",
    r"(.*\.)?num_batches_tracked",
)
"""Buffers that some versions of transformers and LAVIS store (regular expressions); this project computes them."""


@dataclass(frozen=True)
class Rule:
    """Maps a module path in this project's model to the path (or paths) of its tensors in a checkpoint.

    Attributes:
        ours: Path in this project's model; ``*`` matches any one component.
        theirs: Path in the checkpoint; if several, their tensors are stacked along the first axis into one parameter.
        rows: If `theirs` has several paths, the number of rows of each tensor, in this order; empty if all tensors have
            the same number.
    """

    ours: str
    theirs: str | tuple[str, ...]
    rows: tuple[int, ...] = ()

    def sources(self) -> tuple[str, ...]:
        """Returns the paths in the checkpoint (one or several) as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def under(ours: str, theirs: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Adds a prefix to each path of the rules: ``ours`` to model paths, ``theirs`` to checkpoint paths."""
    return tuple(Rule(ours + rule.ours, tuple(theirs + path for path in rule.sources()), rule.rows) for rule in rules)


class WeightMap:
    """Finds the tensors of a checkpoint that a parameter of this project's model is read from.

    Args:
        rules: How parameter names translate to tensor names; rules with longer paths are tried first.
        left_out: Regular expressions for names of checkpoint tensors that the model does not use, besides
            :data:`BUFFERS`.
    """

    def __init__(self, rules: Sequence[Rule], left_out: Sequence[str] = ()) -> None:
        ordered = sorted(rules, key=lambda rule: len(rule.ours.split(".")), reverse=True)
        self._rules = [(_compile(rule.ours), rule.sources(), rule.rows) for rule in ordered]
        self._left_out = [re.compile(pattern) for pattern in (*left_out, *BUFFERS)]

    def sources(self, ours: str) -> tuple[str, ...]:
        """Returns the names of the checkpoint tensors that are stacked into the model's parameter ``ours``.

        Raises:
            KeyError: No rule matches the parameter: an error in the rules, not in the checkpoint.
        """
        match, paths, _ = self._rule(ours)
        rest = ours[match.end() :]
        return tuple(_fill(path, match.groups()) + rest for path in paths)

    def split(self, ours: str, tensor: Tensor) -> dict[str, Tensor]:
        """Splits the model's parameter ``ours`` into the tensors of the checkpoint; returns them by name."""
        names = self.sources(ours)
        if len(names) == 1:
            return {names[0]: tensor}
        rows = list(self.rows(ours))
        parts = torch.split(tensor, rows) if rows else tensor.chunk(len(names))
        return dict(zip(names, parts, strict=True))

    def rows(self, ours: str) -> tuple[int, ...]:
        """Returns the number of rows of each checkpoint tensor that is stacked into the parameter ``ours``.

        The result is empty if all these tensors have the same number of rows.
        """
        return self._rule(ours)[2]

    def _rule(self, ours: str) -> tuple[re.Match[str], tuple[str, ...], tuple[int, ...]]:
        for pattern, paths, rows in self._rules:
            match = pattern.match(ours)
            if match:
                return match, paths, rows
        raise KeyError(f"no rule of the weight map covers {ours}")

    def is_left_out(self, theirs: str) -> bool:
        """Whether the model does not use the checkpoint tensor ``theirs``."""
        return any(pattern.fullmatch(theirs) for pattern in self._left_out)

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        found: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Checks that a checkpoint has all tensors of the model in the right shapes. No weight is read.

        Args:
            expected: Shapes of the model's parameters, by name.
            found: Shapes of the checkpoint's tensors, by name.

        Raises:
            CheckpointError: Tensors are missing or unknown, or have a wrong shape; the message names the first few.
        """
        wanted = {ours: self.sources(ours) for ours in expected}
        used = {name for names in wanted.values() for name in names}
        missing = sorted(used - found.keys())
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {some(missing)}",
                "save it whole with transformers' save_pretrained, or merge it with the frozen parts first",
            )
        unknown = sorted(name for name in found.keys() - used if not self.is_left_out(name))
        if unknown:
            raise CheckpointError(
                f"the checkpoint holds tensors that its config does not describe: {some(unknown)}",
                "check that config.json belongs to these weights",
            )
        for ours, names in wanted.items():
            shapes = [found[name] for name in names]
            stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
            if stacked != expected[ours]:
                raise CheckpointError(
                    f"{names[0]} has shape {list(stacked)}, but config.json requires {list(expected[ours])}",
                    "check that config.json belongs to these weights",
                )


def _compile(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\*", r"([^.]+)") + r"(?=\.|$)")


def _fill(path: str, groups: Sequence[str]) -> str:
    parts = iter(groups)
    return re.sub(r"\*", lambda _: next(parts), path)
