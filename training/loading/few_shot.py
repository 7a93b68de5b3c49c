"""Makes prompts with examples before a question (few-shot), for models with several pictures in one text (Flamingo).

An example has the same parts as a training sample: picture, prompt, text, end token. With the template of the family,
the prompt for two examples and a question is::

    <image>Question: What is it? Answer: a dog</s><image>Question: How many? Answer: two</s><image>Question: …

Each token attends to the last picture before the token. Tokens between an end token and the next picture attend to no
picture. Both rules are those of Flamingo (Alayrac et al., arXiv 2204.14198, section 3.1.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from blip2edge.bundle.prompt_spec import INTERLEAVED, MARKERS
from blip2edge.errors import DataError
from blip2edge.runtime.text.prompt import PromptBuilder


class Shot(NamedTuple):
    """The prompt and the text of one few-shot example.

    Attributes:
        prompt: The prompt or question, already in its template; empty for the default prompt of the family.
        text: The caption or answer.
    """

    prompt: str
    text: str


def is_interleaved(prompts: PromptBuilder) -> bool:
    """Returns whether a text for the model may have several pictures, each with a marker at its place."""
    return prompts.spec.kind == INTERLEAVED


def few_shot_prompt(prompts: PromptBuilder, shots: Sequence[Shot], prompt: str | None) -> str | None:
    """Makes a few-shot prompt: first the examples (prompt and text), then the prompt, each with one picture.

    Args:
        prompts: The prompt builder of a model that takes several pictures in one text.
        shots: The few-shot examples, in order.
        prompt: The prompt; None for the family's default.

    Returns:
        The text for the prompt builder; `prompt` itself if `shots` is empty.

    Raises:
        DataError: A text holds the marker of a picture, or an end token.
    """
    if not shots:
        return prompt
    spec = prompts.spec
    end = "" if spec.end_token_id is None else prompts.tokenizer.id_to_token(spec.end_token_id) or ""
    reserved = [text for text in (*MARKERS, spec.picture_token, end) if text]
    parts = []
    for shot in (*shots, Shot(prompt or "", "")):
        begin = spec.template.replace("{prompt}", shot.prompt or spec.default or "")
        found = next((text for text in reserved if text in shot.prompt or text in shot.text), None)
        if found is not None:
            raise DataError(f"a few-shot example contains {found!r}, which marks a picture or the end of a text")
        gap = " " if shot.text and (shot.prompt or spec.default) else ""
        parts.append(f"{begin}{gap}{shot.text}{end if shot.text else ''}")
    return "".join(parts)
