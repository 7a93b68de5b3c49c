"""Exports of checkpoints with a PEFT adapter: ids equal those of transformers, which applies it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is the oracle")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")
pytest.importorskip("peft", reason="peft merges adapters")

from transformers import Blip2ForConditionalGeneration

from blip2edge.bundle.bundle import Bundle
from blip2edge.cli import main
from blip2edge.runtime.captioning.captioner import Captioner
from tests import drawing
from tests.model.test_adapter import add_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

PROMPT, PICTURES = "a photo of", drawing.draw_pictures(3, 4)


def ids(drawn: drawing.Drawn, bundle: Path) -> tuple[list[Any], list[Any]]:
    """Ids of three pictures, from the bundle and from transformers."""
    with Captioner.load(bundle, threads=1) as captioner:
        got = [tuple(captioner.caption(image, prompt=PROMPT, max_new_tokens=10).tokens) for image in PICTURES]
    return got, [drawn.generate(image, PROMPT, max_new_tokens=10) for image in PICTURES]


def test_an_adapter_beside_the_weights(tmp_path: Path, quick: Any) -> None:
    base = drawing.save(tmp_path / "model", seed=3)
    without = [base.generate(image, PROMPT, max_new_tokens=10) for image in PICTURES]
    add_adapter(base.model, target_modules=["q_proj", "fc1", "qkv", "query"]).save_pretrained(base.directory)
    oracle = Blip2ForConditionalGeneration.from_pretrained(base.directory).eval()
    drawn = drawing.Drawn(base.directory, base.variant, oracle, base.processor)
    got, wanted = ids(drawn, quick(base.directory, tmp_path / "bundle"))
    assert got == wanted
    assert got != without


def test_an_adapter_on_a_base_over_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = drawing.save(tmp_path / "base", seed=3)
    adapter = tmp_path / "run" / "checkpoint-500"
    model = add_adapter(base.model, modules_to_save=["language_projection"])
    model.save_pretrained(adapter)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as a Trainer saves them
        shutil.copy(base.directory / name, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owner/elsewhere"}))
    command = ["export", str(adapter), "-o", str(tmp_path / "bundle"), "--no-optimize"]
    assert main(command) == 1
    assert "owner/elsewhere is not on this machine" in capsys.readouterr().err
    assert main([*command, "--base", str(base.directory)]) == 0
    source = Bundle.open(tmp_path / "bundle").manifest.source
    assert (source["checkpoint"], source["base"]) == (str(adapter), str(base.directory))
    drawn = drawing.Drawn(base.directory, base.variant, model.get_base_model(), base.processor)
    got, wanted = ids(drawn, tmp_path / "bundle")
    assert got == wanted
