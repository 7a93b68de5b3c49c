"""Tied tensors: one parameter under several names, of which a file holds one or all."""

from __future__ import annotations

from collections.abc import Container, Sequence

Tie = tuple[str, str]
"""A name and the name of the parameter that it is tied to, as in transformers' ``_tied_weights_keys``."""


def stored_names(ties: Sequence[Tie], stored: Container[str]) -> dict[str, str]:
    """The stored tensor of each tied name that a file lacks.

    As transformers 5 does it (``PreTrainedModel.tie_weights``): a tie works in both directions, and of several names
    that are tied to a missing one, the first in ``ties`` that is stored replaces it.

    Args:
        ties: In transformers' order; all ties of a parameter have the same second name.
        stored: Names in the file.

    Returns:
        Missing names and the stored names that replace them. A name without any stored one is not in it.
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
