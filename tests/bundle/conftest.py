"""A local hub, with and without the tiny bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blip2edge.bundle.trust.integrity import STAMPS
from tests.hub_server import TOKEN, HubServer, plug_in

NAME = "org/tiny"
HUB = f"hub:{NAME}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().running() as server:
        plug_in(monkeypatch, server, tmp_path / "hub", TOKEN)
        yield server


@pytest.fixture
def published(hub: HubServer, tiny_bundle: Path) -> HubServer:
    """The server with the tiny bundle, and with files that are not downloaded."""
    files = {path.name: path.read_bytes() for path in tiny_bundle.iterdir() if path.is_file() and path.name != STAMPS}
    hub.add(NAME, files | {"README.md": b"a card", "training.log": b"x" * 10_000, "engines/evil/engine.json": b"{}"})
    return hub
