"""Generates captions in several processes at once, for a captioner whose parameters are spread over them (FSDP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from blip2edge.errors import Blip2EdgeError
from blip2edge.runtime.images.video import ItemSource
from blip2edge.training.evaluation.checkpoints.models import CheckpointCaptioner
from blip2edge.training.evaluation.models import Prompts

Send = Callable[[list[Any]], list[Any]]
"""Function that returns the list of the first process in all processes (accelerate's ``broadcast_object_list``)."""


class CaptionerTogether:
    """Runs a captioner in all processes at once, on the pictures and prompts of the first process.

    The first process calls it, and calls :meth:`end` at last, also after an error. The others call :meth:`follow`. Only
    the first reads data, so a picture that opens in one process only, or an error in the scores, leaves no process
    waiting. Another error within a process that follows, such as too little memory, is raised there: the process ends,
    and its launcher ends the others.

    Args:
        captioner: The captioner of this process.
        send: Sends objects of the first process to all.

    Attributes:
        prompts: The prompt builder of the model's family.
    """

    def __init__(self, captioner: CheckpointCaptioner, send: Send) -> None:
        self.prompts = captioner.prompts
        self._captioner = captioner
        self._send = send

    def question(self, text: str) -> str:
        """Returns the prompt for a question, in the template of the family."""
        return self._captioner.question(text)

    def __call__(self, pictures: Sequence[ItemSource], prompts: Prompts | None = None) -> list[str]:
        """Generates one text for each picture; called in the first process only."""
        self._send([(list(pictures), None if prompts is None else list(prompts))])
        return self._captioner(pictures, prompts)

    def end(self) -> None:
        """Ends :meth:`follow` in the other processes; called in the first process only."""
        self._send([None])

    def follow(self) -> None:
        """Generates the same texts as the first process, until the first process calls :meth:`end`.

        Called in all processes except the first.
        """
        while (given := self._send([None])[0]) is not None:
            try:
                self._captioner(*given)
            except Blip2EdgeError:  # the first process has the same error from the same input, and raises it
                continue
