"""Fixtures of all tests: one torch thread, no network, a separate cache directory."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.drawing import Drawn

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Modules that are equal are traced once; commands in processes of their own trace for themselves."""
    if all(importlib.util.find_spec(name) for name in ("torch", "onnx", "onnxscript")):
        from tests.traces import share_traces, shared_directory, trace_directory

        cache = getattr(pytestconfig, "cache", None)  # absent with `-p no:cacheprovider`
        share_traces(trace_directory(cache) if cache else shared_directory(tmp_path_factory, "traces"))


@pytest.fixture(scope="session", autouse=True)
def _no_races() -> Iterator[None]:
    """`optimize` keeps the fastest form of a graph; here the first: a copy does not depend on the machine."""
    from blip2edge.optimization import race

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "fastest", lambda task, name, portable, forms, **_: (forms[0], (2.0, 1.0)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_reference_outputs() -> Iterator[None]:
    """Bundles of the tests have no reference outputs, which takes time; the tests of `certify` record them."""
    from blip2edge.runtime.bench.certificate import reference_outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_outputs, "add_reference_outputs", lambda *_, **__: None)
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from the user's cache directory."""
    cache: Path = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(autouse=True)
def _hints_of_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints name PyPI's packages, and not this clone and its environment (tests/test_packages.py tests those)."""
    from blip2edge import packages

    monkeypatch.setattr(packages, "CLONE", None)
    monkeypatch.setattr(packages, "_direct_url", dict)
    monkeypatch.setattr(packages, "_pip", lambda: "pip")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A random tiny BLIP-2 checkpoint with its processor, saved by transformers; not to be changed."""
    pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
    from tests import drawing

    return drawing.save(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Drawn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of that checkpoint in fp32; not to be changed."""
    from blip2edge.export.pipeline import export_checkpoint

    output = tmp_path_factory.mktemp("exported") / "bundle"
    return export_checkpoint(tiny_checkpoint.directory, output).bundle


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A checkpoint with one layer a stack, for what happens around an export; not to be changed."""
    pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
    from tests import drawing

    directory = tmp_path_factory.mktemp("small") / "checkpoint"
    return drawing.save(directory, seed=3, vision_layers=1, qformer_layers=1, layers=1)


@pytest.fixture(scope="session")
def confident_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle with a confidence; the likelier half of its captions counts as right. Not to be changed."""
    pytest.importorskip("onnxruntime", reason="the confidence is fitted on captions of the cpu backend")
    from tests.confident import fit_on_drawings

    output = tmp_path_factory.mktemp("confident") / "bundle"
    fit_on_drawings(tiny_bundle, output)
    return output
