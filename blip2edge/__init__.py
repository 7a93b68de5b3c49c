"""blip2edge: from a trained BLIP-2-style captioner to captions on an edge device.

The names below are loaded when they are first used, so that ``import blip2edge`` costs milliseconds and works
where torch is not installed:

    from blip2edge import Captioner
    captioner = Captioner.load("bundle/")
    captioner.caption("dog.jpg", prompt="a photo of", max_new_tokens=30).text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2edge.export.pipeline import export_checkpoint
    from blip2edge.runtime.captioning.captioner import Captioner, CaptionResult
    from blip2edge.runtime.captioning.matcher import Matcher, MatchResult
    from blip2edge.runtime.decoding.generate import GenerationOptions

__version__ = "0.1.0"

__all__ = [
    "CaptionResult",
    "Captioner",
    "GenerationOptions",
    "MatchResult",
    "Matcher",
    "__version__",
    "export_checkpoint",
]

# Public name -> the module that defines it.
_HOMES = {
    "CaptionResult": "blip2edge.runtime.captioning.captioner",
    "Captioner": "blip2edge.runtime.captioning.captioner",
    "GenerationOptions": "blip2edge.runtime.decoding.generate",
    "MatchResult": "blip2edge.runtime.captioning.matcher",
    "Matcher": "blip2edge.runtime.captioning.matcher",
    "export_checkpoint": "blip2edge.export.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562).

    Raises:
        AttributeError: The package has no such name.
    """
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'blip2edge' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
