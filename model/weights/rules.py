"""Maps the names of our parameters to a checkpoint's tensors, by tables of rules.

A :class:`Rule` renames a module path. ``*`` matches one path component (a layer's number). The longest rule
that matches wins; the rest of the name is kept. A rule may name several tensors of the checkpoint:
they are stacked along dimension 0 (our matrix is fused, theirs are separate), in equal parts unless
``rows`` gives their sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2edge.errors import CheckpointError

BUFFERS = (
    r"(.*\.)?position_ids",
    r"(.*\.)?embeddings\.token_type_ids",
    r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)",
    r"(.*\.)?masked_bias",
    r"(.*\.)?causal_mask",
    r"(.*\.)?num_batches_tracked",
)
"""Buffers that some versions of transformers and LAVIS store, and that are computed here (regular expressions)."""


@dataclass(frozen=True)
class Rule:
    """One of our module paths, and the checkpoint's.

    Attributes:
        ours: A path with ``*`` for any one component.
        theirs: The path in the checkpoint; several are stacked.
        rows: Rows of each of several tensors; empty if they are equal.
    """

    ours: str
    theirs: str | tuple[str, ...]
    rows: tuple[int, ...] = ()

    def sources(self) -> tuple[str, ...]:
        """The checkpoint's paths, one or several."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def under(ours: str, theirs: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same rules below a prefix on either side."""
    return tuple(Rule(ours + rule.ours, tuple(theirs + path for path in rule.sources()), rule.rows) for rule in rules)


class WeightMap:
    """Compiled rules: finds the checkpoint's tensors of a parameter.

    Args:
        rules: How names translate.
        left_out: Regular expressions of a checkpoint's tensors that are not used, besides :data:`BUFFERS`.
    """

    def __init__(self, rules: Sequence[Rule], left_out: Sequence[str] = ()) -> None:
        ordered = sorted(rules, key=lambda rule: len(rule.ours.split(".")), reverse=True)
        self._rules = [(_compile(rule.ours), rule.sources(), rule.rows) for rule in ordered]
        self._left_out = [re.compile(pattern) for pattern in (*left_out, *BUFFERS)]

    def sources(self, ours: str) -> tuple[str, ...]:
        """The tensors of the checkpoint that make up our parameter ``ours``.

        Raises:
            KeyError: No rule covers it: an error in a table, not in the checkpoint.
        """
        match, paths, _ = self._rule(ours)
        rest = ours[match.end() :]
        return tuple(_fill(path, match.groups()) + rest for path in paths)

    def split(self, ours: str, tensor: Tensor) -> dict[str, Tensor]:
        """The inverse of stacking: our parameter as the tensors of the checkpoint, by name."""
        names = self.sources(ours)
        if len(names) == 1:
            return {names[0]: tensor}
        rows = list(self.rows(ours))
        parts = torch.split(tensor, rows) if rows else tensor.chunk(len(names))
        return dict(zip(names, parts, strict=True))

    def rows(self, ours: str) -> tuple[int, ...]:
        """Rows of each source of ``ours``; empty if they are equal."""
        return self._rule(ours)[2]

    def _rule(self, ours: str) -> tuple[re.Match[str], tuple[str, ...], tuple[int, ...]]:
        for pattern, paths, rows in self._rules:
            match = pattern.match(ours)
            if match:
                return match, paths, rows
        raise KeyError(f"no rule of the weight map covers {ours}")

    def is_left_out(self, theirs: str) -> bool:
        """Whether a tensor of the checkpoint is not used."""
        return any(pattern.fullmatch(theirs) for pattern in self._left_out)

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        found: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Compares names and shapes. No weight is read.

        Args:
            expected: Our parameters and their shapes.
            found: The checkpoint's tensors and their shapes.

        Raises:
            CheckpointError: Tensors are missing, unknown or misshapen; the first few are named.
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


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
