"""What a caption is when it is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blip2edge.runtime.frames import ItemSource
from blip2edge.runtime.options import Generated, GenerationOptions
from blip2edge.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class CaptionResult:
    """A picture's caption.

    Attributes:
        image: Its path; None where a picture was given as an object. Of several pictures a list of those.
        prompt: The prompt as given; None for none.
        text: The caption, without special tokens and surrounding spaces.
        tokens: Generated ids, the end token included.
        finish_reason: ``eos``, ``length`` or ``stop``.
        timings_ms: Milliseconds of each of :data:`blip2edge.runtime.encoder.STAGES` and ``total``, their sum. What
            several pictures went through together is shared equally. Where a picture is encoded while another is
            decoded, less time goes by than the sum over pictures.
        tokens_per_s: Generated tokens over the seconds of prefill and decode.
        tokens_per_pass: Generated tokens over the passes of the language model; 1 where nobody reads ahead.
    """

    image: str | list[str | None] | None
    prompt: str | None
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    timings_ms: dict[str, float]
    tokens_per_s: float
    tokens_per_pass: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the attributes as keys, but for what ``bench`` tells of drafts."""
        values = {**vars(self), "tokens": list(self.tokens)}
        del values["tokens_per_pass"]
        return values


def caption_result(
    image: ItemSource,
    prompt: str | None,
    generated: Generated,
    options: GenerationOptions,
    tokenizer: Tokenizer,
    stage_ms: Mapping[str, float],
) -> CaptionResult:
    """Puts a result together.

    Args:
        image: As it was given.
        prompt: As it was given.
        generated: What the decoder said.
        options: Whose ``stop`` texts end the caption.
        tokenizer: Turns ids into text.
        stage_ms: Milliseconds by stage.
    """
    text = tokenizer.decode(generated.tokens)
    for stop in options.stop:
        text = text.partition(stop)[0]
    seconds = (stage_ms["prefill"] + stage_ms["decode"]) / 1e3
    timings = {**stage_ms, "total": sum(stage_ms.values())}
    return CaptionResult(
        image=_path(image),
        prompt=prompt,
        text=text.strip(),
        tokens=generated.tokens,
        finish_reason=generated.finish_reason,
        timings_ms={stage: round(ms, 3) for stage, ms in timings.items()},
        tokens_per_s=round(len(generated.tokens) / seconds, 1) if seconds > 0 else 0.0,
        tokens_per_pass=round(generated.tokens_per_pass, 3),
    )


def _path(image: ItemSource) -> str | list[str | None] | None:
    if isinstance(image, (list, tuple)):
        return [os.fspath(one) if isinstance(one, (str, os.PathLike)) else None for one in image]
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
