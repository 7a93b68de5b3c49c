"""``plan``: times by hand, the choice of a bridge, the boards, the texts, and the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blip2edge.cli import main
from blip2edge.errors import BackendError, BundleError, CheckpointError, UsageError
from blip2edge.runtime.bench.devices import DEVICES, Efficiency, find_device
from blip2edge.runtime.bench.plan import (
    CACHED_BYTES,
    HOST_S,
    PlanOptions,
    bridge_rows,
    device_plan,
    effective,
    operators,
    recommended,
    stage_ms,
    token_budget,
)
from blip2edge.runtime.bench.roofline import READ, reference_seconds, this_device
from blip2edge.shapes.cost import Roofline, StageCost
from blip2edge.shapes.model_shape import FORMATS
from blip2edge.shapes.sources import find_shape
from tests.hub_server import HubServer, plug_in

CONFIG = Path(__file__).resolve().parents[3] / "examples" / "checkpoint" / "config.json"
ALL = ("fp32", "fp16", "int8", "int8-weights", "int4")
SIMPLE = Efficiency(dict.fromkeys(ALL, 0.5), dict.fromkeys(ALL, 0.5), True, 0, 1, 0.0, 0.0, 0.5, False, "a test")
NANO, PI = DEVICES["orin-nano-8gb"], DEVICES["raspberry-pi-5-8gb"]
BOARD = replace(NANO, efficiency=SIMPLE, host=0.0, bytes_per_s=2e9, rates={"fp32": 1e12, "fp16": 2e12, "int8": 4e12})


def test_the_vision_encoder_by_hand() -> None:
    """The miniature: 3 layers 128 wide, 64 patches of 8 x 8 and the class token; at half of 1 TFLOP/s and 2 GB/s."""
    shape, _ = find_shape(str(CONFIG))
    matrices = 192 * 128 * 64 + 3 * (4 * 128 * 128 + 2 * 128 * 512) * 65
    operations = 2 * matrices + 3 * 4 * 128 * 65 * 65
    weights = 628_224 * 4  # bytes
    assert stage_ms(shape, "fp32", BOARD, PlanOptions())["vision"] == pytest.approx(weights / 1e9 * 1e3)
    faster = replace(BOARD, bytes_per_s=1e15)
    assert stage_ms(shape, "fp32", faster, PlanOptions())["vision"] == pytest.approx(operations / 0.5e12 * 1e3)
    both = replace(BOARD, efficiency=replace(SIMPLE, overlaps=False))
    first = 2 * (192 * 128 + 3 * (4 * 128 * 128 + 2 * 128 * 512))  # the product of one row is part of the reading
    assert stage_ms(shape, "fp32", both, PlanOptions())["vision"] == pytest.approx(
        (weights / 1e9 + (operations - first) / 0.5e12) * 1e3
    )


def test_a_decode_step_by_hand() -> None:
    """It reads the decoder once, and the keys and values of the middle of the caption."""
    shape, _ = find_shape("blip2-opt-2.7b")
    request = PlanOptions(prompt_tokens=8, new_tokens=31)
    ms = stage_ms(shape, "fp16", BOARD, request)
    context = 32 + 8 + 1 + 30 // 2
    read = 2 * 2_651_678_720 + 2 * 32 * 2560 * context * 2
    assert ms["decode_per_token"] == pytest.approx(read / 1e9 * 1e3)
    assert ms["decode"] == pytest.approx(30 * ms["decode_per_token"])
    stages = ("preprocess", "vision", "bridge", "prefill", "decode")
    assert ms["total"] == pytest.approx(sum(ms[stage] for stage in stages))


def test_operators_between_matrices_and_python() -> None:
    shape, _ = find_shape(str(CONFIG))
    plain = stage_ms(shape, "fp32", BOARD, PlanOptions())
    called = replace(BOARD, efficiency=replace(SIMPLE, call_s=1e-3))
    matrices = 3 * (1 + 2 + 1 + 1 + 1) + 1  # queries, keys and values, output, up, down; the patches
    assert stage_ms(shape, "fp32", called, PlanOptions())["vision"] == pytest.approx(plain["vision"] + 3 * matrices)
    t5, fused = find_shape("blip2-flan-t5-xl")[0].decoder, replace(BOARD, efficiency=replace(SIMPLE, fuses=True))
    assert [operators(t5, t5.weights("fp32"), board) for board in (called, fused)] == [
        12 * (24 * 9 + 1),
        3 * (24 * 9 + 1),
    ]
    assert operators(t5, t5.weights("int8"), called) == 9 * (24 * 9 + 1)
    elements = 128 * 64 + 3 * 65 * (4 * 128 + 512 + 128) + 3 * 3 * 4 * 65 * 65
    between = replace(BOARD, efficiency=replace(SIMPLE, element_s=1e-6))
    expected = plain["vision"] + elements * 1e-3
    assert stage_ms(shape, "fp32", between, PlanOptions())["vision"] == pytest.approx(expected)
    slow = stage_ms(shape, "fp32", replace(BOARD, host=2.0), PlanOptions())
    assert slow["prefill"] - plain["prefill"] == pytest.approx(2e3 * HOST_S["prefill"])
    assert slow["preprocess"] == pytest.approx(2e3 * (reference_seconds(64) + HOST_S["preprocess"]))


def test_weights_that_a_cache_holds() -> None:
    """The cache of a CPU is counted, for weights in floating point; a GPU's is not."""
    board = replace(PI, efficiency=replace(SIMPLE, cached_bytes=2.0), bytes_per_s=1e9)
    small, large = CACHED_BYTES, CACHED_BYTES + 1
    assert [effective(board, "fp32", size).bytes_per_s for size in (small, large)] == [2e9, 0.5e9]
    assert effective(board, "int8", small).bytes_per_s == 0.5e9
    assert effective(NANO, "fp16", small) == effective(NANO, "fp16", large)


def test_more_rows_and_passes_cost_more() -> None:
    shape, _ = find_shape("blip-image-captioning-base")
    plain, request = stage_ms(shape, "fp32", BOARD, PlanOptions()), PlanOptions()
    passes = stage_ms(shape, "fp32", replace(BOARD, efficiency=replace(SIMPLE, cache_passes=3)), request)
    cache = shape.cache.bytes(8 + 1 + 29 // 2, 577, 4.0)
    assert passes["decode_per_token"] - plain["decode_per_token"] == pytest.approx(2 * cache / 1e9 * 1e3)
    quick = replace(BOARD, bytes_per_s=1e15)
    one = stage_ms(shape, "fp32", quick, request)
    more = stage_ms(shape, "fp32", replace(quick, efficiency=replace(SIMPLE, extra_rows=577)), request)
    assert 1.8 * one["vision"] < more["vision"] < 2 * one["vision"]  # all products twice, the scores once
    assert more["decode_per_token"] == pytest.approx(one["decode_per_token"])


def test_the_sum_of_reading_and_computing() -> None:
    cost, rates = StageCost(2e9, 4e9, 3e9), Roofline(1e9, 2e9, 2e9)
    assert (cost.seconds(rates), cost.seconds(rates, overlaps=False)) == (3.0, 6.0)


def test_a_film_against_the_context() -> None:
    blip2, llava = find_shape("blip2-opt-2.7b")[0], find_shape("llava-1.5-7b")[0]
    film = PlanOptions(frames=60)
    assert token_budget(blip2, film)["per_item"] == 1920
    assert token_budget(blip2, film)["slots"] == 1920 + 8 + 30
    assert token_budget(blip2, film)["fits"]
    assert token_budget(llava, film)["per_item"] == 34_560
    assert not token_budget(llava, film)["fits"]
    rows = {row.kind: row for row in device_plan(llava, DEVICES["thor"], film).bridges}
    assert (rows["qformer"].tokens, rows["mlp"].tokens, rows["perceiver"].tokens) == (1920, 34_560, 3840)
    assert [row.fits_context for row in rows.values()] == [True, False, True, True]


def test_frames_of_a_video_model() -> None:
    shape, _ = find_shape("instructblipvideo-vicuna-7b")
    assert token_budget(shape, PlanOptions())["frames"] == 4
    one, four = (stage_ms(shape, "fp16", NANO, PlanOptions(frames=frames))["vision"] for frames in (1, None))
    assert 3.5 * one < four <= 4 * one


@pytest.mark.parametrize(
    ("model", "device", "request_", "bridge", "reason"),
    [
        ("llava-1.5-7b", "thor", PlanOptions(frames=60), "qformer", "34,560 tokens of an MLP do not fit the 4,058"),
        ("blip2-opt-2.7b", "thor", PlanOptions(), "mlp", "it keeps every patch"),
        ("blip2-opt-2.7b", "orin-nano-8gb", PlanOptions(), "qformer", "the 257 tokens of an MLP cost 3"),
        (
            "blip2-opt-2.7b",
            "thor",
            PlanOptions(frames=500),
            "qformer",
            "at most 62 frames, or train a Q-Former of at most 4 queries",
        ),
        (
            "blip2-opt-2.7b",
            "thor",
            PlanOptions(new_tokens=2040),
            "none",
            "prompt and caption alone fill the 2,048 tokens",
        ),
        ("blip2-opt-2.7b", "thor", PlanOptions(new_tokens=2020), "qformer", "either: train a Q-Former of at most 20 q"),
        (
            "blip2-opt-2.7b",
            "thor",
            PlanOptions(frames=60, new_tokens=2020),
            "qformer",
            "either: take at most 20 frames, and train a Q-Former of fewer queries",
        ),
        ("blip2-opt-2.7b", "thor", PlanOptions(frames=60, new_tokens=2000), "qformer", "either: take at most 1 frame"),
        ("blip2-opt-2.7b", "thor", PlanOptions(frames=2000), "none", "device with any bridge at 2,000 frames"),
        ("blip2-opt-2.7b", "orin-nano-4gb", PlanOptions(), "none", "the model does not fit the device with any bridge"),
        ("idefics-9b", "thor", PlanOptions(), "perceiver", "cross-attends to 64 tokens of each picture"),
        ("blip-image-captioning-base", "thor", PlanOptions(), "none", "cross-attends to the patches"),
    ],
)
def test_the_recommended_bridge(model: str, device: str, request_: PlanOptions, bridge: str, reason: str) -> None:
    plan = device_plan(find_shape(model)[0], DEVICES[device], request_)
    assert (plan.bridge, reason in plan.reason) == (bridge, True), plan.reason


def test_the_pool_where_only_it_fits() -> None:
    shape, request = find_shape("blip2-opt-2.7b")[0], PlanOptions()
    rows = [replace(row, fits_memory=row.kind == "pool") for row in bridge_rows(shape, "int4", NANO, request)]
    bridge, reason = recommended(shape, rows, request)
    assert (bridge, reason) == (
        "pool",
        "the model fits the device with its 5 M parameters, and not with the 107 M of a Q-Former",
    )
    none = [replace(row, fits_memory=False) for row in rows]
    assert recommended(shape, none, request) == ("none", "the model does not fit the device with any bridge")


def test_what_fits() -> None:
    plan = device_plan(find_shape("blip2-opt-2.7b")[0], NANO, PlanOptions())
    assert {row.precision: row.fits for row in plan.precisions} == {
        "fp32": False,
        "fp16": False,
        "int8": False,  # TensorRT has no 8-bit blocks
        "int4": True,
    }
    assert plan.chosen == "int4"
    refused = plan.of("int8")
    assert "TensorRT takes no 8-bit" in refused.refused
    assert refused.memory.total < plan.device.usable
    found = refused.to_json()
    assert (found["fits_run"], found["fits_build"], found["tokens_per_s"]) == (False, False, None)
    assert set(found["ms"].values()) == {None}
    assert device_plan(find_shape("blip2-opt-2.7b")[0], PI, PlanOptions()).chosen == "int8"


def test_every_board_is_complete() -> None:
    for name, board in DEVICES.items():
        assert board.name == find_device(name).name == name
        assert board.source
        assert not board.measured
        assert 0 < board.usable < board.memory
        for kind in ALL:
            rates = effective(board, kind, 1e12)
            assert 0 < rates.bytes_per_s <= board.bytes_per_s
            assert 0 < rates.integer_ops_per_s <= max(board.rates.values())
            assert 0 < board.efficiency.products[kind] <= 1


@pytest.mark.parametrize("field", ["frames", "prompt_tokens", "new_tokens", "threads"])
def test_a_request_below_one(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} must be at least 1, not 0"):
        PlanOptions(**{field: 0})


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(["plan", *words]) == status
    found = capsys.readouterr()
    return found.out if status == 0 else found.err


def test_the_table_of_boards(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    assert text.startswith("Salesforce/blip2-opt-2.7b (blip-2), from the list of published models\n")
    assert "bridge 107.1 M (qformer; 187.7 M with its text side), language 2,651.7 M" in text
    rows = {line.split()[0] for line in text.splitlines()[5:] if line and line.split()[0] in DEVICES}
    assert rows == set(DEVICES)
    assert "not measured: these are predictions" in text
    assert text.splitlines()[-1] == "next: blip2edge plan Salesforce/blip2-opt-2.7b --device NAME --explain"


def test_one_board_and_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "Salesforce/blip2-opt-2.7b", "--device", "orin-nano-8gb", "--device", "thor", "--explain")
    assert "orin-nano-8gb (not measured): Jetson Orin Nano 8 GB (15 W); 7.4 GB usable, 68 GB/s" in text
    fits = [line for line in text.splitlines() if line.startswith(tuple(FORMATS))]
    assert any("does not fit 7.4 GB: running needs 8.8 GB, building needs 13.3 GB" in line for line in fits)
    assert any(line.endswith("fits: 5.5 GB of 7.4 GB") for line in fits)
    assert "32 visual + 8 prompt + 30 new = 70 of 2,048: fits" in text
    assert "up: 39 x (1,408 x 6,144 + 6,144) = 337,618,944; 2 x 337,379,328 x 257 patches = 173.413 G" in text
    assert "KV cache: 2 x (32 layers x 32 heads x 80 x 70 tokens) x 2 bytes = 22.9 MB" in text
    assert "assumed efficiency: products fp32 60%" in text
    assert text.count("recommended bridge: ") == 2
    assert text.count("227 launches a token: at least") == 6  # fp16, int8 and int4 on both boards
    assert "next: blip2edge calibrate bundle -o bundle-int4 --images DIR --weights int4" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("llava-hf/llava-1.5-7b-hf --device orin-nano-4gb", "does not fit the memory: raspberry-pi-5-8gb has enough"),
        ("--device thor --frames 100", "does not fit the context: --frames 62 fits thor"),
        ("Salesforce/blip2-opt-2.7b --device thor --prompt-tokens 3000", "does not fit the context: no number of"),
    ],
)
def test_what_fits_in_place_of_a_plan_that_does_not(
    capsys: pytest.CaptureFixture[str], words: str, expected: str
) -> None:
    text = said(capsys, *words.split())
    assert expected in text
    assert "next:" not in text


@pytest.mark.parametrize("flags", [[], ["--json"], ["--explain"]], ids=["text", "json", "explain"])
def test_a_required_fit(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    words = ["plan", "llava-hf/llava-1.5-7b-hf", "--device", "thor", *flags]
    assert main([*words, "--require-fit"]) == 0
    assert main([*words, "--device", "orin-nano-4gb"]) == 0
    capsys.readouterr()
    assert main([*words, "--device", "orin-nano-4gb", "--require-fit"]) == 1
    found = capsys.readouterr()
    assert "orin-nano-4gb" in found.out  # the plan is printed all the same
    assert found.err.startswith("error: llava-hf/llava-1.5-7b-hf on orin-nano-4gb: does not fit the memory; raspberry")
    assert main([*words, "--frames", "60", "--require-fit"]) == 1
    assert "on thor: does not fit the context; --frames " in capsys.readouterr().err


def test_a_required_fit_needs_a_board(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--require-fit", status=2).startswith("error: --require-fit needs --device; name the board")


def test_a_precision_that_does_not_run_has_no_times(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "Salesforce/blip2-opt-2.7b", "--device", "orin-nano-8gb").partition("predicted")[2]
    (row,) = [line.split() for line in text.splitlines() if line.startswith("int8")]
    assert row == ["int8", *["–"] * 7]


def test_a_model_whose_pictures_take_no_slots(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "idefics-9b", "--device", "thor", "--explain")
    assert "the decoder cross-attends to them, so that they take no slots; 8 prompt + 30 new = 38 of 2,048" in text
    assert "cross_kv: " in text
    assert "bridges in" not in text
    assert "no bridge" in said(capsys, "blip-vqa-base", "--device", "raspberry-pi-5-8gb", "--explain")


@pytest.mark.parametrize(
    ("model", "checkpoint"),
    [
        ("idefics-9b", "HuggingFaceM4/idefics-9b"),
        ("salesforce/BLIP2-OPT-2.7b", "Salesforce/blip2-opt-2.7b"),
        ("minigpt4-vicuna-7b", None),  # published as a .pth
        ("attention-pool-opt-2.7b", None),  # not published
        ("my models/config.json", "'my models'"),
        ("my models", "'my models'"),
        ("my models/other.json", None),
        ("no weights/config.json", None),
    ],
)
def test_the_next_command_is_one_that_export_takes(
    model: str,
    checkpoint: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder, names in (("my models", ("config.json", "other.json")), ("no weights", ("config.json",))):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(CONFIG, tmp_path / folder / name)
    (tmp_path / "my models" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    commands = [line for line in said(capsys, model, "--device", "thor").splitlines() if line.startswith("next: ")]
    expected = [] if checkpoint is None else [f"next: blip2edge export {checkpoint} -o bundle --precision fp16"]
    assert commands == expected
    quoted = f"'{model}'" if " " in model else model
    assert said(capsys, model).endswith(f"next: blip2edge plan {quoted} --device NAME --explain\n")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, str(CONFIG.parent), "--device", "thor", "--json"))
    assert list(found) == ["model", "origin", "family", "bridge", "parameters", "tokens", "devices"]
    assert found["parameters"]["total"] == sum(found["parameters"][part] for part in ("vision", "bridge", "language"))
    (device,) = found["devices"]
    assert (device["device"], device["measured"], device["chosen_precision"]) == ("thor", False, "fp16")
    assert [row["precision"] for row in device["precisions"]] == list(FORMATS)
    row = device["precisions"][0]
    assert list(row) == ["precision", "memory_bytes", "fits_run", "fits_build", "refused", "ms", "tokens_per_s"]
    assert list(row["memory_bytes"]) == ["weights", "cache", "activations", "workspace", "run", "build"]
    stages = ["preprocess", "vision", "bridge", "prefill", "decode_per_token", "decode", "total"]
    assert list(row["ms"]) == stages
    assert list(device["recommendation"]) == ["bridge", "reason"]
    steps = device["cuda_decoder"]
    assert [step["precision"] for step in steps] == ["fp16", "int8", "int4"]
    assert all(step["measured"] is False and step["launches"] > 10 for step in steps)
    assert steps[0]["bytes"] > steps[1]["bytes"] > steps[2]["bytes"]
    assert steps[0]["least_ms"] == round(steps[0]["bytes"] / 273e9 * 1e3, 3)
    assert [bridge["kind"] for bridge in device["bridges"]] == ["qformer", "mlp", "perceiver", "pool"]


def test_a_decoder_without_kernels_has_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("Salesforce/blip2-flan-t5-xl", "--device", "thor")
    assert "cuda-decoder: no prediction for this decoder: it has cross-attention\n" in said(capsys, *words)
    assert json.loads(said(capsys, *words, "--json"))["devices"][0]["cuda_decoder"] == []
    assert "cuda-decoder" not in said(capsys, words[0], "--device", "raspberry-pi-5-8gb", "--explain")


def test_the_arithmetic_of_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "Salesforce/blip2-opt-2.7b", "--device", "thor", "--explain")
    for precision in ("fp16", "int8", "int4"):
        assert f"cuda-decoder in {precision}, a token: " in text
    assert text.count("MB / (273 GB/s x 75%) + 227 launches x 2 us = ") == 3
    assert text.count("at 64.6 tera-operations/s (25% of the tensor cores' rate") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "orin-nano"), "--device 'orin-nano' is not one of 'this', 'orin-nano-4gb'"),
        (("--device", "orin-nano"), "did you mean 'orin-nano-"),
        (("--device", "zx81"), "give 'this' to measure the machine that runs the command"),
    ],
)
def test_unknown_boards(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(capsys, *words, status=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nonsense", "no published model of this list: Salesforce/blip-image-captioning-base"),
        ("nobody/nothing", "no published model of this list: Salesforce/blip-image-captioning-base"),
        ("Salesforce/blip2-opt-2.7", "did you mean Salesforce/blip2-opt-2.7b?"),
        ("no/such/folder", "give the path of its config.json"),
        (".", "has no bundle.json and no config.json"),
    ],
)
def test_unknown_models(
    model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in said(capsys, model, status=1)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no bundle\.json and no config\.json"):
        find_shape(str(tmp_path))


def test_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def measured(backend: str, threads: int) -> Roofline:
        asked.append((backend, threads))
        if backend == "cpu":
            raise BackendError("not installed")
        return Roofline(30e9, 100e9, 400e9)

    roofline = "blip2edge.runtime.bench.roofline"
    monkeypatch.setattr(f"{roofline}.measure", measured)
    monkeypatch.setattr(f"{roofline}.call_seconds", lambda backend: 2e-6)
    monkeypatch.setattr(f"{roofline}.element_seconds", lambda backend: 1e-9)
    monkeypatch.setattr(
        f"{roofline}.read_bytes_per_s", lambda backend, threads, matrices=READ: 27e9 * READ[1] / matrices[1]
    )
    monkeypatch.setattr(f"{roofline}.preprocess_seconds", lambda picture, size: 2 * reference_seconds(size))
    text = said(capsys, str(CONFIG), "--device", "this", "--threads", "1")
    assert asked == [("cpu", 1), ("openvino", 1)]
    assert "this (measured): " in text
    assert "1 thread, CPU; " in text
    assert "30 GB/s, tera-operations/s: fp32 0.1, int8 0.4" in text
    device = this_device(2)
    share = device.efficiency
    assert (device.host, device.source) == (2.0, "measured with backend openvino")
    assert share.call_s == 2e-6
    assert [share.bytes["fp32"], share.cached_bytes] == pytest.approx([0.9, 1.8])

    def nothing(backend: str, threads: int) -> Roofline:
        raise BackendError("not installed")

    monkeypatch.setattr(f"{roofline}.measure", nothing)
    with pytest.raises(BackendError, match="needs ONNX Runtime or OpenVINO"):
        this_device()


def test_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The golden bundle: the KV cache and the tokens are exact, the parameters follow from the files."""
    golden = Path(__file__).resolve().parents[2] / "data" / "golden" / "bundle"
    bundle = tmp_path / "bundle"
    shutil.copytree(golden, bundle)
    manifest = json.loads((bundle / "bundle.json").read_text())
    text = said(capsys, "-b", str(bundle), "--device", "thor")
    assert f"{bundle} (blip-2), estimated from the sizes of the bundle's files" in text
    assert text.splitlines()[-1] == f"next: blip2edge bench {bundle}"
    shape, _ = find_shape(str(bundle))
    cache = manifest["cache"]
    assert (shape.cache.layers, shape.cache.heads) == (cache["num_layers"], cache["num_heads"])
    assert shape.slots == manifest["prompt"]["visual_tokens"]
    sizes = sum(manifest["files"][f"{name}.onnx.data"]["size"] for name in manifest["graphs"])
    table = shape.table[0] * shape.table[1]
    assert shape.parameters()["total"] == pytest.approx(sizes / 4 + table, rel=0.02)
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "engines_of": "0" * 64}))
    with pytest.raises(BundleError, match="no graphs that write captions"):
        find_shape(str(bundle))


def test_a_config_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="it reads the config")
    with HubServer().running() as server:
        plug_in(monkeypatch, server, tmp_path / "hub")
        server.add("somebody/captioner", {"config.json": CONFIG.read_bytes(), "model.safetensors": b"weights"})
        shape, origin = find_shape("somebody/captioner")
    assert (shape.width, origin) == (128, "from the config.json on the hub")
    assert {line.rpartition("/")[2] for line in server.requests} == {"config.json"}
