"""Checks of the arguments that :class:`Captioner` and :class:`Matcher` share: lists of pictures, and texts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from PIL import Image

from blip2edge.errors import UsageError, option
from blip2edge.runtime.decoding.options import shown

Item = TypeVar("Item")


def listed(name: str, values: Iterable[Item]) -> list[Item]:
    """Pictures or texts as a list.

    Args:
        name: The argument's name, for the error.
        values: The value that the user passed.

    Raises:
        UsageError: The value is a single picture or text, or not iterable.
    """
    one = isinstance(values, (str, bytes, os.PathLike, Image.Image)) or not isinstance(values, Iterable)
    if isinstance(values, np.ndarray):  # a batch of pictures is [N, H, W] or [N, H, W, 3]
        one = values.ndim < 3 or (values.ndim == 3 and values.shape[-1] in (1, 3, 4))
    if one:
        what = f"an array {list(values.shape)}" if isinstance(values, np.ndarray) else shown(values)
        raise UsageError(f"expected {option(name)} to be a list, got {what}", "put a single value in a list: [x]")
    return list(values)


def check_text(name: str, value: object) -> None:
    """Checks that a prompt, a question or a text is a str.

    Raises:
        UsageError: It is something else.
    """
    if not isinstance(value, str):
        raise UsageError(f"expected {option(name)} to be a text, got {shown(value)}")
