"""Derives the prompt template from a checkpoint's chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blip2edge.errors import CheckpointError, one_line

FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Files in which a checkpoint may hold a chat template."""

TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "{prompt}"}]}]
"""A conversation with one question about one picture."""


def prompt_template(directory: Path, image_token: str, otherwise: str) -> str:
    """Renders a checkpoint's chat template once, with placeholders for picture and prompt.

    Args:
        directory: The checkpoint.
        image_token: The placeholder of a picture in the chat template.
        otherwise: The family's template, for a checkpoint without a chat template, or with one for text only.

    Returns:
        Text with one ``{image}`` and one ``{prompt}``, without the BOS that the tokenizer adds.

    Raises:
        CheckpointError: The chat template cannot be rendered.
    """
    if not any(_mentions_template(directory / name) for name in FILES):
        return otherwise
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(directory)  # type: ignore[no-untyped-call]  # transformers has none
        text = str(processor.apply_chat_template(TURN, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # jinja2 and transformers raise a dozen kinds
        raise CheckpointError(
            f"the chat template of {directory} could not be rendered ({one_line(error)})",
            "save the processor again, or remove its chat template",
        ) from error
    bos = getattr(processor.tokenizer, "bos_token", None)
    if bos and processor.tokenizer("")["input_ids"][:1] == [processor.tokenizer.bos_token_id]:
        text = text.removeprefix(bos)
    fits = text.count(image_token) == 1 and text.count("{prompt}") == 1
    return text.replace(image_token, "{image}") if fits else otherwise


def _mentions_template(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".jinja" or "chat_template" in path.read_text(encoding="utf-8"))
