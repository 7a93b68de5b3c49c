"""The files that the trainer writes beside the weights of its own models are read by export without a warning."""

from __future__ import annotations

import json
from pathlib import Path

from blip2edge.model.checkpoint.generation import MAX_NEW_TOKENS, read_generation
from blip2edge.model.checkpoint.image_processor import load_preprocessing
from blip2edge.training.config import load_config
from blip2edge.training.setup.miniature import build_miniature

RECIPE = Path(__file__).parents[3] / "examples" / "configs" / "scenes.toml"


def test_export_reads_them_without_a_warning(tmp_path: Path) -> None:
    parts = build_miniature(load_config(RECIPE))
    for name, content in parts.files.items():
        (tmp_path / name).write_bytes(content)
    assert json.loads(parts.files["preprocessor_config.json"])["processor_class"] == "Blip2Processor"
    assert load_preprocessing(tmp_path).warnings == []
    generation, warnings = read_generation(tmp_path, parts.model.config)
    assert (generation["max_new_tokens"], warnings) == (MAX_NEW_TOKENS, [])
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": MAX_NEW_TOKENS + 1}))
    assert (
        "not used for BLIP-2, as in transformers: max_new_tokens" in read_generation(tmp_path, parts.model.config)[1][0]
    )
