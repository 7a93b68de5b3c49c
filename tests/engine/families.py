"""A tiny checkpoint of every family, for what is done with its graphs: each is drawn and exported once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.families import drawing_blip, drawing_idefics, drawing_instruct, drawing_llama, test_t5

Draw = Callable[[Path], Any]

FAMILIES: dict[str, Draw] = {
    "blip2-t5": lambda directory: test_t5.draw(0, directory, **test_t5.KINDS[0]),
    "minigpt4": lambda directory: drawing_llama.draw_minigpt4(directory, 0, num_hidden_layers=1),
    "llava": lambda directory: drawing_llama.draw_llava(
        directory, 2, "mistral", sliding_window=9, num_hidden_layers=1
    ),
    "instructblip": lambda directory: drawing_instruct.draw_instructblip(
        directory, 1, "llama", num_hidden_layers=1
    ),
    "instructblipvideo": lambda directory: drawing_instruct.draw_instructblipvideo(
        directory, 11, "t5", num_hidden_layers=1
    ),
    "blip": lambda directory: drawing_blip.save_blip(directory, "vqa", 0, num_hidden_layers=2),
    "idefics": lambda directory: drawing_idefics.draw_idefics(directory, 0, num_hidden_layers=2),
    "blip-itm": lambda directory: drawing_blip.save_blip(directory, "retrieval", 0),
    "blip2-itm": lambda directory: drawing_blip.save_blip2(directory, 0),
    "clip": lambda directory: drawing_blip.save_clip(directory, 0, eos=drawing_blip.SEP),
}
"""By name, what writes a checkpoint into a directory. BLIP-2 with OPT is the fixture ``tiny_bundle``."""

DECODERS = (
    "blip2-opt",
    "blip2-t5",
    "minigpt4",
    "llava",
    "instructblip",
    "instructblipvideo",
    "blip",
    "idefics",
)
"""Those that write texts."""
