"""Handles tied tensors of a checkpoint: adds missing names, and compares the values of stored tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from blip2edge.errors import CheckpointError
from blip2edge.model.checkpoint.stored.tensors import TensorFiles
from blip2edge.model.weights.rules import WeightMap
from blip2edge.model.weights.ties import Tie, stored_names


def add_tied_names(files: TensorFiles, ties: Sequence[Tie]) -> None:
    """Adds each tied name that the files lack: it becomes another name of the stored tensor that it is tied to."""
    for name, stored in stored_names(ties, files.shapes).items():
        files.alias(name, stored)


def all_equal(files: TensorFiles, pairs: Iterable[Tie]) -> bool:
    """Returns whether the two tensors of each pair have the same values; a pair with a missing tensor is skipped."""
    return all(files.equal(*pair) for pair in pairs if files.shapes.keys() >= set(pair))


def repeated_names(files: TensorFiles, ties: Sequence[Tie], used: Collection[str], names: WeightMap) -> set[str]:
    """Returns the names of stored tensors that are not used, because they repeat a tensor that they are tied to.

    Args:
        files: The checkpoint's tensors.
        ties: Pairs of tied names.
        used: Names of the tensors that the model's parameters are read from.
        names: The weight map; the tensors that it leaves out are not in the result.

    Raises:
        CheckpointError: An unused tensor has other values than the tensor that it is tied to.
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
