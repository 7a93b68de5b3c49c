"""``benchmarks/watch_rtsp.py`` says at once what is wrong if its server or ``watch`` ends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("watch_rtsp", BENCHMARKS / "watch_rtsp.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "watch_rtsp", module)
    spec.loader.exec_module(module)
    return module


def process(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_server_that_ends_is_not_waited_for(benchmark_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    ended = process("raise SystemExit(3)")
    ended.communicate()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: ended)
    monkeypatch.setattr(benchmark_script.time, "sleep", waits.append)
    with pytest.raises(SystemExit, match=r"the RTSP server has ended with status 3 .*gir1\.2-gst-rtsp-server-1\.0"):
        benchmark_script.start_server(1)
    assert waits == []


def test_the_messages_of_a_watch_that_ends_are_shown(benchmark_script: ModuleType) -> None:
    code = "import sys; print('{\"text\": 1}'); print('error: no stream', file=sys.stderr); sys.exit(1)"
    with process(code) as running:
        watch = benchmark_script.Watch(running)
        with pytest.raises(SystemExit) as raised:
            watch.take(2)
    assert str(raised.value) == "error: watch has ended with status 1; its messages:\nerror: no stream"
