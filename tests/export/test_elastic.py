"""Elastic queries from checkpoint to captions: ids equal transformers' with its query tokens cut to the first m.

transformers has no such mode. Its model with ``query_tokens[:, :m]`` is the reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

import numpy as np
import torch

from blip2edge import Captioner
from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import ElasticSpec
from blip2edge.calibration.pipeline import calibrate
from blip2edge.cli import main
from blip2edge.engine.profiles import profiles_of
from blip2edge.errors import CheckpointError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.checkpoint.directory import load_checkpoint
from blip2edge.model.families.registry import read_config, write_config
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.backends import onnxruntime_cuda
from blip2edge.runtime.bench.certificate.certify import certify
from blip2edge.runtime.bench.certificate.reference_outputs import record_outputs
from blip2edge.runtime.captioning.encoder import StageClock
from blip2edge.runtime.decoding.speculative import SpeculationCost
from blip2edge.shapes.sources import find_shape
from tests.drafted import add_draft
from tests.drawing import Drawn, draw_pictures, save
from tests.families import drawing_idefics, drawing_instruct, test_idefics, test_pool, test_t5

LEAST, MOST = 2, 5
PROMPTS = (None, "a photo of", "Question: what is two? Short answer:")
TOKENS = 10
SEARCHES: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3})


def mark(checkpoint: Path, least: int = LEAST) -> None:
    """Marks a checkpoint as elastic, as training does."""
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "elastic_queries": least}))


class Exported(NamedTuple):
    drawn: Drawn
    elastic: Path
    plain: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A checkpoint with a draft model, and its bundles: elastic, and plain."""
    root = tmp_path_factory.mktemp("elastic")
    drawn = save(root / "checkpoint", seed=5, vision_layers=1)
    add_draft(root / "checkpoint")
    plain = export_checkpoint(root / "checkpoint", root / "plain").bundle
    mark(root / "checkpoint")
    return Exported(drawn, export_checkpoint(root / "checkpoint", root / "elastic").bundle, plain)


@pytest.fixture(scope="module")
def captioner(exported: Exported) -> Captioner:
    return Captioner.load(exported.elastic, threads=1)


def cut(drawn: Drawn, queries: int, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """transformers' model and processor with the first queries only."""
    tokens = drawn.model.query_tokens
    monkeypatch.setattr(tokens, "data", tokens.data[:, :queries])
    monkeypatch.setattr(drawn.model.config, "num_query_tokens", queries)
    monkeypatch.setattr(drawn.processor, "num_query_tokens", queries)
    return replace(drawn, variant=replace(drawn.variant, queries=queries))


@pytest.mark.parametrize("queries", range(LEAST, MOST + 1))
def test_the_ids_are_those_of_transformers_with_cut_queries(
    queries: int, exported: Exported, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, pictures = cut(exported.drawn, queries, monkeypatch), draw_pictures(3)
    for options in SEARCHES:
        wanted = [
            oracle.generate(picture, prompt, max_new_tokens=TOKENS, **options)
            for picture, prompt in zip(pictures, PROMPTS, strict=True)
        ]
        batched = list(
            captioner.caption_many(
                pictures, prompts=PROMPTS, batch_size=3, max_new_tokens=TOKENS, queries=queries, **options
            )
        )
        assert [result.tokens for result in batched] == wanted
        assert {result.queries for result in batched} == {queries}
        single = captioner.caption(pictures[1], prompt=PROMPTS[1], queries=queries, max_new_tokens=TOKENS, **options)
        assert single.tokens == wanted[1]
        assert [result.prompt_tokens - queries for result in batched] == [1, 4, 10]


def test_all_queries_give_the_ids_of_the_plain_bundle(exported: Exported, captioner: Captioner) -> None:
    plain = Captioner.load(exported.plain, threads=1)
    for picture in draw_pictures(4, seed=2):
        wanted = plain.caption(picture, max_new_tokens=TOKENS)
        for queries in (None, MOST):
            result = captioner.caption(picture, max_new_tokens=TOKENS, queries=queries)
            assert (result.tokens, result.queries, wanted.queries) == (wanted.tokens, MOST, MOST)


def test_requests_of_different_numbers_share_the_decoder(captioner: Captioner) -> None:
    pictures, numbers = draw_pictures(4), (2, 5, 3, None)
    wanted = [
        captioner.caption(one, queries=number, max_new_tokens=TOKENS).tokens
        for one, number in zip(pictures, numbers, strict=True)
    ]
    assert len(set(wanted)) > 2
    with captioner.scheduler(max_batch=4) as scheduler:
        requests = [
            scheduler.submit(one, captioner.options(queries=number, max_new_tokens=TOKENS))
            for one, number in zip(pictures, numbers, strict=True)
        ]
        assert [request.result(60).tokens for request in requests] == wanted


def test_the_draft_model_reads_as_many_queries(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpeculationCost, "pays", True)
    (picture,) = draw_pictures(1)
    plain, drafted = (
        captioner.caption(picture, draft=draft, queries=3, max_new_tokens=TOKENS) for draft in ("none", "itg")
    )
    assert plain.tokens == drafted.tokens
    encoded = captioner.encoder([picture], [None], StageClock(), 3)
    assert {encoded.pictures[name].shape[-2] for name in ("visual_tokens", "queries.0.key")} == {3}
    text = "".join(captioner.stream(picture, queries=3, max_new_tokens=TOKENS)).strip()
    assert text == plain.text


def test_the_manifest_holds_the_range(exported: Exported) -> None:
    manifest = Bundle.open(exported.elastic).manifest
    assert manifest.elastic == ElasticSpec(LEAST, MOST)
    assert Bundle.open(exported.plain).manifest.elastic is None
    (profile,) = profiles_of(manifest.graphs["bridge"].spec)
    assert profile.shapes(manifest.graphs["bridge"].spec)["query_ids"] == ((1, LEAST), (1, MOST), (8, MOST))
    shape, _ = find_shape(str(exported.elastic))
    assert (shape.queries, shape.with_queries(3).tokens(60, 4)["steps"]) == (MOST, 60 * 3 + 4)
    for wrong in (LEAST - 1, MOST + 1):
        with pytest.raises(UsageError, match=f"expected queries from {LEAST} to {MOST}, got {wrong}"):
            shape.with_queries(wrong)
    with pytest.raises(UsageError, match=f"was trained with all of its {MOST} queries only"):
        find_shape(str(exported.plain))[0].with_queries(3)


def test_all_queries_are_the_same_option_as_none(exported: Exported, captioner: Captioner) -> None:
    """So a fitted confidence and a kept fit of `watch` hold for both; a server's default can be taken back by both."""
    assert captioner.options(queries=MOST) == captioner.options()
    assert captioner.options(queries=3).queries == 3
    assert Captioner(Bundle.open(exported.elastic), threads=1, queries=MOST).options() == captioner.options()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"min_queries": 1, "max_queries": MOST}, r"expected the range .* \(2, 5\), got \(1, 5\)"),
        (None, r"expected the range .* \(2, 5\), got None"),
    ],
)
def test_a_manifest_that_does_not_fit_its_bridge_is_refused(value: Any, message: str, exported: Exported) -> None:
    manifest = Bundle.open(exported.elastic).manifest
    with pytest.raises(ValueError, match=message):
        type(manifest).from_json({**manifest.to_json(), "elastic": value})


@pytest.mark.parametrize(
    ("bundle", "queries", "message"),
    [
        ("elastic", 1, "expected queries to be a whole number of at least 2, got 1"),
        ("elastic", 6, "expected queries of at most 5, got 6"),
        ("plain", 4, "plain does not take queries: its bridge .*elastic = true"),
    ],
)
def test_other_numbers_are_refused_by_name(bundle: str, queries: int, message: str, exported: Exported) -> None:
    (picture,) = draw_pictures(1)
    with Captioner.load(getattr(exported, bundle), threads=1) as loaded:
        with pytest.raises(UsageError, match=message):
            loaded.caption(picture, queries=queries)
        with pytest.raises(UsageError, match=message):
            loaded.options(queries=queries)
    with pytest.raises(UsageError, match=message):
        Captioner(Bundle.open(getattr(exported, bundle)), threads=1, queries=queries)


def test_the_commands_take_the_number(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_pictures(1)[0].save(tmp_path / "picture.png")
    common = ["-b", str(exported.elastic), "--threads", "1", "--max-new-tokens", "6", "--json"]
    picture = str(tmp_path / "picture.png")
    lines = []
    for command in (
        ["caption", picture, "--queries", "3"],
        ["caption", picture],
        ["ask", picture, "what is two?", "--queries", "3"],
        ["watch", str(tmp_path), "--once", "--queries", "3"],
    ):
        capsys.readouterr()
        assert main([*command, *common]) == 0
        lines.append(json.loads(capsys.readouterr().out))
    assert [line["queries"] for line in lines] == [3, MOST, 3, 3]
    assert lines[0]["tokens"] == lines[3]["tokens"]
    assert main(["caption", picture, "--queries", "3", "-b", str(exported.plain)]) == 2
    assert "does not take --queries" in capsys.readouterr().err


def on_the_cpu(path: Path, threads: int | None = None, optimized: Any = None) -> Any:
    """The CUDA provider's graphs on the CPU."""
    from blip2edge.runtime.backends.onnxruntime_cpu import open_graph

    return open_graph(path, threads, optimized)


@pytest.mark.parametrize("backend", ["cpu", "openvino", "cuda", "tensorrt", "optimized"])
def test_every_backend_gives_the_same_ids(
    backend: str, exported: Exported, captioner: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported.elastic
    if backend == "openvino":
        pytest.importorskip("openvino", reason="pip install 'blip2edge[openvino]'")
    if backend == "cuda":
        monkeypatch.setattr(onnxruntime_cuda, "open_graph", on_the_cpu)
    if backend in ("tensorrt", "optimized"):
        from tests.engine.test_trt_runtime import copied

        bundle = copied(exported.elastic, tmp_path / "bundle")
    if backend == "tensorrt":
        from blip2edge.runtime.backends.engine_files import KIND
        from tests.engine.fake_engines import plug_in, write_engines

        plug_in(monkeypatch)
        write_engines(bundle, bundle / KIND)
    if backend == "optimized":
        optimize(bundle)
    name: Any = "cpu" if backend == "optimized" else backend
    pictures = draw_pictures(3)
    with Captioner.load(bundle, backend=name, threads=1, draft="none") as loaded:
        for queries in (None, 3):
            options: dict[str, Any] = {"batch_size": 3, "max_new_tokens": TOKENS, "queries": queries}
            wanted = [result.tokens for result in captioner.caption_many(pictures, **options)]
            assert [result.tokens for result in loaded.caption_many(pictures, **options)] == wanted


def test_int8_ranges_hold_for_every_number(exported: Exported, captioner: Captioner, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, picture in enumerate(draw_pictures(4)):
        picture.save(images / f"{number}.png")
    child = calibrate(exported.elastic, tmp_path / "int8", images=images, weights=None, threads=1).bundle
    assert Bundle.open(child).manifest.elastic == ElasticSpec(LEAST, MOST)
    pictures = draw_pictures(3)
    with Captioner.load(child, backend="cpu", threads=1) as loaded:
        for queries in range(LEAST, MOST + 1):
            ours, theirs = (
                one.encoder(pictures, [None] * 3, StageClock(), queries).pictures["visual_tokens"]
                for one in (loaded, captioner)
            )
            assert ours.shape == (3, queries, 32)
            cosine = (ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs)
            assert cosine > 0.99
            assert loaded.caption(pictures[0], queries=queries, max_new_tokens=4).queries == queries


def test_certify_replays_an_elastic_bundle(exported: Exported, tmp_path: Path) -> None:
    from blip2edge.runtime.bench.certificate.reference_outputs import REFERENCE_OUTPUTS
    from tests.engine.test_trt_runtime import copied

    bundle = copied(exported.elastic, tmp_path / "bundle")
    opened = Bundle.open(bundle)
    record_outputs(opened, threads=1).write(bundle)
    from blip2edge.bundle.trust.integrity import FileRecord

    files = {**opened.manifest.files, REFERENCE_OUTPUTS: FileRecord.of(bundle / REFERENCE_OUTPUTS)}
    replace(opened.manifest, files=files).write(bundle)
    assert certify(bundle, backend="cpu", threads=1).faults == []


def test_a_checkpoint_keeps_the_mark(exported: Exported) -> None:
    config = load_checkpoint(exported.drawn.directory).config
    assert config.elastic == LEAST
    assert write_config(config)["elastic_queries"] == LEAST
    values = json.loads((exported.drawn.directory / "config.json").read_text())
    for wrong in (MOST + 1, 0, "two"):
        with pytest.raises(CheckpointError, match="elastic_queries"):
            read_config({**values, "elastic_queries": wrong})


def _t5(directory: Path) -> tuple[Callable[..., Any], int]:
    model = test_t5.draw(0, directory, **test_t5.KINDS[0])

    def generate(picture: Any, queries: int) -> tuple[int, ...]:
        from tests.drawing import Variant, draw_processor

        inputs = draw_processor(Variant(queries=queries))(images=picture, text="a photo of", return_tensors="pt")
        model.config.num_query_tokens = queries
        row = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
        return tuple(row[: row.index(test_t5.END) + 1] if test_t5.END in row else row)

    return _cutting(model, "query_tokens", generate), MOST


def _instruct(directory: Path) -> tuple[Callable[..., Any], int]:
    model, processor = drawing_instruct.draw_instructblip(directory, 2, "llama")

    def generate(picture: Any, queries: int) -> tuple[int, ...]:
        processor.num_query_tokens = queries
        model.config.num_query_tokens = queries
        inputs = processor(images=picture, text="a photo of", return_tensors="pt")
        row = model.generate(**inputs, max_new_tokens=TOKENS)[0].tolist()[inputs["input_ids"].shape[1] :]
        return tuple(row[: row.index(3) + 1] if 3 in row else row)

    return _cutting(model, "query_tokens", generate), drawing_instruct.QUERIES


def _cutting(model: Any, name: str, generate: Callable[..., Any]) -> Callable[..., Any]:
    """Generates with the first learned queries of transformers' model."""
    tokens = getattr(model, name).detach()

    @torch.no_grad()
    def run(picture: Any, queries: int) -> tuple[int, ...]:
        setattr(model, name, torch.nn.Parameter(tokens[..., :queries, :]))
        return tuple(generate(picture, queries))

    return run


def _idefics(directory: Path) -> tuple[Callable[..., Any], int]:
    model, processor = drawing_idefics.draw_idefics(directory, 3, use_resampler=True)
    resampler = model.model.perceiver_resampler
    most = resampler.latents.shape[0]

    def generate(picture: Any, queries: int) -> list[int]:
        resampler.n_latents = queries
        return test_idefics.expected(model, processor, [picture, "a photo of"])

    return _cutting(resampler, "latents", generate), most


FAMILIES = {"t5": _t5, "instructblip": _instruct, "idefics": _idefics}


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_with_learned_queries(family: str, tmp_path: Path) -> None:
    oracle, most = FAMILIES[family](tmp_path / "checkpoint")
    mark(tmp_path / "checkpoint", 1)
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle
    pictures = draw_pictures(2)
    with Captioner.load(bundle, threads=1) as loaded:
        for queries in range(1, most + 1):
            results = loaded.caption_many(
                pictures, prompts=["a photo of"] * 2, batch_size=2, queries=queries, max_new_tokens=TOKENS
            )
            assert [result.tokens for result in results] == [oracle(picture, queries) for picture in pictures]


@pytest.mark.slow
def test_an_attention_pool_cuts_its_queries(tmp_path: Path) -> None:
    drawn = save(tmp_path / "drawn", seed=5, vision_layers=1)
    test_pool.save_pool(tmp_path / "checkpoint", drawn)
    mark(tmp_path / "checkpoint")
    model = load_checkpoint(tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle
    (picture,) = draw_pictures(1)
    with Captioner.load(bundle, threads=1) as loaded, torch.no_grad():
        pixels = torch.from_numpy(loaded.encoder.images.preprocessing.batch([picture]))
        whole = model.visual_tokens(pixels).numpy()
        for queries in (2, 4, test_pool.QUERIES):
            tokens = loaded.encoder([picture], [None], StageClock(), queries).pictures["visual_tokens"]
            np.testing.assert_allclose(tokens, whole[:, :queries], atol=1e-4)  # a pool's queries do not interact
