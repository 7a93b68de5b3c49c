"""Checks of what users pass to ``Captioner`` and ``Matcher``: each error says what was expected and what to write."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from PIL import Image

from blip2edge.bundle.manifest import Bundle
from blip2edge.errors import UsageError, option
from blip2edge.runtime.decoding.options import shown

Item = TypeVar("Item")


def check_bundle(bundle: object, loader: str) -> None:
    """Checks that a bundle is an opened one.

    Args:
        bundle: What the user passed.
        loader: The class whose ``load`` opens a directory.

    Raises:
        UsageError: It is a path, or something else.
    """
    if not isinstance(bundle, Bundle):
        raise UsageError(
            f"expected {option('bundle')} to be an opened Bundle, got {shown(bundle)}",
            f"load a directory with {loader}.load({shown(bundle)})"
            if isinstance(bundle, (str, os.PathLike))
            else f"load a directory with {loader}.load(directory)",
        )


def listed(name: str, values: Iterable[Item]) -> list[Item]:
    """Several pictures or texts as a list.

    Args:
        name: The argument's name.
        values: What the user passed.

    Raises:
        UsageError: It is one picture or one text.
    """
    one = isinstance(values, (str, bytes, os.PathLike, Image.Image)) or not isinstance(values, Iterable)
    if isinstance(values, np.ndarray):  # a batch of pictures is [N, H, W] or [N, H, W, 3]
        one = values.ndim < 3 or (values.ndim == 3 and values.shape[-1] in (1, 3, 4))
    if one:
        what = f"an array {list(values.shape)}" if isinstance(values, np.ndarray) else shown(values)
        raise UsageError(
            f"expected {option(name)} to be a list, got {what}", "put a single one in a list: [x]"
        )
    return list(values)


def check_text(name: str, value: object) -> None:
    """Checks that a prompt, a question or a text is a str.

    Raises:
        UsageError: It is something else.
    """
    if not isinstance(value, str):
        raise UsageError(f"expected {option(name)} to be a text, got {shown(value)}")


def check_open(closed: bool, loader: str) -> None:
    """Checks that a ``Captioner`` or ``Matcher`` is not closed.

    Raises:
        UsageError: It is closed.
    """
    if closed:
        raise UsageError(f"this {loader} is closed", f"load the bundle again with {loader}.load")
