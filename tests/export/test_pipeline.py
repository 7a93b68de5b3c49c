"""An export publishes a verified bundle, or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="export needs torch")
pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

from blip2edge.bundle.bundle import Bundle  # noqa: E402
from blip2edge.bundle.token_table import TokenTable  # noqa: E402
from blip2edge.cli import main  # noqa: E402
from blip2edge.errors import CheckpointError, ExportError, OutputError, ParityError  # noqa: E402
from blip2edge.export import pipeline as pipeline_module  # noqa: E402
from blip2edge.export import verify, weights  # noqa: E402
from blip2edge.export.to_onnx import WeightSlot  # noqa: E402
from blip2edge.runtime.bench.memory import MachineMemory  # noqa: E402
from blip2edge.runtime.captioning.captioner import Captioner  # noqa: E402
from tests.drawing import Drawn, draw_pictures, rewrite_tensors  # noqa: E402

Export = Callable[..., Path]
pipeline: Any = pipeline_module  # its imports are replaced below
FC1 = "language_model.model.decoder.layers.0.fc1.weight"


def snapshot(directory: Path) -> dict[str, str]:
    """Every file below a directory, and its hash."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def copy(small: Drawn, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(small.directory, tmp_path / "checkpoint"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty directory to export into."""
    path = tmp_path / "out"
    path.mkdir()
    return path


def test_a_bundle_is_whole(quick: Export, small: Drawn, out: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    bundle = quick(small.directory, out / "bundle", progress=lambda *report: seen.append(report))
    graphs = ("vision_encoder", "bridge", "decoder")
    names = {"bundle.json", "tokenizer.json", "embed_tokens.safetensors"}
    names |= {f"{graph}.onnx{end}" for graph in graphs for end in ("", ".data")}
    assert {path.name for path in bundle.iterdir()} == names
    assert os.listdir(out) == ["bundle"]
    manifest = Bundle.open(bundle).manifest
    assert set(manifest.files) == names - {"bundle.json"}
    assert manifest.source["checkpoint"] == str(small.directory)
    assert len(manifest.source["sha256"]) == 64
    assert {"torch", "onnxruntime", "blip2edge"} <= set(manifest.versions)
    assert bundle.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in bundle.iterdir())
    assert {stage.split(":")[0] for stage, _, _ in seen} >= {*graphs, "verify"}
    assert all(0 <= done <= total for _, done, total in seen)


def test_two_exports_are_the_same_bytes(quick: Export, small: Drawn, out: Path) -> None:
    first, second = (snapshot(quick(small.directory, out / name)) for name in "ab")
    assert first == second


def test_parents_are_made(quick: Export, small: Drawn, out: Path) -> None:
    assert quick(small.directory, out / "a" / "b" / "bundle").is_dir()


@pytest.mark.parametrize("mode", ["full", "sample"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_precision_is_verified_both_ways(
    mode: str, precision: str, quick: Export, small: Drawn, out: Path
) -> None:
    bundle = quick(small.directory, out / "bundle", verify=mode, precision=precision)
    manifest = Bundle.open(bundle).manifest
    assert (manifest.verify, manifest.precision) == (mode, precision)
    for graph in manifest.graphs.values():
        assert graph.parity
        assert all(0 < parity.relative <= parity.tolerance == verify.TOLERANCES[precision] for parity in graph.parity)
        assert all(bool(parity.sample) == (mode == "sample" or precision == "bf16") for parity in graph.parity)
    assert not [path for path in bundle.iterdir() if path.name.startswith(".") and path.name != ".verified.json"]
    if precision != "bf16":
        assert Captioner.load(bundle, threads=1).caption(draw_pictures(1)[0], max_new_tokens=3).tokens


def test_the_token_table_is_the_checkpoints(quick: Export, small: Drawn, out: Path) -> None:
    embeddings: Any = small.model.get_input_embeddings()
    wanted = embeddings.weight.detach()
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        bundle = quick(small.directory, out / precision, precision=precision)
        table = TokenTable(bundle / "embed_tokens.safetensors", "embed_tokens", "float32")
        assert np.array_equal(table.rows(range(120)), wanted.to(dtype).float().numpy())
    from safetensors.torch import load_file

    assert torch.equal(load_file(out / "bf16" / "embed_tokens.safetensors")["embed_tokens"], wanted.to(torch.bfloat16))


# What fails, and what is left


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAILURES: dict[str, tuple[Any, str, BaseException]] = {
    "interrupted while writing": (pipeline, "write_weights", KeyboardInterrupt()),
    "interrupted while verifying": (pipeline, "check_hashes", KeyboardInterrupt()),
    "interrupted while sealing": (pipeline.Manifest, "write", KeyboardInterrupt()),
    "terminated": (pipeline, "_verify", SystemExit(143)),
    "no memory": (pipeline, "load_model", MemoryError()),
    "disk full: weights": (os, "fsync", FULL),
    "disk full: graph": (pipeline.ir, "save", FULL),
    "disk full: manifest": (pipeline.Manifest, "write", FULL),
    "disk full: table": (weights, "write_safetensors", FULL),
}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_leaves_what_was_there(
    name: str, forced: bool, quick: Export, small: Drawn, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        quick(small.directory, out / "bundle")
    before = snapshot(out)
    owner, attribute, error = FAILURES[name]
    monkeypatch.setattr(owner, attribute, fails(error))
    told = ("the disk is full", OutputError) if error is FULL else (None, type(error))
    with pytest.raises(told[1], match=told[0]):
        quick(small.directory, out / "bundle", force=forced)
    assert snapshot(out) == before
    assert os.listdir(out) == (["bundle"] if forced else [])


def test_a_bundle_without_parity_is_not_published(
    quick: Export, small: Drawn, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(verify.TOLERANCES, "fp32", 1e-12)
    with pytest.raises(ParityError, match=r"vision_encoder: image_embeds is off by .* more than the 1e-12"):
        quick(small.directory, out / "bundle")
    assert os.listdir(out) == []


def test_force_replaces(quick: Export, small: Drawn, out: Path) -> None:
    bundle = quick(small.directory, out / "bundle")
    (bundle / "optimized").mkdir()
    quick(small.directory, bundle, force=True, precision="fp16")
    assert Bundle.open(bundle).manifest.precision == "fp16"
    assert not (bundle / "optimized").exists()
    assert os.listdir(out) == ["bundle"]


def test_an_existing_output_needs_force(quick: Export, small: Drawn, out: Path) -> None:
    with pytest.raises(OutputError, match=r"exists; .*force=True"):
        quick(small.directory, out)
    assert quick(small.directory, out, force=True) == out  # an empty directory


def test_force_replaces_nothing_but_bundles(quick: Export, small: Drawn, copy: Path) -> None:
    before = snapshot(copy)
    with pytest.raises(OutputError, match=r"no bundle\.json, so force=True does not replace it"):
        quick(small.directory, copy, force=True)
    with pytest.raises(OutputError, match=r"would replace .*, which it is made from"):
        quick(copy, copy, force=True)
    assert snapshot(copy) == before


@pytest.mark.parametrize("force", [False, True])
def test_the_output_is_a_file(force: bool, quick: Export, small: Drawn, out: Path) -> None:
    (out / "file").write_text("mine")
    with pytest.raises(OutputError):
        quick(small.directory, out / "file", force=force)
    with pytest.raises(OutputError, match=r"bundle cannot be written, because .*file is not a directory"):
        quick(small.directory, out / "file" / "bundle", force=force)
    assert (out / "file").read_text() == "mine"
    assert os.listdir(out) == ["file"]


def test_an_output_that_cannot_be_written(quick: Export, small: Drawn) -> None:
    """/proc refuses even root."""
    with pytest.raises(OutputError, match="could not be written"):
        quick(small.directory, Path("/proc/blip2edge-bundle"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent(quick: Export, small: Drawn, out: Path) -> None:
    out.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            quick(small.directory, out / "bundle")
    finally:
        out.chmod(0o755)


# What verification finds


@pytest.mark.parametrize("mode", ["full", "sample"])
@pytest.mark.parametrize("file", ["vision_encoder.onnx.data", "decoder.onnx.data", "embed_tokens.safetensors"])
def test_a_flipped_bit_is_found(
    file: str, mode: str, quick: Export, small: Drawn, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the lowest bit of the last weight, where no answer would show it."""
    inner = pipeline._verify

    def corrupt(source: Any, written: Any, *rest: Any) -> None:
        path = written["decoder"].weights.file.with_name(file)
        data = bytearray(path.read_bytes())
        data[-4] ^= 1
        path.write_bytes(data)
        inner(source, written, *rest)

    monkeypatch.setattr(pipeline, "_verify", corrupt)
    with pytest.raises(ExportError, match=f"{file} differs from the checkpoint"):
        quick(small.directory, out / "bundle", verify=mode)
    assert os.listdir(out) == []


@pytest.mark.parametrize("mode", ["full", "sample"])
def test_a_graph_that_computes_something_else_is_found(
    mode: str, quick: Export, small: Drawn, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of the checkpoint; a norm's epsilon is not."""

    def trace(module: Any, spec: Any, inner: Any = pipeline.trace) -> Any:
        traced = inner(module, spec)
        for node in traced.model.graph:
            if node.op_type == "LayerNormalization":
                node.attributes["epsilon"] = pipeline.ir.AttrFloat32("epsilon", 0.5)
        return traced

    monkeypatch.setattr(pipeline, "trace", trace)
    monkeypatch.setattr(verify, "trace", trace)
    with pytest.raises(ParityError, match="vision_encoder: image_embeds is off by"):
        quick(small.directory, out / "bundle", verify=mode)
    assert os.listdir(out) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        (FC1, "language.layers.0.fc1.weight"),
        ("language_model.model.decoder.embed_tokens.weight", "language.head.weight"),  # tied
        ("query_tokens", "bridge.qformer.query_tokens"),
    ],
)
def test_weights_that_are_not_finite_are_named(
    name: str, told: str, value: float, quick: Export, copy: Path, out: Path
) -> None:
    rewrite_tensors(copy, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    with pytest.raises(ExportError, match=f"the weight {told} holds values that are not finite"):
        quick(copy, out / "bundle")
    assert os.listdir(out) == []


@pytest.mark.parametrize("name", [FC1, "language_model.model.decoder.embed_tokens.weight"])
def test_a_weight_beyond_fp16_is_named(name: str, quick: Export, copy: Path, out: Path) -> None:
    rewrite_tensors(copy, lambda tensors: tensors[name].view(-1)[7:8].fill_(-1e5))
    with pytest.raises(ExportError, match=r"the weight \S+ reaches 100000, beyond the 65504 of float16") as caught:
        quick(copy, out / "bundle", precision="fp16")
    assert "precision bf16" in str(caught.value)
    assert os.listdir(out) == []


def test_large_weights_whose_sum_overflows_are_finite() -> None:
    tensor = torch.full((4, 4), 3e38)
    data = weights.to_bytes(tensor, WeightSlot("a.weight", (4, 4)), torch.float32)
    assert bytes(data) == tensor.numpy().tobytes()


# What is missing beside the weights


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_no_tokenizer(quick: Export, copy: Path, out: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; save the processor too"):
        quick(copy, out / "bundle")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="transformers cannot load the tokenizer of"):
        quick(copy, out / "bundle")
    assert os.listdir(out) == []


def test_no_processor(quick: Export, copy: Path, out: Path) -> None:
    (copy / "processor_config.json").unlink()
    (copy / "preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json; save the processor too"):
        quick(copy, out / "bundle")
    assert os.listdir(out) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"size": {"height": 48, "width": 32}}, "48 x 32, but the vision encoder takes 32 x 32"),
        ({"size": {"height": 0, "width": 32}}, "size"),
        ({"size": "large"}, "processor_config.json, image_processor: size"),
        ({"image_mean": [0.5, 0.5]}, "processor_config.json, image_processor: "),
        ({"image_std": [0.5, 0.0, 0.5]}, "std"),
        ({"resample": 77}, "resample"),
    ],
)
def test_a_processor_that_does_not_fit(values: dict[str, Any], told: str, quick: Export, copy: Path, out: Path) -> None:
    path = copy / "processor_config.json"
    processor = json.loads(path.read_text())
    path.write_text(json.dumps(processor | {"image_processor": processor["image_processor"] | values}))
    with pytest.raises(CheckpointError) as caught:
        quick(copy, out / "bundle")
    assert told in str(caught.value)
    assert os.listdir(out) == []


def test_a_tokenizer_of_another_model(quick: Export, copy: Path, out: Path) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["two"] = 1000
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="gives the id 1000, but the language model has 120 tokens"):
        quick(copy, out / "bundle")
    assert os.listdir(out) == []


def test_a_machine_with_too_little_memory(
    small: Drawn, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export stops before it writes anything; with --anyway it goes on after a warning."""
    monkeypatch.setattr("blip2edge.runtime.bench.memory.machine_memory", lambda: MachineMemory(1000, 2000))
    words = ["export", str(small.directory), "-o", str(out / "bundle"), "--no-optimize"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "error: the export needs at least 0.0 GB of memory, and this machine has 0.0 GB with its swap" in error
    assert "or try it with --anyway" in error
    assert os.listdir(out) == []
    monkeypatch.setattr(pipeline, "_write_graphs", fail)
    assert main([*words, "--anyway"]) == 1
    error = capsys.readouterr().err
    warning = (
        "warning: the export may need about 0.5 GB of memory, and 0.0 GB are free; choose the verification `sample`"
    )
    assert warning in error
    assert "error: it went on" in error


def fail(*_: Any) -> None:
    raise ExportError("it went on")
