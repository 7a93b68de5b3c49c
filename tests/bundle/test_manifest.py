"""The sealed manifest: changed, missing or newer files are refused; unchanged files are not hashed again."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import MANIFEST, GraphRecord, Manifest
from blip2edge.bundle.prompt_spec import PromptSpec
from blip2edge.bundle.schema import BRIDGE, Axis, CacheSpec, GraphSpec, Parity, TensorSpec
from blip2edge.bundle.trust import integrity
from blip2edge.bundle.trust.integrity import STAMPS, FileRecord
from blip2edge.errors import BundleError, BundleIntegrityError, BundleVersionError, OutputError
from blip2edge.runtime.backends.engine_files import RECORD, engine_folders


def make_manifest(directory: Path) -> Manifest:
    """A manifest of one graph, for the files as they are."""
    batch = Axis("batch", 1, 1, 8)
    spec = GraphSpec(
        BRIDGE,
        (TensorSpec("image_embeds", "float32", (batch, 5, 8)),),
        (TensorSpec("visual_tokens", "float16", (batch, 2, 4)),),
    )
    parity = Parity("visual_tokens", 1e-7, 2e-7, 1e-4, ("batch 1", "batch 3"), "layer 0 of 2")
    return Manifest(
        family="blip-2",
        source={"checkpoint": "somewhere", "sha256": "0" * 64},
        precision="fp16",
        verify="sample",
        graphs={BRIDGE: GraphRecord(spec, "fp16", (parity,), ("Softmax: why",), ("bridge.onnx.data",))},
        cache=CacheSpec(2, 4, 8),
        max_positions=64,
        vocab_size=120,
        preprocessing={"mean": [0.5, 0.5, 0.5]},
        prompt=PromptSpec("{image}{prompt}", "Question: {question}", 2, 2, 119),
        generation={"eos_token_ids": [2], "max_new_tokens": 30},
        files={path.name: FileRecord.of(path) for path in sorted(directory.iterdir())},
        versions={"blip2edge": "0"},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A directory that is a bundle, as far as its manifest goes."""
    path = tmp_path / "bundle"
    path.mkdir()
    for name, content in (
        ("bridge.onnx", b"\x12\x03abc"),  # a message with the name of its producer
        ("bridge.onnx.data", b"weights"),
        ("tokenizer.json", b"{}"),
    ):
        (path / name).write_bytes(content)
    make_manifest(path).write(path)
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed, without bundle.json: it is hashed at every opening."""
    names: list[str] = []
    inner = integrity.sha256_of

    def note(path: Path) -> str:
        if path.name != MANIFEST:
            names.append(path.name)
        return inner(path)

    monkeypatch.setattr(integrity, "sha256_of", note)
    return names


FILES = ["bridge.onnx", "bridge.onnx.data", "tokenizer.json"]


def test_what_is_written_is_read(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    written = make_manifest(bundle)
    written.write(bundle)
    assert Bundle.open(bundle).manifest == written


def test_a_bundle_is_hashed_once(bundle: Path, hashed: list[str]) -> None:
    Bundle.open(bundle)
    assert hashed == FILES
    Bundle.open(bundle)
    assert hashed == FILES
    Bundle.open(bundle).verify()
    assert hashed == FILES * 2


def test_a_touched_file_is_hashed_again(bundle: Path, hashed: list[str]) -> None:
    Bundle.open(bundle)
    os.utime(bundle / "bridge.onnx", ns=(1, 1))
    Bundle.open(bundle)
    Bundle.open(bundle)
    assert hashed == [*FILES, "bridge.onnx"]


@pytest.mark.parametrize("content", [b"", b"grapg", b"graphs", b"\0" * 5])
@pytest.mark.parametrize("opened", [False, True])
def test_a_changed_file_is_refused(content: bytes, opened: bool, bundle: Path) -> None:
    if opened:
        Bundle.open(bundle)
    (bundle / "bridge.onnx").write_bytes(content)
    os.utime(bundle / "bridge.onnx", ns=(2, 2))
    for _ in range(2):  # a refusal leaves no stamp that would let it through the second time
        with pytest.raises(BundleIntegrityError, match=r"bridge\.onnx does not match bundle\.json"):
            Bundle.open(bundle)


def test_verify_hashes_what_the_stamp_would_let_through(bundle: Path) -> None:
    status = (bundle / "tokenizer.json").stat()
    opened = Bundle.open(bundle)
    (bundle / "tokenizer.json").write_bytes(b"[]")
    os.utime(bundle / "tokenizer.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    stamps = json.loads((bundle / STAMPS).read_text())
    now = (bundle / "tokenizer.json").stat()
    stamps["tokenizer.json"][2] = now.st_ctime_ns  # as if nothing had happened
    (bundle / STAMPS).write_text(json.dumps(stamps))
    assert Bundle.open(bundle)
    with pytest.raises(BundleIntegrityError, match=r"tokenizer\.json"):
        opened.verify()


def test_verify_tells_its_progress(bundle: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    Bundle.open(bundle).verify(lambda *report: seen.append(report))
    assert seen[-1] == ("verified", 3, 3)
    assert [done for _, done, _ in seen] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(name: str, bundle: Path) -> None:
    Bundle.open(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleIntegrityError, match=f"{name} is missing"):
        Bundle.open(bundle)


def test_a_directory_in_the_place_of_a_file(bundle: Path) -> None:
    (bundle / "bridge.onnx").unlink()
    (bundle / "bridge.onnx").mkdir()
    with pytest.raises(BundleIntegrityError):
        Bundle.open(bundle)


@pytest.mark.parametrize("stamp", ["", "{", "[]", "3", '{"bridge.onnx": 7}', '{"bridge.onnx": [5, 1, null]}'])
def test_a_broken_stamp_means_hashing(stamp: str, bundle: Path, hashed: list[str]) -> None:
    (bundle / STAMPS).write_text(stamp)
    Bundle.open(bundle)
    assert hashed == FILES


def no_writing_in(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only file system, for root too."""
    inner = Path.mkdir

    def refuse(self: Path, *rest: Any, **more: Any) -> None:
        if self.is_relative_to(directory):
            raise PermissionError(13, "Permission denied", str(self))
        inner(self, *rest, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)  # files are written in a temporary directory, and renamed


def test_a_read_only_bundle_is_stamped_in_the_cache(
    bundle: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    no_writing_in(bundle, monkeypatch)
    Bundle.open(bundle)
    Bundle.open(bundle)
    assert hashed == FILES
    assert not (bundle / STAMPS).exists()
    assert len(list((tmp_path / "cache" / "blip2edge" / "verified").iterdir())) == 1
    (bundle / "bridge.onnx").write_bytes(b"other")
    with pytest.raises(BundleIntegrityError):
        Bundle.open(bundle)


def test_without_any_place_for_a_stamp_it_is_hashed_every_time(
    bundle: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    no_writing_in(tmp_path, monkeypatch)
    Bundle.open(bundle)
    Bundle.open(bundle)
    assert hashed == FILES * 2


def test_derived_files_go_beside_the_sources_or_to_the_cache(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = Bundle.open(bundle)
    assert opened.derived("engines") == []
    blocked = bundle / "optimized"
    blocked.write_text("a file where the directory would be")
    cached = opened.derive("optimized")
    assert cached == tmp_path / "cache" / "blip2edge" / "optimized" / opened.sha256[:16]
    assert cached.is_dir()
    assert opened.derived("optimized") == [cached]
    assert opened.derive("engines") == bundle / "engines"
    assert opened.derived("engines") == [bundle / "engines"]
    cached.rmdir()
    cached.parent.rmdir()
    cached.parent.write_text("a file here as well")
    with pytest.raises(OutputError, match="XDG_CACHE_HOME"):
        opened.derive("optimized")


def test_what_the_user_made_is_used_before_what_came_with_a_read_only_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = Bundle.open(bundle)
    cached = tmp_path / "cache" / "blip2edge" / "engines" / opened.sha256[:16]
    for directory in (bundle / "engines", cached):
        (directory / "x").mkdir(parents=True)
        (directory / "x" / RECORD).touch()
    assert engine_folders(opened) == [bundle / "engines" / "x", cached / "x"]
    monkeypatch.setattr("os.access", lambda path, mode: not Path(path).is_relative_to(bundle))
    assert engine_folders(opened) == [cached / "x", bundle / "engines" / "x"]
    engines = Bundle(bundle, replace(opened.manifest, engines_of=opened.sha256))
    assert engine_folders(engines) == [bundle / "engines" / "x"]  # it has no graphs to build others from


def test_without_a_home_directory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container whose user is a number without a name."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    no_writing_in(bundle, monkeypatch)
    assert Bundle.open(bundle)


def test_a_copy_is_a_bundle(bundle: Path, tmp_path: Path) -> None:
    Bundle.open(bundle)
    assert Bundle.open(shutil.copytree(bundle, tmp_path / "copy")).manifest == Bundle.open(bundle).manifest


def edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((bundle / MANIFEST).read_text())
    change(values)
    (bundle / MANIFEST).write_text(json.dumps(values))


def test_a_newer_schema(bundle: Path) -> None:
    edit(bundle, lambda values: values.update(schema_version=99, graphs="of a kind nobody knows yet"))
    with pytest.raises(BundleVersionError, match=r"schema version 99.*upgrade"):
        Bundle.open(bundle)


@pytest.mark.parametrize("version", [None, "1", [], 1.5, True, 0, -1])
def test_no_schema_version(version: Any, bundle: Path) -> None:
    edit(bundle, lambda values: values.update(schema_version=version))
    found = re.escape(f"got {version!r}")
    expected = "expected schema_version to be a whole number of at least 1, "
    with pytest.raises(BundleError, match=f"{expected}{found}; the file was edited"):
        Bundle.open(bundle)
    edit(bundle, lambda values: values.pop("schema_version"))
    with pytest.raises(BundleError, match=f"{expected}found no such key"):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"schema_version": 1'])
def test_broken_json(content: bytes, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read as JSON") as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
def test_json_of_another_kind(content: str, bundle: Path) -> None:
    (bundle / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match="expected a JSON object"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "key",
    ["family", "source", "precision", "verify", "graphs", "cache", "max_positions", "vocab_size",
     "preprocessing", "prompt", "generation", "files", "versions"],
)  # fmt: skip
def test_a_missing_key(key: str, bundle: Path) -> None:
    edit(bundle, lambda values: values.pop(key))
    with pytest.raises(BundleError, match=f"does not follow schema version 1 .*{key}"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(graphs=[]),
        lambda values: values.update(files={"bridge.onnx": "hash"}),
        lambda values: values["files"]["bridge.onnx"].pop("size"),
        lambda values: values["cache"].pop("num_heads"),
        lambda values: values["cache"].update(extra=1),
        lambda values: values.update(max_positions="many"),
        lambda values: values["graphs"]["bridge"].pop("inputs"),
        lambda values: values["graphs"]["bridge"]["inputs"][0].update(dtype="float8"),
        lambda values: values["graphs"]["bridge"]["inputs"][0]["axes"][0].update(min=9),
        lambda values: values["graphs"]["bridge"]["inputs"][0].update(axes=3),
        lambda values: values["files"].pop("bridge.onnx"),
        lambda values: values["files"].pop("bridge.onnx.data"),
        lambda values: values["files"].update({"../outside": values["files"]["bridge.onnx"]}),
        lambda values: values["files"].update({"/etc/passwd": values["files"]["bridge.onnx"]}),
    ],
)
def test_a_manifest_of_another_shape(change: Callable[[dict[str, Any]], Any], bundle: Path) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match="does not follow schema version 1") as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


def test_no_bundle(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no bundle\.json; .*blip2edge export"):
        Bundle.open(tmp_path)
    for path in (tmp_path / "nowhere", bundle / MANIFEST):
        with pytest.raises(BundleError, match="is not a directory"):
            Bundle.open(path)


def test_a_file_that_is_not_listed(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "words.json").write_text("{}")
    with pytest.raises(BundleError, match=r"words\.json is not listed in bundle\.json"):
        opened.file("words.json")
    assert all(opened.file(name).is_file() for name in opened.manifest.files)


def test_a_graph_that_is_not_there(bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no graph decoder; it has bridge"):
        Bundle.open(bundle).graph("decoder")


def test_precisions_of_the_graphs_for_people() -> None:
    manifest = Bundle.open(Path(__file__).parents[1] / "data" / "golden" / "bundle").manifest
    assert manifest.precision_text == manifest.precision
    first, *others = manifest.graphs
    graphs = {**manifest.graphs, first: replace(manifest.graphs[first], precision="int8")}
    mixed = replace(manifest, graphs=graphs).precision_text
    assert mixed == f"int8 (W8A8: {first}), fp32 ({', '.join(others)}), computed from fp32"
