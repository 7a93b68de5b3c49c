"""Errors and progress of bundles on the hub: a server with problems, names of another form, an unwritable cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("huggingface_hub", reason="the package of the extra hub")

from huggingface_hub import constants

from blip2edge import Bundle, BundleError
from blip2edge.cli import main
from tests.bundle.conftest import HUB, NAME
from tests.hub_server import HubServer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the hub's client uploads so


def test_a_repository_that_lacks_a_file(published: HubServer) -> None:
    files = dict(published.repositories[NAME].files())
    del files["bridge.onnx"]
    published.repositories[NAME].commit(files)
    with pytest.raises(BundleError, match=r"tiny is incomplete: its bundle\.json lists bridge\.onnx, which is not in"):
        Bundle.open(HUB)


def test_a_hub_that_has_a_problem(hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The request is not repeated, and the error has the status and no foreign text."""
    hub.status = 503
    for words in (["inspect", HUB], ["plan", NAME], ["export", NAME, "-o", "new"]):
        hub.requests.clear()
        assert main(words) == 1
        assert len(hub.requests) == 1
        told = "the hub has a problem: it answered with status 503 (Service Unavailable); try again in a few minutes"
        assert told in one_error(capsys)
    hub.status = 404
    assert main(["inspect", HUB]) == 1
    assert "the hub has nothing for org/tiny at this address (status 404); check the name" in one_error(capsys)
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "nonsense/{repo_id}/{revision}/{filename}")
    assert main(["inspect", HUB]) == 1
    error = one_error(capsys)
    assert error.count("Request URL") == 1
    assert "the address of the hub is wrong (" in error


def one_error(capsys: Any) -> str:
    """Standard error, which is one line."""
    text: str = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


def test_a_cache_that_cannot_be_written(published: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/nowhere/hub")
    assert main(["inspect", HUB]) == 1
    error = one_error(capsys)
    assert "the hub's cache /proc/nowhere/hub cannot be used (/proc/nowhere" in error
    assert error.endswith("; set HF_HOME to a folder that can be written\n")


def test_offline_names_the_revision(published: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Bundle.open(HUB)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BundleError, match=r"org/tiny@v9 is not in the hub's cache, and HF_HUB_OFFLINE is set"):
        Bundle.open(f"{HUB}@v9")


def test_the_progress_is_ours(published: HubServer, tiny_bundle: Path, monkeypatch: Any, capsys: Any) -> None:
    bars: Any = sys.modules["huggingface_hub.utils.tqdm"]
    for module in (constants, bars):
        monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars, "progress_bar_states", {})  # transformers may have hidden them
    assert main(["inspect", HUB]) == 0
    assert main(["push", str(tiny_bundle), "org/other"]) == 0
    lines = capsys.readouterr().err.splitlines()
    begins = {line.rpartition(":")[0] for line in lines}
    assert begins == {"hashing", f"downloading {HUB}, kB", "uploading to hub:org/other, kB"}
    assert not bars.are_progress_bars_disabled()
    capsys.readouterr()
    Bundle.open("hub:org/other")  # a library call reports nothing
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["noslash"], "expected the name of a repository on the hub as ORG/NAME, got noslash"),
        ([NAME, "--license", "x y"], "'x y' is not the id of a license on the hub; give an id in lower-case letters"),
        ([f"{NAME}@"], "expected one revision, got none after the @"),
        ([f"{NAME}@a", "--revision", "b"], "expected one revision, got a after the @"),
        ([NAME, "--revision", "a b"], "'a b' is not the name of a branch, a tag or a commit on the hub"),
    ],
)
def test_what_a_push_names_is_checked_first(
    words: list[str], told: str, hub: HubServer, tiny_bundle: Path, capsys: Any
) -> None:
    for card in ([], ["--card"]):
        assert main(["push", str(tiny_bundle), *words, *card]) == 2
        assert told in one_error(capsys)
    assert not hub.requests


def test_an_account_is_looked_for_before_the_files_are_hashed(
    hub: HubServer, tiny_bundle: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(tiny_bundle), NAME]) == 1
    assert "no account is logged in; log in with `hf auth login`" in one_error(capsys)
