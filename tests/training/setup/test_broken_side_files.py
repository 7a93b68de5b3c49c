"""Side files of a checkpoint that are broken: the new checkpoint would get them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="training runs in torch")

from blip2edge.errors import CheckpointError
from blip2edge.training.setup.pretrained import side_files


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_broken_json_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"a": 1}')
    assert side_files(tmp_path)[name] == b'{"a": 1}'
    (tmp_path / name).write_text("{ not json")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as JSON"):
        side_files(tmp_path)
