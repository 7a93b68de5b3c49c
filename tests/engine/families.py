"""A tiny checkpoint of every family, for tests of its graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import drawing
from tests.families import drawing_blip, drawing_idefics, drawing_instruct, drawing_llama, test_t5

Draw = Callable[[Path], Any]
ONE: dict[str, Any] = {"num_hidden_layers": 1}

FAMILIES: dict[str, Draw] = {
    "blip2-opt": lambda path: drawing.save(path, vision_layers=1, qformer_layers=1, layers=1),
    "blip2-t5": lambda path: test_t5.draw(0, path, **test_t5.KINDS[0]),
    "minigpt4": lambda path: drawing_llama.draw_minigpt4(path, 0, **ONE),
    "llava": lambda path: drawing_llama.draw_llava(path, 2, "mistral", sliding_window=9, **ONE),
    "instructblip": lambda path: drawing_instruct.draw_instructblip(path, 1, "llama", **ONE),
    "instructblipvideo": lambda path: drawing_instruct.draw_instructblipvideo(path, 11, "llama", **ONE),
    "blip": lambda path: drawing_blip.save_blip(path, "vqa", 0, num_hidden_layers=2),
    "idefics": lambda path: drawing_idefics.draw_idefics(path, 0, num_hidden_layers=2),
    "blip-itm": lambda path: drawing_blip.save_blip(path, "retrieval", 0),
    "blip2-itm": lambda path: drawing_blip.save_blip2(path, 0),
    "clip": lambda path: drawing_blip.save_clip(path, 0, eos=drawing_blip.SEP),
}
"""By name, what writes a checkpoint into a directory."""

ONE_QUICK = [pytest.param(name, marks=[] if name == "blip2-opt" else pytest.mark.slow) for name in FAMILIES]
"""The names as parameters: one in the fast tier, the others in the slow one."""

DECODERS = tuple(name for name in FAMILIES if name not in ("blip-itm", "blip2-itm", "clip"))
"""Those that write texts."""
