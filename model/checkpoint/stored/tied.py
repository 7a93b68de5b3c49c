"""Tied tensors of a checkpoint's files: which are one, and which differ by value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from blip2edge.errors import CheckpointError
from blip2edge.model.checkpoint.stored.tensors import TensorFiles
from blip2edge.model.weights.rules import WeightMap
from blip2edge.model.weights.ties import Tie, stored_names


def add_tied_names(files: TensorFiles, ties: Sequence[Tie]) -> None:
    """Adds the tied names that the files lack, as other names of the tensors that they hold."""
    for name, stored in stored_names(ties, files.shapes).items():
        files.alias(name, stored)


def all_equal(files: TensorFiles, pairs: Iterable[Tie]) -> bool:
    """Whether the two tensors of each pair have the same values. A tensor that is missing differs from none."""
    return all(files.equal(*pair) for pair in pairs if files.shapes.keys() >= set(pair))


def repeated_names(files: TensorFiles, ties: Sequence[Tie], used: Collection[str], names: WeightMap) -> set[str]:
    """Tied names that no parameter reads, since they repeat a tensor that one reads.

    Args:
        files: The tensors.
        ties: The tied names.
        used: The names that parameters read.
        names: Says which tensors may be left out.

    Raises:
        CheckpointError: Such a tensor has other values. The model has no place for both.
    """
    found = set()
    for target, source in ties:
        if target in used or target not in files.shapes or names.is_left_out(target):
            continue
        if not all_equal(files, [(target, source)]):
            raise CheckpointError(
                f"{target} differs from {source}, but a bundle has one token table for both",
                "export a checkpoint in which the two are equal: train with tied tables, or freeze both",
            )
        found.add(target)
    return found
