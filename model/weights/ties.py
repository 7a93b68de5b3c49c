"""Tied tensors: one parameter has several names, and a file stores it under one of them or under all."""

from __future__ import annotations

from collections.abc import Container, Sequence

Tie = tuple[str, str]
"""The names of two tied parameters, as in transformers' ``_tied_weights_keys``: the first is tied to the second."""


def stored_names(ties: Sequence[Tie], stored: Container[str]) -> dict[str, str]:
    """Finds the stored tensor for each tied name that a file lacks.

    The rule is that of transformers 5 (``PreTrainedModel.tie_weights``): a tie works in both directions. If several
    stored names are tied to a missing name, the first of them in ``ties`` replaces it.

    Args:
        ties: Pairs of tied names in transformers' order; all ties of a parameter have the same second name.
        stored: Names in the file.

    Returns:
        The stored name that replaces each missing name. A missing name is left out if no name tied to it is stored.
    """
    found: dict[str, str] = {}

    def origin(name: str) -> str | None:
        return name if name in stored else found.get(name)

    for index, (target, source) in enumerate(ties):
        first, second = origin(target), origin(source)
        if first is None and second is None:
            later = (origin(name) for name, other in ties[index + 1 :] if other == source)
            second = next((name for name in later if name is not None), None)
            if second is not None:
                found[target] = second
        elif first is None and second is not None:
            found[target] = second
        elif second is None and first is not None:
            found[source] = first
    return found
