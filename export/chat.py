"""Derives the prompt template, and the texts of a conversation's messages, from a checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blip2edge.errors import CheckpointError, one_line
from blip2edge.runtime.text.prompt import Dialog

FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Files in which a checkpoint may hold a chat template."""

Turn = tuple[str, str]
"""A message: its kind, one of ``system``, ``picture``, ``user`` and ``assistant``, and its text."""

Render = Callable[[Sequence[Turn], bool], str]
"""Renders messages; the second argument is whether an answer is begun after them."""

TRIALS: tuple[tuple[Turn, ...], ...] = (
    (("user", "b"), ("assistant", "c"), ("picture", "d")),
    (("picture", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e"), ("user", "f")),
)
"""Conversations with which the texts of messages are checked, with and without a system message."""


def chat_format(directory: Path, image_token: str, otherwise: str) -> tuple[str, dict[str, str]]:
    """Renders a checkpoint's chat template, with placeholders for picture and prompt.

    Args:
        directory: The checkpoint.
        image_token: The placeholder of a picture in the chat template.
        otherwise: The family's template, for a checkpoint without a chat template, or with one for text only.

    Returns:
        Text with one ``{image}`` and one ``{prompt}``, without the BOS that the tokenizer adds; and
        ``PromptSpec.turns``.

    Raises:
        CheckpointError: The chat template cannot be rendered.
    """
    if not any(_mentions_template(directory / name) for name in FILES):
        return otherwise, {}
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(directory)  # type: ignore[no-untyped-call]  # transformers has none
        render = _renderer(processor, image_token)
        text = render([("picture", "{prompt}")], True)
    except Exception as error:  # jinja2 and transformers raise a dozen kinds
        raise CheckpointError(
            f"the chat template of {directory} could not be rendered ({one_line(error)})",
            "save the processor again, or remove its chat template",
        ) from error
    if not _holds(text, image=1, prompt=1):
        return otherwise, {}
    return text, conversation_texts(render)


def _renderer(processor: Any, image_token: str) -> Render:
    adds_bos = processor.tokenizer("")["input_ids"][:1] == [processor.tokenizer.bos_token_id]
    bos = (processor.tokenizer.bos_token or "") if adds_bos else ""

    def render(turns: Sequence[Turn], begin: bool) -> str:
        messages = []
        for kind, text in turns:
            picture = [{"type": "image"}] if kind == "picture" else []
            role = "user" if kind == "picture" else kind
            messages.append({"role": role, "content": [*picture, {"type": "text", "text": text}]})
        text = str(processor.apply_chat_template(messages, add_generation_prompt=begin, tokenize=False))
        return text.removeprefix(bos).replace(image_token, "{image}")

    return render


def conversation_texts(render: Render) -> dict[str, str]:
    """The text of each kind of message, by rendering conversations that grow by one message.

    Args:
        render: The chat template.

    Returns:
        ``PromptSpec.turns``: empty where the chat template takes no earlier messages, or writes a message differently
        depending on the others; without ``system`` where it has no such place.
    """
    turns = _attempt(lambda: _exchanges(render))
    if not turns:
        return {}
    return _attempt(lambda: _with_system(render, turns)) or turns


def _attempt(make: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What a function returns; empty where the chat template refuses a message, as jinja2 raises a dozen kinds."""
    try:
        return make()
    except Exception:  # noqa: BLE001 - see above
        return {}


def _exchanges(render: Render) -> dict[str, str]:
    """The texts without a system message; empty where they do not fit."""
    picture, user, assistant = (("picture", "{prompt}"), ("user", "{prompt}"), ("assistant", "{prompt}"))

    def added(before: list[Turn], message: Turn) -> str:
        return render([*before, message], False).removeprefix(render(before, False))

    alone = render([picture], False)
    turns = {
        "picture": added([user, assistant], picture),
        "user": added([picture, assistant], user),
        "assistant": added([picture], assistant),
        "start": render([picture], True).removeprefix(alone),
    }
    turns["head"] = alone.removesuffix(turns["picture"])
    return turns if _fits(turns, render, TRIALS) else {}


def _with_system(render: Render, turns: dict[str, str]) -> dict[str, str]:
    """The texts with a system message; empty where they do not fit."""
    whole = render([("system", "{prompt}"), ("picture", "{prompt}")], False)
    more = turns | {"system": whole.removesuffix(turns["picture"])}
    return more if _fits(more, render, [(("system", "a"), *trial) for trial in TRIALS]) else {}


def _fits(turns: dict[str, str], render: Render, trials: Sequence[tuple[Turn, ...]]) -> bool:
    """Whether the texts, put one behind the other, are what the chat template renders."""
    whole = all(
        _holds(text, image=int(kind == "picture"), prompt=int(kind not in ("head", "start")))
        for kind, text in turns.items()
    )
    return whole and all("{image}".join(Dialog(trial).parts(turns)) == render(trial, True) for trial in trials)


def _holds(text: str, *, image: int, prompt: int) -> bool:
    return text.count("{image}") == image and text.count("{prompt}") == prompt


def _mentions_template(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".jinja" or "chat_template" in path.read_text(encoding="utf-8"))
