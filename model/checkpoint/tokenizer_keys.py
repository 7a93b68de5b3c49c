"""Finds the keys of a tokenizer's files that neither this project nor transformers uses, and names them in warnings.

transformers stores every key of a ``tokenizer_config.json``, even an unknown one, so what it stores does not show which
keys it uses. This module counts a key as used if it is in :data:`~blip2edge.model.checkpoint.side_keys.TOKENIZER`, an
argument of the tokenizer's class, or an attribute that the class sets.

Some keys count as used only if the loaded tokenizer has their value: the keys for special tokens, the ids of added
tokens, and the flags ``add_bos_token``, ``add_eos_token`` and ``do_lower_case``. The reason is that transformers
ignores some of them: it ignores ``special_tokens_map.json`` and ``added_tokens.json`` if ``tokenizer_config.json`` has
``added_tokens_decoder``, and it ignores ``add_bos_token`` if there is a ``tokenizer.json``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from blip2edge.model.checkpoint.side_keys import TOKENIZER, unread_warning
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json

CONFIG_FILE, MAP_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def check_tokenizer_keys(directory: Path, tokenizer: Any) -> list[str]:
    """Compares the files of a tokenizer with the tokenizer that transformers made of them.

    Args:
        directory: The directory with the files.
        tokenizer: transformers' tokenizer, with a ``backend_tokenizer``.

    Returns:
        Warnings: one for each file with keys that have no effect.
    """
    config, token_map, added = (_read(directory / name) for name in (CONFIG_FILE, MAP_FILE, ADDED_FILE))
    known = _known_keys(tokenizer)
    in_map = () if "added_tokens_decoder" in config else known
    warnings = []
    for name, values, read in ((CONFIG_FILE, config, known), (MAP_FILE, token_map, in_map)):
        unread = [key for key, value in values.items() if value is not None and not _used(tokenizer, key, value, read)]
        warnings += unread_warning(str(directory / name), unread)
    ids = tokenizer.get_vocab()
    wrong = [token for token, index in added.items() if ids.get(token) != index]
    return warnings + unread_warning(str(directory / ADDED_FILE), wrong)


def _read(path: Path) -> dict[str, Any]:
    return read_checkpoint_json(path) if path.is_file() else {}


def _known_keys(tokenizer: Any) -> set[str]:
    """Returns the keys of ``tokenizer_config.json`` that this project or transformers reads, for any value of a key."""
    readers = [vars(kind)["__init__"] for kind in type(tokenizer).__mro__ if "__init__" in vars(kind)]
    arguments = {name for reader in readers for name in inspect.signature(reader).parameters}
    return {*TOKENIZER.honoured, *TOKENIZER.neutral, *vars(tokenizer), *arguments} - {"self", "args", "kwargs"}


def _used(tokenizer: Any, key: str, value: Any, known: Collection[str]) -> bool:
    """Returns whether a key of a file has an effect.

    A key for a token or for a behaviour of the tokenizer has an effect if the tokenizer has its value. Any other key
    has an effect if it is in ``known``.
    """
    compare = _STATES.get(key)
    if compare is not None:
        return compare(tokenizer) == value
    text = _text(value)
    if key.endswith("_token") and text is not None:
        return _text(getattr(tokenizer, key, None)) == text
    if key in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, (list, Mapping)):
        tokens = value.values() if isinstance(value, Mapping) else value
        return all(_text(token) in tokenizer.all_special_tokens for token in tokens)
    return key in known


def _text(token: Any) -> str | None:
    """Returns the text of a token, which a file stores as a string or as an object; None for any other value."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return str(token) if isinstance(token, str) or hasattr(token, "content") else None


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _adds_eos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id


def _lowers(tokenizer: Any) -> bool:
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("A").strip() == "a"


_STATES: Mapping[str, Callable[[Any], bool]] = {
    "add_bos_token": _adds_bos,
    "add_eos_token": _adds_eos,
    "do_lower_case": _lowers,
}
"""For each key that is compared with the loaded tokenizer: a function that returns the tokenizer's value of the key."""
