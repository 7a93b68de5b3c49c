"""The model card of a pushed bundle: what the hub reads of it, and whether it was edited."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from blip2edge.bundle.hub.card import is_edited, model_card
from blip2edge.bundle.manifest import Manifest
from tests.bundle.test_manifest import make_manifest

NAME = "org/tiny"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "bridge.onnx").write_bytes(b"graph")
    source = {"checkpoint": "/hub/models--org--base/snapshots/0123", "sha256": "0" * 64}
    return replace(make_manifest(tmp_path), source=source)


def test_only_a_calibrated_bundle_is_quantized(manifest: Manifest) -> None:
    card = model_card(manifest, NAME)
    assert 'base_model: "org/base"\n' in card
    assert "base_model_relation" not in card
    calibrated = replace(manifest, calibration={"method": "minmax", "pictures": 8})
    assert 'base_model: "org/base"\nbase_model_relation: "quantized"\n' in model_card(calibrated, NAME)


def test_an_edited_card(manifest: Manifest) -> None:
    card = model_card(manifest, NAME)
    assert not is_edited(card)
    assert not is_edited(card.replace("\n", "\r\n") + "\r\n")  # an editor may save it so
    assert is_edited(card + "more\n")
    assert is_edited(card.replace("org/base", "org/other"))
    assert is_edited("\n".join(line for line in card.splitlines() if not line.startswith("<!--")))
