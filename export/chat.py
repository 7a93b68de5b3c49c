"""Derives templates from a checkpoint's chat template: one for a prompt, and one for each message of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2edge.errors import CheckpointError, one_line
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.runtime.text.prompt import Dialog

FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Files in which a checkpoint may hold a chat template, besides those of :data:`NAMED_TEMPLATES`."""

NAMED_TEMPLATES = "additional_chat_templates/*.jinja"

Turn = tuple[str, str]
"""A message: its kind, one of ``system``, ``picture``, ``user`` and ``assistant``, and its text."""

Render = Callable[[Sequence[Turn], bool], str]
"""A function that renders messages with the chat template.

The second argument is transformers' ``add_generation_prompt``: whether the beginning of an answer follows the messages.
"""

TRIALS: tuple[tuple[Turn, ...], ...] = (
    (("user", "b"), ("assistant", "c"), ("picture", "d")),
    (("picture", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e"), ("user", "f")),
)
"""Test conversations.

The templates of the messages, which :func:`conversation_texts` finds, are joined for each of them. The result must be
the text that the checkpoint's chat template gives.
"""


@dataclass(frozen=True)
class ChatFormat:
    """Describes how the prompt of a bundle is built.

    Attributes:
        template: Text with one ``{image}`` and one ``{prompt}``.
        turns: The template of each kind of message, for ``PromptSpec.turns``; empty for a bundle without conversations.
        framed: Whether the tokenizer adds its special tokens. If not, the template has them.
        warnings: Parts of the checkpoint's chat template that the bundle does not follow.
    """

    template: str
    turns: dict[str, str] = field(default_factory=dict)
    framed: bool = True
    warnings: tuple[str, ...] = ()


def template_file(directory: Path) -> Path | None:
    """Returns the first file of a checkpoint that holds a chat template; None if no file holds one."""
    paths = [*(directory / name for name in FILES), *sorted(directory.glob(NAMED_TEMPLATES))]
    return next((path for path in paths if _holds_template(path)), None)


def unused_template(directory: Path, reason: str) -> tuple[str, ...]:
    """Returns a warning that a checkpoint's chat template is not used; empty if there is no chat template."""
    path = template_file(directory)
    return (f"{path}: the chat template is not used: {reason}",) if path else ()


def chat_format(directory: Path, image_token: str, otherwise: str) -> ChatFormat:
    """Renders a checkpoint's chat template, with placeholders for picture and prompt.

    Args:
        directory: The checkpoint.
        image_token: The placeholder of a picture in the chat template.
        otherwise: The family's prompt template. It is used if the checkpoint has no chat template, or if its chat
            template has no place for a picture or is not loaded by transformers' processor.

    Raises:
        CheckpointError: The chat template cannot be rendered, or changes the text of a message.
    """
    path = template_file(directory)
    if path is None:
        return ChatFormat(otherwise)
    from transformers import AutoProcessor

    prompts = f"prompts have the form {otherwise!r}"
    try:
        processor: Any = AutoProcessor.from_pretrained(directory)
        if processor.chat_template is None:
            reason = f"transformers' processor does not read it from there; {prompts}"
            return ChatFormat(otherwise, warnings=unused_template(directory, reason))
        render = _renderer(processor, image_token)
        text = render([("picture", "{prompt}")], True)
        spaced = render([("picture", _SPACED)], True)
    except Exception as error:  # jinja2 and transformers raise a dozen kinds
        raise CheckpointError(
            f"the chat template of {directory} could not be rendered ({one_line(error)})",
            "save the processor again, or remove its chat template",
        ) from error
    if text.count("{image}") != 1:
        reason = f"it has no place for one picture; {prompts}"
        return ChatFormat(otherwise, warnings=unused_template(directory, reason))
    if text.count("{prompt}") != 1:
        raise CheckpointError(
            f"{path}: the chat template changes the text of a message: expected one {{prompt}} in {text!r}",
            "write the text as it is, {{ part['text'] }}",
        )
    warnings = []
    if spaced != text.replace("{prompt}", _SPACED):
        warnings.append(f"{path}: the chat template removes spaces around a text; the bundle keeps them")
    if "strftime_now" in str(processor.chat_template):
        warnings.append(f"{path}: the chat template writes the date; the bundle keeps the date of this export")
    bos = _written_bos(processor, text)
    if bos and _same_with_added_bos(processor.tokenizer, text, bos):
        render, text, bos = _without(render, bos), text.removeprefix(bos), ""
    return ChatFormat(text, conversation_texts(render), not bos, tuple(warnings))


_SPACED = " a \n"


def _written_bos(processor: Any, text: str) -> str:
    """Returns the BOS token that begins a rendered text; empty if the text does not begin with BOS.

    transformers adds no special tokens to a text that begins with BOS.
    """
    bos = processor.tokenizer.bos_token or ""
    return bos if text.startswith(bos) else ""


def _same_with_added_bos(tokenizer: Any, text: str, bos: str) -> bool:
    """Compares two ways to get the token ids of a text that begins with BOS.

    Returns True if the ids of the whole text, to which the tokenizer adds no special tokens, equal the ids of the text
    without BOS, to which the tokenizer adds its special tokens.
    """
    filled = text.replace("{prompt}", "a photo").replace("{image}", " ")
    written = tokenizer(filled, add_special_tokens=False)["input_ids"]
    return bool(written == tokenizer(filled.removeprefix(bos))["input_ids"])


def _without(render: Render, bos: str) -> Render:
    return lambda turns, begin: render(turns, begin).removeprefix(bos)


def _renderer(processor: Any, image_token: str) -> Render:
    def render(turns: Sequence[Turn], begin: bool) -> str:
        messages = []
        for kind, text in turns:
            picture = [{"type": "image"}] if kind == "picture" else []
            role = "user" if kind == "picture" else kind
            messages.append({"role": role, "content": [*picture, {"type": "text", "text": text}]})
        text = str(processor.apply_chat_template(messages, add_generation_prompt=begin, tokenize=False))
        return text.replace(image_token, "{image}")

    return render


def conversation_texts(render: Render) -> dict[str, str]:
    """Finds the template of each kind of message, by rendering conversations with and without the message.

    Args:
        render: Renders a conversation with the chat template.

    Returns:
        The value of ``PromptSpec.turns``. It is empty if the chat template accepts no earlier messages, or if the text
        of a message depends on other messages. It has no key ``system`` if the chat template has no system message.
    """
    turns = _attempt(lambda: _exchanges(render))
    if not turns:
        return {}
    return _attempt(lambda: _with_system(render, turns)) or turns


def _attempt(make: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Calls ``make``; returns an empty dict if the chat template refuses a message, which raises an error."""
    try:
        return make()
    except Exception:  # noqa: BLE001 - see above
        return {}


def _exchanges(render: Render) -> dict[str, str]:
    """Returns the template of each kind of message except ``system``, by the kind.

    The result is empty if the joined templates give another text for a test conversation (:data:`TRIALS`) than the
    chat template.
    """
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
    """Returns ``turns`` and the template of a system message.

    The result is empty if the joined templates give another text for a test conversation with a system message than
    the chat template.
    """
    whole = render([("system", "{prompt}"), ("picture", "{prompt}")], False)
    more = turns | {"system": whole.removesuffix(turns["picture"])}
    return more if _fits(more, render, [(("system", "a"), *trial) for trial in TRIALS]) else {}


def _fits(turns: dict[str, str], render: Render, trials: Sequence[tuple[Turn, ...]]) -> bool:
    """Returns whether the joined templates ``turns`` give the same text as ``render`` for each conversation."""
    whole = all(
        _holds(text, image=int(kind == "picture"), prompt=int(kind not in ("head", "start")))
        for kind, text in turns.items()
    )
    return whole and all("{image}".join(Dialog(trial).parts(turns)) == render(trial, True) for trial in trials)


def _holds(text: str, *, image: int, prompt: int) -> bool:
    return text.count("{image}") == image and text.count("{prompt}") == prompt


def _holds_template(path: Path) -> bool:
    if path.suffix == ".jinja":
        return path.is_file()
    return path.is_file() and bool(read_checkpoint_json(path).get("chat_template"))
