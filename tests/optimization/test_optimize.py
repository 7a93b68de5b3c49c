"""The optimized copy: its results equal the bundle's, it shares weights, and it is ignored where it does not fit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the copy is for ONNX Runtime")

from blip2edge.bundle.bundle import Bundle
from blip2edge.cli import main
from blip2edge.errors import BackendError, BundleIntegrityError, UsageError
from blip2edge.optimization import race, recipes
from blip2edge.optimization.pipeline import OptimizedReport, optimize
from blip2edge.optimization.recipes import Recipe
from blip2edge.runtime.backends.optimized_copy import RECORD, read_copy
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.pipeline import DecoderOnly
from blip2edge.runtime.decoding.kv.in_place import InPlaceDecoder, InPlaceState
from tests.drawing import draw_pictures
from tests.engine.conftest import BundleOf
from tests.runtime.decoding.test_growing import TAIL, TEXTS, alone, close

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 4},
    {"num_beams": 3, "repetition_penalty": 1.4, "min_new_tokens": 4},
    {"temperature": 1.2, "seed": 5},
)
PROMPTS = (None, "a photo of", "Question: what is two? Short answer:", "red dog", None)


@pytest.fixture(scope="module")
def copied(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> OptimizedReport:
    bundle = tmp_path_factory.mktemp("optimised") / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    reports: list[tuple[str, int, int]] = []
    made = optimize(bundle, progress=lambda stage, done, total: reports.append((stage, done, total)))
    for name in ("vision_encoder", "bridge", "decoder"):  # a step for each recipe that is tried
        steps = [(done, total) for stage, done, total in reports if stage == f"optimize {name}"]
        assert steps == [(0, 1), *((done, len(steps) - 1) for done in range(len(steps) - 1))]
        assert len(steps) > 2
    assert reports[-1] == ("optimize", 3, 3)
    return made


@pytest.fixture(scope="module")
def bundle(copied: OptimizedReport) -> Path:
    return copied.directory.parents[1]


@pytest.fixture(scope="module")
def fast(bundle: Path) -> Captioner:
    return Captioner.load(bundle, threads=1)


@pytest.fixture(scope="module")
def decoder(fast: Captioner) -> InPlaceDecoder:
    language = fast.generator.language
    assert isinstance(language, DecoderOnly)
    decoder = language.decoder
    assert isinstance(decoder, InPlaceDecoder)
    return decoder


def answers(captioner: Captioner, **options: Any) -> list[tuple[int, ...]]:
    results = captioner.caption_many(draw_pictures(5, 1), prompts=PROMPTS, batch_size=3, max_new_tokens=10, **options)
    return [result.tokens for result in results]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_copy_says_what_the_bundle_says(options: dict[str, Any], fast: Captioner, tiny_bundle: Path) -> None:
    portable = Captioner.load(tiny_bundle, threads=1)
    assert fast.graphs.copied
    assert not portable.graphs.copied
    assert answers(fast, **options) == answers(portable, **options)


def test_the_record_tells_what_was_done(copied: OptimizedReport, bundle: Path) -> None:
    values = json.loads((copied.directory / RECORD).read_text())
    assert values["bundle_sha256"] == Bundle.open(bundle).sha256
    assert values["graphs"].keys() | values["left"].keys() == {"vision_encoder", "bridge", "decoder"}
    for graph in values["graphs"].values():
        assert graph["cosine"] > 0.99999
        assert all(parity["relative"] <= parity["tolerance"] for parity in graph["parity"])
        assert graph["milliseconds"][0] > 0
    assert set(values["files"]) == {path.name for path in copied.directory.iterdir()} - {
        RECORD,
        ".verified.json",
    }


WITHOUT_CACHE = ("fused attention", "fused activations")


@pytest.mark.parametrize("added", [(), ("pointwise convolutions",)])
def test_a_recipe_of_its_own_kind(
    added: tuple[str, ...], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without convolutions weights are shared, with them they are laid out at load."""
    whole, decoder = Recipe((*WITHOUT_CACHE, *added)), Recipe(("shared cache", *added), ("shared cache",))
    monkeypatch.setattr(recipes, "FLOAT", (whole,))
    monkeypatch.setattr(recipes, "DECODERS", (decoder,))
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    copied = optimize(bundle)
    graphs = copied.record.graphs
    assert graphs.keys() == {"vision_encoder", "bridge", "decoder"}
    laid_out = {name for name, graph in graphs.items() if graph.layout}
    assert laid_out == {name for name, graph in graphs.items() if "pointwise convolutions" in graph.passes}
    assert laid_out >= ({"vision_encoder", "decoder"} if added else set())
    own = sum(path.stat().st_size for path in copied.directory.glob("*.data"))
    parents = sum(path.stat().st_size for path in bundle.glob("*.data"))
    assert (own < parents / 4) is not bool(added)
    fast, portable = Captioner.load(bundle, threads=1), Captioner.load(tiny_bundle, threads=1)
    assert set(fast.graphs.copied) == graphs.keys()
    for options in OPTIONS:
        assert answers(fast, **options) == answers(portable, **options)


def test_a_copy_of_another_bundle_is_passed_over(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "bundle"
    shutil.copytree(bundle, other)
    manifest = json.loads((other / "bundle.json").read_text())
    manifest["versions"]["note"] = "another"
    (other / "bundle.json").write_text(json.dumps(manifest))
    assert not Captioner.load(other, threads=1).graphs.copied


def test_a_copy_by_another_version_is_passed_over(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "bundle"
    shutil.copytree(bundle, other)
    record = other / "optimized" / "cpu" / RECORD
    values = json.loads(record.read_text())
    values["versions"]["onnxruntime"] = "0.1"
    record.write_text(json.dumps(values))
    assert not Captioner.load(other, threads=1).graphs.copied


def test_the_copy_of_a_quantized_bundle_is_read(bundle_of: BundleOf, tmp_path: Path) -> None:
    """Quantized graphs are compared by cosine only: without a tolerance, which has no finite value to record."""
    bundle = Path(shutil.copytree(bundle_of("blip2-opt", "int8"), tmp_path / "bundle"))
    report = optimize(bundle)
    assert report.record.graphs
    assert all((graph.cosine or 0.0) > 0 and graph.parity == () for graph in report.record.graphs.values())
    assert read_copy(Bundle.open(bundle), "cpu") == (report.directory, report.record)


def test_a_copy_that_was_changed_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "bundle"
    shutil.copytree(bundle, other)
    graph = next((other / "optimized" / "cpu").glob("*.onnx"))
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match="blip2edge optimize"):
        Captioner.load(other, threads=1)


def test_there_is_a_copy_for_some_backends_only(bundle: Path) -> None:
    with pytest.raises(UsageError, match="expected backend to be one of cpu, openvino, cuda, cuda-decoder, got abacus"):
        optimize(bundle, "abacus")


# The state over shared buffers


def start(decoder: InPlaceDecoder, rows: tuple[int, ...] = (0, 1, 2)) -> InPlaceState:
    return decoder.prefill([decoder.table.rows(TEXTS[row]) for row in rows])[1]


def test_extending_is_stepping(decoder: InPlaceDecoder) -> None:
    stepped, extended = start(decoder), start(decoder)
    one_by_one = np.stack([stepped.step(TAIL[:, at]) for at in range(3)], axis=1)
    close(extended.extend(TAIL), one_by_one)
    assert extended.lengths.tolist() == stepped.lengths.tolist() == [7, 5, 6]


@pytest.mark.parametrize("kept", [[3, 3, 3], [0, 3, 1], [2, 0, 3]])
def test_what_is_forgotten_was_never_read(decoder: InPlaceDecoder, kept: list[int]) -> None:
    state = start(decoder)
    lengths = state.lengths
    state.extend(TAIL)
    state.truncate(lengths + kept)
    logits = state.step(np.array([6, 5, 4]))
    for row, token in enumerate((6, 5, 4)):
        close(logits[row], alone(decoder, row, [*TAIL[row, : kept[row]].tolist(), token]))
    with pytest.raises(ValueError, match="cannot keep"):
        state.truncate(state.lengths + 1)


def test_rows_join_and_leave(decoder: InPlaceDecoder) -> None:
    state = start(decoder, (1,))
    state.step(np.array([9]))
    state.join(start(decoder, (0, 2)))
    logits = state.step(np.array([5, 6, 7]))
    for row, (text, tokens) in enumerate(((1, [9, 5]), (0, [6]), (2, [7]))):
        close(logits[row], alone(decoder, text, tokens))
    state.select(np.array([2, 0, 0]))
    logits = state.step(np.array([8, 4, 6]))
    close(logits[0], alone(decoder, 2, [7, 8]))
    close(logits[1], alone(decoder, 1, [9, 5, 4]))
    close(logits[2], alone(decoder, 1, [9, 5, 6]))


def test_a_cache_grows_to_the_context(decoder: InPlaceDecoder) -> None:
    state = start(decoder, (0,))
    tokens = [5 + at % 7 for at in range(decoder.max_positions - len(TEXTS[0]))]
    logits = [state.step(np.array([token]))[0] for token in tokens]
    close(logits[-1], alone(decoder, 0, tokens))


def test_inspect_tells_of_the_copy_and_what_is_left_of_one_is_replaced(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "bundle"
    shutil.copytree(bundle, other)
    assert main(["inspect", str(other)]) == 0
    assert "optimized for cpu: vision_encoder" in capsys.readouterr().out
    (other / "optimized" / "cpu" / RECORD).unlink()
    assert main(["inspect", str(other)]) == 0
    told = f"optimized for cpu: not used, because it belongs to another bundle or version: blip2edge optimize {other}"
    assert told in capsys.readouterr().out
    assert main(["optimize", str(other), "--backend", "cpu"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(other)]) == 0
    assert "not run" not in capsys.readouterr().out


def test_the_portable_graph_is_kept_where_no_form_is_faster(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    monkeypatch.setattr(race, "fastest", lambda task, name, portable, forms, **_: (portable, (1.5, 1.6)))
    record = optimize(own).record
    assert record.graphs == {}
    assert record.files == {}
    assert record.left["decoder"] == "the portable graph is faster here (1.5 ms)"
    assert not Captioner.load(own, threads=1).graphs.copied


@pytest.mark.parametrize(("backend", "advised"), [("cuda-decoder", True), ("cuda", True), ("cpu", False)])
def test_without_onnxruntime_the_gpu_s_package_is_named(
    backend: str, advised: bool, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"needs onnxruntime.*\[cpu\]") as caught:
        optimize(tiny_bundle, backend)
    assert ("take the extra gpu in place of cpu" in str(caught.value)) is advised
