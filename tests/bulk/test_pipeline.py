"""Runs of bulk on a tiny bundle: rows, formats, exact resume, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("pyarrow", reason="pip install 'blip2edge[bulk]'")

from blip2edge.bulk import pipeline, read_errors, run_files
from blip2edge.bulk.captioning import ChunkResult
from blip2edge.bulk.options import BulkOptions
from blip2edge.bulk.pipeline import REPORT_FILE, Output, run_bulk
from blip2edge.bulk.rows import Row
from blip2edge.bulk.sinks import sink_of
from blip2edge.bulk.sources import PictureSource
from blip2edge.bulk.stores import LocalStore
from blip2edge.bundle.outputs.locks import BusyError, locked
from blip2edge.cli import main
from blip2edge.errors import DataError, OutputError, UsageError
from blip2edge.limits import Limits
from blip2edge.runtime.captioning.captioner import Captioner, CaptionResult
from blip2edge.training.data.entries import BrokenSamples
from blip2edge.training.data.shards import read_shards

PICTURES, TOKENS = 11, 5
Run = Callable[..., Path]


class KilledError(BaseException):
    """In the place of a kill."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures, of which 3 is cut off, 6 is empty, and 9 is a copy of 1."""
    root = tmp_path_factory.mktemp("source") / "pictures"
    root.mkdir()
    random = np.random.default_rng(5)
    for number in range(PICTURES):
        Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8)).save(root / f"{number:02d}.png")
    (root / "03.png").write_bytes((root / "03.png").read_bytes()[:90])
    (root / "06.png").write_bytes(b"")
    shutil.copy(root / "01.png", root / "09.png")
    return root


@pytest.fixture
def run(tiny_bundle: Path, folder: Path, tmp_path: Path) -> Run:
    """Runs bulk; returns the output."""

    def run(name: str, *, source: Path = folder, form: str | None = None, force: bool = False, **more: Any) -> Path:
        generation = {"max_new_tokens": TOKENS, **more.pop("generation", {})}
        options = BulkOptions(tiny_bundle, generation=generation, chunk_size=4, batch_size=3, threads=1, **more)
        output = Output.named(tmp_path / name, form, force)
        run_bulk(PictureSource(str(source)), output, options)
        return output.target

    return run


def rows(path: Path) -> list[Row]:
    sink = sink_of("webdataset" if list(path.glob("*.tar")) or path.suffix == ".tar" else "parquet")
    parts = [path] if path.is_file() else sorted(path.glob(f"*{sink.suffix}"))
    return [row for part in parts for row in sink.rows(part)]


def content(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in ([path] if path.is_file() else path.iterdir())}


def test_captions_are_those_of_the_captioner_and_broken_pictures_have_a_reason(
    run: Run, folder: Path, tiny_bundle: Path
) -> None:
    found = rows(run("out.parquet"))
    assert [row.image for row in found] == [f"{number:02d}.png" for number in range(PICTURES)]
    broken = {row.image: row.error for row in found if row.error is not None}
    assert broken["06.png"] == "06.png: the file is empty"
    assert "the picture is broken" in (broken["03.png"] or "")
    assert [row.captions for row in found if row.error] == [(), ()]
    with Captioner.load(tiny_bundle, threads=1) as captioner:
        results = captioner.caption_many(sorted(folder.iterdir()), return_exceptions=True, max_new_tokens=TOKENS)
        expected = [result.text if isinstance(result, CaptionResult) else None for result in results]
    assert [row.captions[0] if row.captions else None for row in found] == expected
    assert all(len(row.logprobs) == 1 and row.logprobs[0] < 0 for row in found if not row.error)


@pytest.mark.parametrize("captions", [{"num_beams": 4}, {"temperature": 1.0}], ids=["beams", "sampling"])
def test_several_captions_do_not_depend_on_their_number(run: Run, captions: dict[str, Any]) -> None:
    three, one = (rows(run(f"{count}.parquet", captions=count, generation=captions)) for count in (3, 1))
    usable = [row for row in three if not row.error]
    assert all(len(row.captions) == len(row.logprobs) == 3 for row in usable)
    assert sum(len(set(row.captions)) > 1 for row in usable) > len(usable) // 2
    assert [row.captions[:1] for row in three] == [row.captions for row in one]
    for row, alone in zip(three, one, strict=True):
        assert row.logprobs[:1] == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_shard_has_the_pictures_own_bytes(run: Run, folder: Path) -> None:
    single, several = run("out.tar"), run("shards", form="webdataset")
    assert rows(single) == rows(several) == rows(run("out.parquet"))
    assert sorted(content(several)) == [REPORT_FILE, *(f"part-{number:06d}.tar" for number in range(3))]
    broken = BrokenSamples("shards", 10)
    entries = list(read_shards([single], broken))
    assert [entry.text for entry in entries] == [row.captions[0] for row in rows(single) if row.captions]
    assert entries[0].picture.read() == (folder / "00.png").read_bytes()
    assert len(broken.problems) == 2


def test_a_duplicate_takes_the_captions_of_its_original(run: Run) -> None:
    plain, found = rows(run("plain.parquet")), rows(run("out.parquet", duplicates=0.9999))
    assert [row.image for row in found if row.duplicate_of] == ["09.png"]
    assert (found[9].duplicate_of, found[9].captions, found[9].logprobs) == (
        "01.png",
        found[1].captions,
        found[1].logprobs,
    )
    assert found[9].similarity == pytest.approx(1, abs=1e-3)
    assert [row.captions for row in found] == [row.captions for row in plain]


@pytest.mark.parametrize("name", ["out.parquet", "out.tar", "parts"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run is killed before and after each of its renames: every number of them, one after the other."""
    options = {"duplicates": 0.9999} if name == "parts" else {}
    whole = content(run(name, **options))
    shutil.rmtree(tmp_path / name) if name == "parts" else (tmp_path / name).unlink()
    replace, left = os.replace, [0]

    def killed(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KilledError
        replace(*arguments)
        if left[0] == -1:
            raise KilledError

    kills = 0
    for number in range(1, 20):
        left[0] = number // 2 if number % 2 else number // 2 + 1
        monkeypatch.setattr(os, "replace", killed)
        try:
            run(name, **options)
        except KilledError:
            kills += 1
        else:
            break
    assert kills > 3
    monkeypatch.undo()
    assert content(run(name, **options)) == whole
    assert os.listdir(tmp_path) == [name]


def test_a_complete_output_is_not_made_again(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = run("out.parquet")
    status = out.stat()
    monkeypatch.setattr(pipeline._OutputWriter, "compute", lambda *_: pytest.fail("computed again"))
    assert run("out.parquet").stat() == status
    with pytest.raises(OutputError, match=re.escape("of another run: captions was 1, and is 2 now")):
        run("out.parquet", captions=2, generation={"num_beams": 2})
    (tmp_path / "other.parquet").write_bytes(b"mine")
    (tmp_path / "folder.tar").mkdir()
    for name in ("other.parquet", "folder.tar"):
        for force in (False, True):
            with pytest.raises(OutputError, match="exists, and was not made by bulk; give another output"):
                run(name, force=force)
    assert (tmp_path / "other.parquet").read_bytes() == b"mine"


def test_a_killed_run_is_continued_with_the_same_plan_only(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = shutil.copytree(folder, tmp_path / "pictures")
    monkeypatch.setattr(pipeline, "publish_file", lambda *_, **__: (_ for _ in ()).throw(KilledError()))
    with pytest.raises(KilledError):
        run("out.parquet", source=source)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "out.parquet.run"))[:2] == ["part-000000.parquet", "part-000001.parquet"]
    with pytest.raises(OutputError, match=r"another plan: prompt was null, and is \"a photo\" now"):
        run("out.parquet", source=source, prompt="a photo")
    (source / "05.png").unlink()
    with pytest.raises(DataError, match=r"was changed since the run of .* began: 05\.png was removed"):
        run("out.parquet", source=source)
    shutil.copy(source / "00.png", source / "00b.png")
    with pytest.raises(DataError, match=r"00b\.png was added"):
        run("out.parquet", source=source)
    (tmp_path / "out.parquet.run" / "part-000000.parquet").unlink()  # then the later parts are made again as well
    assert len(rows(run("out.parquet", source=source, force=True))) == PICTURES
    assert sorted(os.listdir(tmp_path)) == ["out.parquet", "pictures"]


def test_a_picture_above_a_limit_is_a_row_with_its_reason(run: Run) -> None:
    found = rows(run("out.parquet", limits=Limits(side=39)))
    assert [row.captions for row in found] == [()] * PICTURES
    assert found[0].error == "00.png: expected at most 89478485 pixels and at most 39 a side, got 40×30"


def test_a_second_run_of_an_output_is_refused(run: Run, tmp_path: Path) -> None:
    with locked(tmp_path / "out.parquet"), pytest.raises(BusyError, match="another run writes"):
        run("out.parquet")


def test_wrong_options_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected num_captions 1 with greedy decoding, got 3"):
        run("out.parquet", captions=3)
    with pytest.raises(UsageError, match=r"expected num_captions of at most num_beams \(2\), got 3"):
        run("out.parquet", captions=3, generation={"num_beams": 2})
    with pytest.raises(UsageError, match="expected format parquet"):
        Output.named(tmp_path / "out.parquet", "webdataset", False)
    for address in ("s3://bucket/out.parquet", "memory://out"):
        with pytest.raises(UsageError, match="expected an output on the local disk, got"):
            Output.named(Path(address), None, True)
    assert Output.named(Path("C:/out.parquet"), None, False).single
    assert not Output.named(Path("captions.v2"), None, False).single
    for name in ("c.csv", "c.JSONL"):
        with pytest.raises(UsageError, match=r"to be NAME\.parquet, NAME\.tar or the name of a directory"):
            Output.named(Path(name), None, False)
    assert os.listdir(tmp_path) == []


def test_the_command(folder: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bulk", str(folder), "-o", str(tmp_path / "out"), "-b", str(tiny_bundle), "--threads", "1"]
    assert main([*words, "--max-new-tokens", "3", "--json"]) == 0
    output = capsys.readouterr()
    counts = json.loads(output.out)
    assert {name: counts[name] for name in ("pictures", "broken", "duplicates", "parts", "computed")} == {
        "pictures": PICTURES, "broken": 2, "duplicates": 0, "parts": 1, "computed": PICTURES,
    }  # fmt: skip
    assert "pictures/s" in output.err
    assert main([*words, "--max-new-tokens", "3"]) == 0
    assert "complete already" in capsys.readouterr().out
    assert main([*words, "--max-new-tokens", "4"]) == 1
    assert "of another run: generation.max_new_tokens was 3, and is 4 now; " in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"")
    assert main(["bulk", str(broken), "-o", str(tmp_path / "none.parquet"), *words[4:]]) == 1
    assert "error: no picture could be read" in capsys.readouterr().err
    assert [row.error is not None for row in rows(tmp_path / "none.parquet")] == [True]


def test_a_disk_that_fails_ends_the_run_and_its_parts_are_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, read = content(run("whole.parquet")), LocalStore.read

    def fail(self: LocalStore, path: str, start: int = 0, size: int | None = None) -> bytes:
        if path.endswith("08.png"):
            raise OSError(errno.EIO, "Input/output error", path)
        return read(self, path, start, size)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read", fail)
        patch.setattr(read_errors, "PAUSE_S", 0.0)
        with pytest.raises(
            DataError, match=r"08\.png cannot be read .*Input/output error.*; make the storage readable"
        ):
            run("out.parquet")
    assert (tmp_path / "out.parquet.run" / "part-000000.parquet").is_file()
    assert content(run("out.parquet"))["out.parquet"] == whole["whole.parquet"]


@pytest.mark.parametrize("complete", [False, True])
def test_the_snapshots_of_a_training_are_kept(run: Run, tmp_path: Path, complete: bool) -> None:
    """A training of the same name has its snapshots in ``OUT.run``."""
    if complete:
        run("out")
    snapshots = tmp_path / "out.run"
    snapshots.mkdir()
    for name in ("plan.json", "part-000000", "snapshot-000100.safetensors"):
        (snapshots / name).write_text("{}")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"out\.run exists, and was not made by bulk"):
            run("out", force=force)
    assert len(os.listdir(snapshots)) == 3


def test_a_killed_run_with_force_is_resumed_with_force(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = content(run("out", prompt="a photo"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "publish", lambda *_, **__: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            run("out", force=True)
    assert content(tmp_path / "out") == old
    written: list[int] = []
    write = pipeline._OutputWriter._write

    def write_part(self: pipeline._OutputWriter, number: int, part: ChunkResult) -> None:
        written.append(number)
        write(self, number, part)

    monkeypatch.setattr(pipeline._OutputWriter, "_write", write_part)
    (tmp_path / "out.run" / "part-000002.parquet").unlink()
    assert content(run("out", force=True)) == content(run("new"))
    assert written == [2, 0, 1, 2]  # the missing part, and all of the new output
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


def test_a_directory_that_is_none_of_bulk_is_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.parquet.run").mkdir()
    (tmp_path / "out.parquet.run" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by bulk"):
        run("out.parquet")
    assert (tmp_path / "out.parquet.run" / "notes.txt").is_file()
    assert run_files.RUN_SUFFIX == ".run"
