"""A sample of the kills of ``benchmarks/bulk_kills.py``, and the same bytes on Ray."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("pyarrow", reason="pip install 'blip2edge[bulk]'")

from blip2edge.bulk import pipeline, ray_backend
from blip2edge.bulk.captioning import ChunkCaptioner
from blip2edge.bulk.options import BulkOptions
from blip2edge.bulk.pipeline import Output, run_bulk
from blip2edge.bulk.ray_backend import CaptionWorker, Cluster
from blip2edge.bulk.sinks import sink_of
from blip2edge.bulk.sources import PictureSource
from blip2edge.cli import main
from blip2edge.cluster import connection
from blip2edge.cluster.connection import ClusterError, check_ray, connected
from blip2edge.errors import BundleError, UsageError

ROOT = Path(__file__).parents[2]
PICTURES, KILLS = 120, 3


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed runs are forked")
def test_a_sample_of_kills(tiny_bundle: Path, tmp_path: Path) -> None:
    result = tmp_path / "kills.json"
    words = ["--pictures", str(PICTURES), "--least", str(KILLS), "--share", "0.5", "--json", str(result)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "bulk_kills.py"), str(tiny_bundle), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(result.read_text())["kills"] >= KILLS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, about itself
def test_ray_makes_the_same_bytes(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'blip2edge[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token to the home directory
    source = PictureSource(str(ROOT / "examples" / "pictures"))
    options = BulkOptions(tiny_bundle, duplicates=0.99, chunk_size=2, threads=1, generation={"max_new_tokens": 4})
    for name, cluster in (("here.tar", None), ("there.tar", Cluster("local", 2))):
        run_bulk(source, Output.named(tmp_path / name, None, False), options, cluster=cluster)
    assert (tmp_path / "there.tar").read_bytes() == (tmp_path / "here.tar").read_bytes()
    options = BulkOptions(tiny_bundle, generation={"num_beams": 300})
    with pytest.raises(UsageError, match="expected num_beams of at most"):
        run_bulk(source, Output.named(tmp_path / "x", None, False), options, cluster=Cluster("local"))


def mapped_here(_: str, __: int, worker: Any, arguments: Sequence[Any], rows: Sequence[Any]) -> Iterator[Any]:
    """In the place of ``map_on_ray``: one worker in this process."""
    made = worker(*arguments)
    yield from map(made, rows)
    made._captioner.close()


def test_workers_must_load_what_the_plan_names(tiny_bundle: Path, tmp_path: Path) -> None:
    options = BulkOptions(tiny_bundle, threads=1)
    with ChunkCaptioner(options, False) as captioner:
        loaded = captioner.loaded()
    assert loaded["backend"] == "cpu"
    for name, value in (("bundle", "0" * 64), ("optimized", ["vision"])):
        with pytest.raises(BundleError, match=f"expected {name} .*{platform.node()}, as in the plan of the run, got"):
            CaptionWorker(options.to_json(), False, json.dumps({**loaded, name: value}))


@pytest.mark.parametrize("number", [0, 1])
def test_a_picture_that_one_pass_of_two_cannot_read(
    number: int, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Picture 1 is a copy of picture 0; one of them cannot be read when captions are made."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    content = next((ROOT / "examples" / "pictures").glob("*.png")).read_bytes()
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes(content)
    caption = CaptionWorker.__call__

    def broken(self: CaptionWorker, row: dict[str, Any]) -> dict[str, Any]:
        (folder / f"{number}.png").write_bytes(b"")
        return caption(self, row)

    monkeypatch.setattr(CaptionWorker, "__call__", broken)
    monkeypatch.setattr(ray_backend, "map_on_ray", mapped_here)
    monkeypatch.setattr(pipeline, "check_ray", lambda _: None)
    options = BulkOptions(tiny_bundle, duplicates=0.99, chunk_size=1, threads=1, generation={"max_new_tokens": 2})
    output = Output.named(tmp_path / "out.parquet", None, False)
    run_bulk(PictureSource(str(folder)), output, options, cluster=Cluster("local"))
    first, second = sink_of("parquet").rows(output.target)
    if number == 0:
        assert first.error == "0.png: the file is empty"
        assert (second.error, second.captions, second.duplicate_of) == (
            f"the original 0.png is broken: {first.error}", (), "0.png",
        )  # fmt: skip
    else:
        assert first.error is None
        assert first.captions
        assert (second.error, second.captions, second.duplicate_of) == ("1.png: the file is empty", (), None)


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":1", "http://h:1", ""])
def test_addresses_of_other_forms_are_refused(address: str, tmp_path: Path) -> None:
    """They are refused first, also where Ray is not installed."""
    with pytest.raises(UsageError, match=r"expected ray to be local, auto, HOST:PORT or ray://HOST:PORT, got"):
        run_bulk(
            PictureSource(str(tmp_path)),
            Output.named(tmp_path / "x", None, False),
            BulkOptions(tmp_path),
            cluster=Cluster(address),
        )
    assert not any(tmp_path.iterdir())


class FakeRay:
    """In the place of Ray: ``init`` waits, or fails; ``closer`` is the name of the thread that calls ``shutdown``."""

    def __init__(self, failure: Exception | None) -> None:
        self.failure, self.released, self.closed = failure, threading.Event(), threading.Event()

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: object) -> None:
        logging.getLogger("ray._private.worker").warning("no signals")
        if self.failure is not None:
            raise self.failure
        self.released.wait(60)

    def shutdown(self) -> None:
        self.closer = threading.current_thread().name
        self.closed.set()


def test_a_cluster_that_does_not_answer_is_one_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        monkeypatch.setattr(connection, "require", lambda *_, **__: None)
        check_ray(f"127.0.0.1:{port}")
        logger = logging.getLogger("ray._private.worker")
        before = logger.level, list(logger.filters)
        for failure, problem in (
            (None, r"cannot be reached \(no answer of Ray within 0 s\); start it with"),
            (ConnectionError("no cluster runs"), r"cannot be reached \(no cluster runs\); start it with"),
            (RuntimeError("Version mismatch"), r"failed \(Version mismatch\); correct this"),
        ):
            monkeypatch.setattr(connection, "CONNECT_S", 0.05 if failure is None else 60.0)
            ray = FakeRay(failure)
            monkeypatch.setitem(sys.modules, "ray", ray)
            for address in (f"127.0.0.1:{port}", "auto"):
                with (
                    pytest.raises(ClusterError, match=f"cluster at {address} {problem}"),
                    connected(address),
                ):
                    pytest.fail("connected")
                assert ray.closed.is_set() == (failure is not None), "closed while init still runs"
            ray.released.set()
            assert ray.closed.wait(60)
            assert ray.closer == "blip2edge-ray"
            for thread in threading.enumerate():
                if thread.name == "blip2edge-ray":
                    thread.join(60)
            assert (logger.level, logger.filters) == before
            logger.warning("shown again")
            assert caplog.messages.count("no signals") == 0
            assert caplog.messages.count("shown again") == 1
            caplog.clear()
    with pytest.raises(ClusterError, match=rf"127\.0\.0\.1:{port} cannot be reached .*refused.*; start it with"):
        check_ray(f"127.0.0.1:{port}")


def test_the_handler_of_a_signal_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray replaces it by one that exits with status 15."""
    received: list[int] = []
    monkeypatch.setattr(connection, "require", lambda *_, **__: None)
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        for killed in (False, True):
            ray = FakeRay(None)

            def init(killed: bool = killed, **_: object) -> None:
                signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
                if killed:
                    signal.raise_signal(signal.SIGTERM)

            monkeypatch.setattr(ray, "init", init)
            monkeypatch.setitem(sys.modules, "ray", ray)
            with pytest.raises(SystemExit) if killed else nullcontext(), connected("local"):
                pass
            assert signal.getsignal(signal.SIGTERM) == mine
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["bulk", "pics", "-b", "bundle", "--ray-workers", "2"], "--ray-workers"),
        (["capfilt", "data", "--captioner", "x", "--matcher", "x", "--workers", "2"], "--workers"),
    ],
)
def test_a_number_of_workers_needs_ray(
    words: list[str], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {flag} needs --ray; give --ray, or leave {flag} out\n"
    assert not any(tmp_path.iterdir())


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'blip2edge\[ray\]'"):
        run_bulk(
            PictureSource(str(tmp_path)),
            Output.named(tmp_path / "x", None, False),
            BulkOptions(tmp_path),
            cluster=Cluster("local"),
        )
