"""``blip2edge caption`` and ``blip2edge ask``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from blip2edge.bundle.schema import MARKERS
from blip2edge.cli.running_flags import given_generation
from blip2edge.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from blip2edge.runtime.captioning.captioner import Captioner, CaptionResult


def caption(options: argparse.Namespace) -> int:
    """Caption every picture, in the order given."""
    items, prompts = _items(options.images, options.prompt)
    _check(options)
    captioner = _load(options)
    flags = given_generation(options)
    if options.stream:
        for index, item in enumerate(items):
            prompt = None if prompts is None else prompts[index]
            _write(_label(item, len(items)), captioner.stream(item, prompt=prompt, **flags))
        return 0
    results = captioner.caption_many(items, prompts=prompts, batch_size=options.batch_size, **flags)
    for item, result in zip(items, results, strict=True):
        show(result, as_json=options.json, label=_label(item, len(items)))
    return 0


def ask(options: argparse.Namespace) -> int:
    """Answer one question about one picture."""
    _check(options)
    captioner = _load(options)
    flags = given_generation(options)
    if options.stream:
        prompt = captioner.prompts.question(options.question)
        _write("", captioner.stream(options.image, prompt=prompt, **flags))
        return 0
    show(captioner.ask(options.image, options.question, **flags), as_json=options.json, label="")
    return 0


def show(result: CaptionResult, *, as_json: bool, label: str) -> None:
    """Print one result at once, so that a reader down the pipe gets it."""
    print(json.dumps(result.to_json()) if as_json else f"{label}{result.text.strip()}", flush=True)


def _label(item: str | list[str], count: int) -> str:
    """What stands before a caption where there are several."""
    if count == 1:
        return ""
    return f"{item if isinstance(item, str) else ' '.join(item)}: "


def _items(images: list[str], given: list[str] | None) -> tuple[list[str | list[str]], list[str] | None]:
    """What each caption is of, and its prompt: a picture, or as many as the prompt has places for.

    Raises:
        UsageError: The prompts have places for more or fewer pictures than there are.
    """
    places = [sum(prompt.count(marker) for marker in MARKERS) for prompt in given or ()]
    if given is None or not any(places):
        return list(images), _prompts(given, len(images))
    if len(given) == 1:  # the same prompt over and over, each time with the next pictures
        times = max(1, len(images) // places[0])
        given, places = given * times, places * times
    taken = [max(1, count) for count in places]
    if sum(taken) != len(images):
        raise UsageError(
            f"--prompt: there are places for {sum(taken)} pictures, but {len(images)} are given",
            f"write {MARKERS[1]} once for each picture",
        )
    items: list[str | list[str]] = []
    for count in taken:
        items.append(images[0] if count == 1 else images[:count])
        images = images[count:]
    return items, given


def _prompts(given: list[str] | None, count: int) -> list[str] | None:
    """One prompt a picture, or None for the bundle's own.

    Raises:
        UsageError: The number of prompts is neither one nor that of the pictures.
    """
    if given is None:
        return None
    if len(given) == 1:
        return given * count
    if len(given) != count:
        raise UsageError(
            f"--prompt: one for all pictures or one each is expected, not {len(given)} for {count} pictures",
            "repeat --prompt once a picture",
        )
    return given


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot go together before anything is loaded.

    Raises:
        UsageError: Beams and streaming, or a least length above the most.
    """
    beams = options.num_beams is not None and options.num_beams > 1
    if options.stream and beams:
        raise UsageError(
            "--stream and --num-beams: beams choose the words at the end", "leave one of the two out"
        )
    least, most = options.min_new_tokens, options.max_new_tokens
    if least is not None and most is not None and least > most:
        raise UsageError(f"--min-new-tokens {least} is more than --max-new-tokens {most}")


def _load(options: argparse.Namespace) -> Captioner:
    from blip2edge.runtime.captioning.captioner import Captioner

    return Captioner.load(
        options.bundle, backend=options.backend, threads=options.threads, draft=options.draft
    )


def _write(label: str, pieces: Iterable[str]) -> None:
    """Print the pieces of one caption as they come, without the space before the first word."""
    print(label, end="", flush=True)
    begun = False
    for piece in pieces:
        text = piece if begun else piece.lstrip()
        begun = begun or bool(text)
        print(text, end="", flush=True)
    print(flush=True)
