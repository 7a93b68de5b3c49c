"""The options of a run of ``bulk``, which can be written as JSON and sent to other machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blip2edge.bundle.schema import BackendName
from blip2edge.errors import UsageError, option
from blip2edge.limits import DEFAULT_LIMITS, PICTURE_LIMITS, Limits
from blip2edge.runtime.decoding.options import GenerationOptions

DEFAULT_SEED = 0


@dataclass(frozen=True)
class BulkOptions:
    """Options: how pictures are captioned, and how the output is divided into parts.

    Attributes:
        bundle: The bundle's directory.
        prompt: The prompt of every picture; None for the bundle's default.
        captions: Number of captions of each picture. With beam search, these are the captions with the highest scores;
            with sampling, they are drawn at random.
        generation: Fields of :class:`GenerationOptions`; missing fields get the bundle's defaults.
        duplicates: Smallest cosine similarity of a duplicate and its original. If None, duplicates are not searched.
        chunk_size: Number of pictures in one part of the output.
        batch_size: Number of pictures that are encoded and decoded together.
        workers: Number of threads that read and decode pictures; None for the number of CPU cores.
        backend: Name of the backend that runs the graphs.
        threads: Number of CPU threads within an operator; None for the number of CPU cores.
        require_signature: A public key; the bundle must have a signature that fits this key. If None, the bundle needs
            no signature.
        limits: Limits on the size of a picture; a larger picture is not decoded.

    Raises:
        UsageError: A number is below 1, or ``duplicates`` is not above 0 and at most 1.
    """

    bundle: Path
    prompt: str | None = None
    captions: int = 1
    generation: Mapping[str, Any] = field(default_factory=dict)
    duplicates: float | None = None
    chunk_size: int = 500
    batch_size: int = 16
    workers: int | None = None
    backend: BackendName = "auto"
    threads: int | None = None
    require_signature: Path | None = None
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        for name, value in (
            ("num_captions", self.captions),
            ("chunk_size", self.chunk_size),
            ("batch_size", self.batch_size),
            ("workers", self.workers),
        ):
            if value is not None and value < 1:
                raise UsageError(f"expected {option(name)} of at least 1, got {value}")
        if self.duplicates is not None and not 0 < self.duplicates <= 1:
            raise UsageError(f"expected {option('duplicates')} above 0 and at most 1, got {self.duplicates}")

    def to_json(self) -> str:
        """Returns the options as JSON, with absolute paths."""
        key = self.require_signature
        bundle = self.bundle.absolute() if self.bundle.exists() else self.bundle
        paths = {
            "bundle": str(bundle),
            "require_signature": None if key is None else str(key.absolute()),
        }
        return json.dumps({**asdict(self), **paths})

    @classmethod
    def from_json(cls, text: str) -> BulkOptions:
        """Makes the options from JSON that :meth:`to_json` returned."""
        values = json.loads(text)
        key = values["require_signature"]
        values["require_signature"] = None if key is None else Path(key)
        return cls(**{**values, "bundle": Path(values["bundle"]), "limits": Limits(**values["limits"])})

    def plan(self, generation: GenerationOptions) -> dict[str, Any]:
        """Returns the options that change the output; ``workers``, for example, is left out.

        Args:
            generation: The options of the generation, with the bundle's defaults.
        """
        names = ("prompt", "captions", "duplicates", "chunk_size", "batch_size", "threads")
        limits = {name: getattr(self.limits, name) for name in PICTURE_LIMITS}
        return {**{name: getattr(self, name) for name in names}, "generation": asdict(generation), "limits": limits}


def check_captions(count: int, generation: GenerationOptions) -> None:
    """Checks that the decoding can give ``count`` different captions of one picture.

    Raises:
        UsageError: Greedy decoding gives one caption, or there are fewer beams than captions.
    """
    if count == 1 or generation.sampling or generation.num_beams >= count:
        return
    if generation.num_beams > 1:
        raise UsageError(
            f"expected {option('num_captions')} of at most {option('num_beams')} ({generation.num_beams}), got {count}",
            f"raise {option('num_beams')}",
        )
    raise UsageError(
        f"expected {option('num_captions')} 1 with greedy decoding, got {count}",
        f"sample with {option('temperature')} or {option('top_p')}, or search with {option('num_beams')} {count}",
    )
