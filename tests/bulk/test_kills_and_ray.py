"""A sample of the kills of ``benchmarks/bulk_kills.py``, and the same bytes on Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
    monkeypatch.setattr(pipeline, "check_ray", lambda: None)
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


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'blip2edge\[ray\]'"):
        run_bulk(
            PictureSource(str(tmp_path)),
            Output.named(tmp_path / "x", None, False),
            BulkOptions(tmp_path),
            cluster=Cluster("local"),
        )
