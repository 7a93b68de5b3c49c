"""The backend ``cuda-decoder`` from `optimize` to captions: a simulated driver runs the kernels on the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="the other graphs run in ONNX Runtime")
pytest.importorskip("onnxscript", reason="the bundles are exported here")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.bundle.trust.integrity import sha256_of
from blip2edge.cli.optimize import report_table
from blip2edge.errors import BackendError, Blip2EdgeError, BundleError, BundleIntegrityError
from blip2edge.optimization import pipeline
from blip2edge.optimization.cuda_kernels import compiled as making
from blip2edge.optimization.cuda_kernels import timing
from blip2edge.optimization.pipeline import OptimizedReport, optimize
from blip2edge.runtime.backends import onnxruntime_cuda, open_graph, probe
from blip2edge.runtime.backends.base import BACKENDS, open_session
from blip2edge.runtime.backends.open_graph import GraphOpener, StaleTimingWarning
from blip2edge.runtime.backends.optimized_copy import CONDITIONS, RECORD, read_copy, timing_conditions
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.cuda import backend, copy_files
from blip2edge.runtime.cuda.compilation import compiler
from blip2edge.runtime.cuda.compilation.compiler import TARGETS
from blip2edge.runtime.cuda.compilation.cubin import Usage
from blip2edge.runtime.cuda.copy_files import LAYOUT, find_cubin, read_layout
from blip2edge.runtime.cuda.decoding.decoder import KernelDecoder
from blip2edge.runtime.cuda.kernel import KERNELS, Kernel
from tests.drawing import draw_pictures
from tests.runtime.backends.test_device_arrays import on_the_cpu
from tests.runtime.cuda.fake_driver import CUBIN, FakeDriver

PROMPTS = ["a photo of", "what is it ?", "two red cats and a dog"]
OPTIONS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 10},
    {"max_new_tokens": 6, "num_beams": 3},
    {"max_new_tokens": 8, "repetition_penalty": 1.4, "min_new_tokens": 4},
    {"max_new_tokens": 5, "temperature": 1.2, "seed": 5},
    {"max_new_tokens": 6, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5},
    {"max_new_tokens": 4, "temperature": 0.9, "min_p": 0.05, "seed": 6},
)
COMPILED: list[Kernel] = []


def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of NVRTC: every cubin has the kernels, which are remembered."""

    def compile_kernels(kernels: list[Kernel], capability: int) -> bytes:
        COMPILED[:] = kernels
        return CUBIN

    monkeypatch.setattr(making, "supported_targets", lambda: TARGETS)
    monkeypatch.setattr(making, "compile_kernels", compile_kernels)
    monkeypatch.setattr(making, "kernel_usage", lambda _: {one.name: Usage(64, 0, 0) for one in COMPILED})


@pytest.fixture(scope="module")
def made(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> OptimizedReport:
    """A bundle with the copy; not to be changed."""
    bundle = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("kernels") / "bundle")
    with pytest.MonkeyPatch.context() as monkeypatch:
        compiling(monkeypatch)
        return optimize(bundle, "cuda-decoder")


def path_of(report: OptimizedReport) -> Path:
    return report.directory.parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeDriver]:
    """Puts a simulated GPU into this machine; vision encoder and bridge run on the CPU."""

    def plug_in(**given: Any) -> FakeDriver:
        api = FakeDriver(COMPILED, **given)
        card = probe.Gpu("simulated", 87, 4, 8)
        monkeypatch.setattr(backend, "load_driver", lambda: api)
        monkeypatch.setattr(probe, "nvidia_driver", lambda: probe.Driver("13.0", (card,), ""))
        monkeypatch.setattr(onnxruntime_cuda, "open_graph", on_the_cpu)
        return api

    return plug_in


def test_captions_are_those_of_the_cpu(made: OptimizedReport, gpu: Callable[..., FakeDriver]) -> None:
    """Also from two threads at once; afterwards nothing is left on the GPU."""
    api, pictures = gpu(), draw_pictures(3, seed=2)
    with (
        Captioner.load(path_of(made), backend="cpu", threads=1) as oracle,
        Captioner.load(path_of(made), backend="cuda-decoder") as captioner,
    ):
        assert isinstance(captioner.generator.language.decoder, KernelDecoder)
        assert captioner.graphs.copied == {DECODER}
        for options in OPTIONS:
            wanted = [one.tokens for one in oracle.caption_many(pictures, prompts=PROMPTS, **options)]
            found = [one.tokens for one in captioner.caption_many(pictures, prompts=PROMPTS, **options)]
            assert found == wanted, options

        def caption(index: int) -> tuple[int, ...]:
            return captioner.caption(pictures[index], prompt=PROMPTS[index], max_new_tokens=4).tokens

        alone = [caption(index) for index in range(3)]
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(caption, range(3))) == alone
    assert api.calls.count("cuGraphLaunch") > 10
    assert not api.memory
    assert not api.live
    assert api.retained == 0


def test_the_record_says_that_nothing_ran(made: OptimizedReport) -> None:
    table = report_table(made)
    assert "the kernels are compiled for sm_100, sm_110, sm_120, sm_75" in table
    assert "neither run nor measured: no GPU here runs the kernels" in table
    assert "the kernels round the weights of this bundle from FP32 to FP16" in table
    assert "vision_encoder is not optimized: ONNX Runtime runs it: make its copy with --backend cuda" in table
    assert "compiled, " in table
    record = json.loads((made.directory / RECORD).read_text())
    assert set(record["files"]) == {LAYOUT, *(f"sm_{one}.cubin" for one in TARGETS)}
    assert record["graphs"][DECODER]["cosine"] is None
    assert record["graphs"][DECODER]["milliseconds"] is None


def test_a_bundle_without_kernels_is_refused_with_the_command(
    tiny_bundle: Path, gpu: Callable[..., FakeDriver]
) -> None:
    gpu()
    with pytest.raises(BackendError, match=r"has no kernels for the backend cuda-decoder; .* optimize .*cuda-decoder"):
        Captioner.load(tiny_bundle, backend="cuda-decoder")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bundle_sha256": "0" * 64}, "it was made from another bundle, or the bundle has changed since"),
        ({"schema_version": 0}, "another version of blip2edge made it"),
        ({"files": 7}, "its optimized.json is damaged"),
        ({"graphs": {}}, "it has no decoder"),
    ],
)
def test_an_unusable_copy_is_refused_with_its_reason(
    made: OptimizedReport, tmp_path: Path, gpu: Callable[..., FakeDriver], changes: dict[str, Any], reason: str
) -> None:
    gpu()
    bundle = shutil.copytree(path_of(made), tmp_path / "bundle")
    path = bundle / "optimized" / "cuda-decoder" / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BackendError, match=f"has a copy .* that cannot be used: {reason}; .* optimize "):
        Captioner.load(bundle, backend="cuda-decoder")


@pytest.fixture
def timed(
    made: OptimizedReport, tmp_path: Path, gpu: Callable[..., FakeDriver], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Bundle]:
    """Makes a bundle whose kernels were timed, on this machine unless another condition is given."""
    gpu()
    works = probe.Check("CUDA", True, "")
    monkeypatch.setattr(probe, "check_provider", lambda *_: works)
    monkeypatch.setattr(open_graph, "missing", lambda _: [])

    def make(times: list[float] | None, **conditions: str) -> Bundle:
        bundle = shutil.copytree(path_of(made), tmp_path / "bundle")
        path = bundle / "optimized" / "cuda-decoder" / RECORD
        values = json.loads(path.read_text())
        here = timing_conditions(Bundle.open(bundle))
        assert here.keys() == CONDITIONS.keys() >= conditions.keys()
        values["graphs"][DECODER] |= {"milliseconds": times, "timed_with": {**here, **conditions} if times else {}}
        path.write_text(json.dumps(values))
        return Bundle.open(bundle)

    return make


@pytest.mark.parametrize(
    ("times", "chosen"), [(None, "cuda"), ([3.0, 2.0], "cuda-decoder"), ([2.0, 3.0], "cuda"), ([2.0, 2.0], "cuda")]
)
def test_auto_needs_a_timing(timed: Callable[..., Bundle], times: list[float] | None, chosen: str) -> None:
    assert GraphOpener(timed(times), "auto").backend == chosen


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu": "NVIDIA L4"}, r"another GPU \(NVIDIA L4 then, simulated now\)"),
        ({"driver": "12.6"}, r"another CUDA version of the driver \(12\.6 then, 13\.0 now\)"),
        ({"onnxruntime": ""}, r"another version of ONNX Runtime \(none then, "),
        ({"cuda_copy": "0" * 64}, "another copy for the backend cuda;"),
        ({"gpu": "A", "driver": "B"}, "another GPU .*, another CUDA version"),
    ],
)
def test_a_timing_under_other_conditions_is_stale(
    timed: Callable[..., Bundle], change: dict[str, str], reason: str
) -> None:
    bundle = timed([3.0, 2.0], **change)
    with pytest.warns(StaleTimingWarning, match=f"auto chooses cuda, not cuda-decoder, .*: {reason}.* optimize "):
        assert GraphOpener(bundle, "auto").backend == "cuda"
    assert GraphOpener(bundle, "cuda-decoder").backend == "cuda-decoder"  # without a warning


def test_a_new_copy_for_cuda_makes_a_timing_stale(timed: Callable[..., Bundle]) -> None:
    """A record of an earlier version names no conditions."""
    bundle = timed([3.0, 2.0])
    optimize(bundle.path, "cuda", graphs=[DECODER])
    with pytest.warns(StaleTimingWarning, match="another copy for the backend cuda"):
        assert GraphOpener(Bundle.open(bundle.path), "auto").backend == "cuda"
    path = bundle.path / "optimized" / "cuda-decoder" / RECORD
    values = json.loads(path.read_text())
    values["graphs"][DECODER]["timed_with"]["cuda_copy"] = sha256_of(bundle.path / "optimized" / "cuda" / RECORD)
    path.write_text(json.dumps(values))
    assert GraphOpener(Bundle.open(bundle.path), "auto").backend == "cuda-decoder"
    del values["graphs"][DECODER]["timed_with"]
    path.write_text(json.dumps(values))
    with pytest.warns(StaleTimingWarning, match="does not say what the kernels were compared with"):
        assert GraphOpener(Bundle.open(bundle.path), "auto").backend == "cuda"


def test_kernels_of_another_version_are_not_used(
    timed: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their parameters may have another form: a GPU would read other numbers without an error."""
    bundle = timed([3.0, 2.0])
    assert GraphOpener(bundle, "auto").backend == "cuda-decoder"
    sources = shutil.copytree(KERNELS, tmp_path / "kernels")
    monkeypatch.setattr(copy_files, "KERNELS", sources)
    before = copy_files.kernel_sources.__wrapped__()
    file = sources / "move.cuh"
    file.write_text(file.read_text() + "// a comment\n\n")
    assert copy_files.kernel_sources.__wrapped__() == before == copy_files.kernel_sources()
    file.write_text(file.read_text().replace("long long used;", "int used;"))
    changed = copy_files.kernel_sources.__wrapped__()
    assert changed != before
    monkeypatch.setattr(copy_files, "kernel_sources", lambda: changed)
    with pytest.raises(BundleError, match=r"its kernels were compiled from other sources.*; make the copy again"):
        backend.open_decoder(bundle, bundle.path / "optimized" / "cuda-decoder")
    with pytest.warns(StaleTimingWarning, match="compiled from other sources"):
        assert GraphOpener(bundle, "auto").backend == "cuda"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("cuda-decoder", "blip2edge optimize .* cuda-decoder$"),
        ("tensorrt", "blip2edge build .* tensorrt$"),
        ("rtx", "blip2edge build .* rtx$"),
    ],
)
def test_a_backend_that_runs_no_graphs_says_what_to_make(tiny_bundle: Path, name: str, command: str) -> None:
    runs = "which runs engines or kernels that are made from graphs"
    with pytest.raises(BackendError, match=f"got backend {name}, {runs}; make them: {command}"):
        open_session(tiny_bundle / "decoder.onnx", name)
    assert {one for one, row in BACKENDS.items() if row.made_by} == {"cuda-decoder", "tensorrt", "rtx"}


def test_an_error_while_closing_does_not_replace_the_first_one(
    made: OptimizedReport, gpu: Callable[..., FakeDriver]
) -> None:
    """No memory for the weights, and then nothing can be freed either."""
    failing = {"cuMemAlloc": 2, "cuModuleUnload": 1}
    api = gpu(fails=lambda name: failing.get(name, 0))
    with pytest.raises(BackendError, match="cuMemAlloc failed: out of memory"):
        Captioner.load(path_of(made), backend="cuda-decoder")
    assert set(api.live.values()) == {"module"}
    assert api.retained == 0


def test_optimize_times_the_kernels_where_a_gpu_runs_them(
    tiny_bundle: Path, tmp_path: Path, gpu: Callable[..., FakeDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "TOKENS", 4)
    monkeypatch.setattr(pipeline, "nvidia_driver", lambda: probe.nvidia_driver())
    compiling(monkeypatch)
    api = gpu()
    report = optimize(bundle, "cuda-decoder")
    times = report.record.graphs[DECODER].milliseconds
    assert times is not None
    assert min(times) > 0
    assert report.record.versions["gpu"] == "simulated"
    assert report.record.graphs[DECODER].timed_with == timing_conditions(Bundle.open(bundle))
    assert "neither run nor measured" not in report_table(report)
    assert not api.live
    monkeypatch.setattr(timing, "_decoded", lambda decoder, _: [id(decoder)])
    report = optimize(bundle, "cuda-decoder")
    assert report.record.graphs[DECODER].milliseconds is None  # other tokens prove nothing
    assert not report.record.graphs[DECODER].timed_with
    assert "warning: on this GPU the kernels chose other tokens than the CUDA provider" in report_table(report)
    gpu(fails=lambda name: 2 * (name == "cuMemAlloc"))
    assert optimize(bundle, "cuda-decoder").record.graphs[DECODER].milliseconds is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"capability": (6, 1)}, "expected a GPU of compute capability 7.5, .*, found one of 6.1"),
        ({"fails": lambda name: 2 * (name == "cuMemAlloc")}, "cuMemAlloc failed: out of memory"),
        ({"fails": lambda name: 100 * (name == "cuInit")}, "cuInit failed"),
    ],
)
def test_a_gpu_that_does_not_run_it_is_an_error_and_nothing_is_left(
    made: OptimizedReport, gpu: Callable[..., FakeDriver], given: dict[str, Any], message: str
) -> None:
    api = gpu(**given)
    with pytest.raises(BackendError, match=message):
        Captioner.load(path_of(made), backend="cuda-decoder")
    assert not api.live
    assert api.retained == 0


def test_no_driver_is_named(made: OptimizedReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "load_driver", lambda: None)
    monkeypatch.setattr(probe, "nvidia_driver", lambda: probe.Driver(problem="none: libcuda.so.1 is not there"))
    with pytest.raises(BackendError, match="there is no working NVIDIA driver here"):
        backend.open_decoder(Bundle.open(path_of(made)), made.directory)


def test_a_gpu_gets_its_cubin(made: OptimizedReport) -> None:
    found = {number: find_cubin(made.directory, number).name for number in (75, 86, 87, 89, 90, 103, 110, 120, 121)}
    assert found == {
        75: "sm_75.cubin", 86: "sm_86.cubin", 87: "sm_87.cubin", 89: "sm_89.cubin", 90: "sm_90.cubin",
        103: "sm_100.cubin", 110: "sm_110.cubin", 120: "sm_120.cubin", 121: "sm_120.cubin",
    }  # fmt: skip
    for number in (70, 72, 101, 130):  # Jetson boards run cubins of their own version alone
        with pytest.raises(BackendError, match="for which the copy has kernels"):
            find_cubin(made.directory, number)


BROKEN: tuple[tuple[Callable[[dict[str, Any]], object], str], ...] = (
    (lambda values: values.pop("width"), "width"),
    (lambda values: values.update(schema_version=1), "schema_version"),
    (lambda values: values.update(kernels="0" * 64), "its kernels were compiled from other sources"),
    (lambda values: values.update(kernels=7), "kernels"),
    (lambda values: values.update(head_dim=12), "a multiple of 8 up to 256"),
    (lambda values: values["head"]["weight"].update(file="../secret"), "file"),
    (lambda values: values["head"]["weight"].update(file="other.data"), "other.data is no file of the bundle"),
    (lambda values: values["head"]["weight"].update(offset=1 << 40), "ends behind the end"),
    (lambda values: values["layers"][0]["up"]["weight"].update(dtype="int8"), "is in int8 without scales"),
    (lambda values: values["layers"][0]["down"]["weight"].update(shape=[8, 8]), "a matrix .* .8, 8"),
    (lambda values: values["layers"][0]["query"]["bias"].update(shape=[3]), r"a bias of 32 values|has the shape .3"),
    (lambda values: values["final_norm"]["weight"].update(shape=[3]), "each norm to have 32 values"),
    (lambda values: values["positions"].update(shape=[7, 3]), r"expected learned positions \[P, 32\]"),
    (lambda values: values.update(heads=3, kv_heads=2), "do not share 2 heads of keys evenly"),
)


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[str(number) for number in range(len(BROKEN))])
def test_a_layout_that_does_not_fit_is_refused(
    made: OptimizedReport, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    bundle = Bundle.open(path_of(made))
    values = json.loads((made.directory / LAYOUT).read_text())
    read_layout(bundle, made.directory)
    change(values)
    (tmp_path / LAYOUT).write_text(json.dumps(values))
    with pytest.raises(BundleError, match=message):
        read_layout(bundle, tmp_path)


def test_a_changed_file_is_noticed(made: OptimizedReport, tmp_path: Path) -> None:
    bundle = shutil.copytree(path_of(made), tmp_path / "bundle")
    (bundle / "optimized" / "cuda-decoder" / "sm_87.cubin").write_bytes(b"\x7fELF other kernels")
    with pytest.raises(BundleIntegrityError, match=r"sm_87\.cubin"):
        read_copy(Bundle.open(bundle), "cuda-decoder", use_stamps=False)


def test_nothing_is_published_without_nvrtc_or_room(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")

    def absent() -> Any:
        raise BackendError("NVRTC does not load: no such library", "pip install it")

    monkeypatch.setattr(compiler, "load_nvrtc", absent)
    with pytest.raises(BackendError, match="NVRTC does not load"):
        optimize(bundle, "cuda-decoder")
    compiling(monkeypatch)
    monkeypatch.setattr(making, "kernel_usage", lambda _: {one.name: Usage(300, 0, 0) for one in COMPILED})
    with pytest.raises(BackendError, match="to fit a GPU sm_75, found Usage"):
        optimize(bundle, "cuda-decoder")
    with pytest.raises(Blip2EdgeError, match="from the graph decoder, which is not in the bundle or not selected"):
        optimize(bundle, "cuda-decoder", graphs=["vision_encoder"])
    assert not (bundle / "optimized" / "cuda-decoder").exists()
