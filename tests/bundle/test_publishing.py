"""Publishing by rename: the old directory stays until the new one is complete, also after an error."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from blip2edge.bundle.bundle import Bundle, load_whole
from blip2edge.bundle.outputs import publishing
from blip2edge.bundle.outputs.locks import part_of, remove
from blip2edge.bundle.outputs.publishing import publish, scratch, staged
from blip2edge.errors import Blip2EdgeError, BundleError, OutputError

MARK = "bundle.json"


def holding(path: Path, text: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / MARK).write_text(text)
    return path


@pytest.fixture(params=["one step", "two renames"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A name in an empty folder; both ways of replacing a directory."""
    if request.param == "two renames":
        monkeypatch.setattr(publishing, "_renameat2", lambda *arguments: False)
    elif not _exchanges(tmp_path):
        pytest.skip("this file system exchanges no names")
    return tmp_path / "out"


def _exchanges(folder: Path) -> bool:
    first, second = holding(folder / "a", "a"), holding(folder / "b", "b")
    done = publishing._exchange(first, second)
    assert (first / MARK).read_text() == ("b" if done else "a")
    for path in (first, second):
        remove(path)
    return done


@pytest.mark.parametrize("there", [False, True])
def test_the_new_directory_takes_the_name(there: bool, out: Path) -> None:
    if there:
        (holding(out, "old") / "optimized").mkdir()
    with staged(out, force=there) as staging:
        holding(staging, "new")
        assert out.exists() == there
    assert [path.name for path in out.iterdir()] == [MARK]
    assert (out / MARK).read_text() == "new"
    assert os.listdir(out.parent) == ["out"]


def test_a_link_is_replaced_and_what_it_names_stays(out: Path) -> None:
    kept = holding(out.parent / "kept", "old")
    out.symlink_to(kept)
    with staged(out, force=True) as staging:
        holding(staging, "new")
    assert (out / MARK).read_text() == "new"
    assert not out.is_symlink()
    assert (kept / MARK).read_text() == "old"
    assert sorted(os.listdir(out.parent)) == ["kept", "out"]


def write_while_another_does(out: Path, file: str, *, force: bool) -> None:
    with staged(out, force) as staging:
        holding(staging, "new")
        out.mkdir()
        (out / file).write_text("mine")


@pytest.mark.parametrize("file", ["precious.txt", MARK])
def test_what_another_program_makes_meanwhile_is_kept(file: str, out: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        write_while_another_does(out, file, force=False)
    assert (out / file).read_text() == "mine"
    assert os.listdir(out.parent) == ["out"]


def test_force_does_not_replace_other_files_that_appear_meanwhile(out: Path) -> None:
    with pytest.raises(OutputError, match=r"no bundle\.json"):
        write_while_another_does(out, "precious.txt", force=True)
    assert os.listdir(out) == ["precious.txt"]


def test_without_a_marker_any_directory_is_replaced(out: Path) -> None:
    out.mkdir()
    (out / "half.engine").write_text("left by a crash")
    with staged(out, force=True, marker=None) as staging:
        holding(staging, "new")
    assert os.listdir(out) == [MARK]


def test_publish_refuses_an_existing_name(out: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        publish(holding(out.parent / "part" / "fresh", "new"), holding(out, "old"), replace=False)
    assert (out / MARK).read_text() == "old"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()])
def test_the_old_directory_comes_back_when_a_rename_fails(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = holding(tmp_path / "out", "old")
    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(publishing, "_renameat2", lambda *arguments: False)
    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises((OutputError, KeyboardInterrupt)), staged(out, force=True) as staging:
        holding(staging, "new")
    assert len(calls) == 3
    assert (out / MARK).read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def come(out: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Another program makes the directory at the last moment: after the check, before the rename."""
    check = publishing.check_target
    calls: list[Path] = []

    def checked(target: Path, force: bool, marker: str | None) -> None:
        check(target, force, marker)
        calls.append(target)
        if len(calls) == 3:  # before the lock, with the lock, before the rename
            remove(out)
            holding(out, "theirs").joinpath(MARK).rename(out / file)

    monkeypatch.setattr(publishing, "check_target", checked)


def test_what_comes_after_the_last_look_is_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    come(out, monkeypatch, "precious.txt")
    with pytest.raises(OutputError, match="exists"), staged(out, force=False) as staging:
        holding(staging, "new")
    assert (out / "precious.txt").read_text() == "theirs"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_force_gives_back_what_it_must_not_replace(there: bool, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if there:
        holding(out, "old")
    come(out, monkeypatch, "precious.txt")
    with pytest.raises(OutputError, match=r"no bundle\.json"), staged(out, force=True) as staging:
        holding(staging, "new")
    assert (out / "precious.txt").read_text() == "theirs"
    assert os.listdir(out.parent) == ["out"]


def test_what_comes_between_two_renames_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = holding(tmp_path / "out", "old")
    rename = publishing._rename_to_free

    def comes(fresh: Path, target: Path) -> None:
        if target == out:
            (holding(target, "theirs") / "precious.txt").touch()
        rename(fresh, target)

    monkeypatch.setattr(publishing, "_renameat2", lambda *arguments: False)
    monkeypatch.setattr(publishing, "_rename_to_free", comes)
    with pytest.raises(OutputError, match=r"another program made .*out\.replaced"), staged(out, force=True) as staging:
        holding(staging, "new")
    assert (out / MARK).read_text() == "theirs"
    assert (tmp_path / "out.replaced" / MARK).read_text() == "old"


def test_the_old_directory_is_kept_where_its_other_name_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, left = holding(tmp_path / "out", "old"), part_of(tmp_path / "out") / "old"
    holding(tmp_path / "out.replaced", "of an earlier run")
    rename = publishing._rename_to_free

    def comes(fresh: Path, target: Path) -> None:
        if target == out:
            holding(target, "theirs")
        rename(fresh, target)

    monkeypatch.setattr(publishing, "_renameat2", lambda *arguments: False)
    monkeypatch.setattr(publishing, "_rename_to_free", comes)
    with pytest.raises(OutputError, match=rf"the old directory is {left}"), staged(out, force=True) as staging:
        holding(staging, "new")
    for _ in range(2):  # no later run removes it either
        with pytest.raises(OutputError, match="could not be renamed back"), staged(out, force=True):
            pytest.fail("it began")
        assert (left / MARK).read_text() == "old"
    left.rename(tmp_path / "moved")
    left.with_name("keep").unlink()
    monkeypatch.undo()
    with staged(out, force=True) as staging:
        holding(staging, "newest")
    assert (out / MARK).read_text() == "newest"
    assert not part_of(out).exists()


@pytest.mark.parametrize("taken", [False, True])
def test_what_must_not_be_replaced_is_kept_if_it_cannot_get_its_name_back(
    taken: bool, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    come(out, monkeypatch, "precious.txt")
    holding(out, "old")
    if taken:
        holding(out.parent / "out.replaced", "of an earlier run")

    def fails(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def checked(directory: Path, marker: str | None) -> bool:
        if directory == out:
            return True
        monkeypatch.setattr(Path, "rename", fails)  # of the steps back
        monkeypatch.setattr(publishing, "_renameat2", fails)
        monkeypatch.setattr(publishing, "_rename_to_free", to_free)
        return False

    def to_free(source: Path, target: Path) -> None:
        if taken:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(source, target)

    monkeypatch.setattr(publishing, "_replaceable", checked)
    with pytest.raises(OutputError, match="could not be renamed back: its files are in ") as raised:
        write_new(out)
    kept = Path(str(raised.value.problem).rpartition(" ")[2])
    assert (kept.parent == part_of(out)) == taken
    assert (kept / "precious.txt").read_text() == "theirs"


def write_new(out: Path) -> None:
    with staged(out, force=True) as staging:
        holding(staging, "new")


def kill_in(out: Path, call: str, *, in_one_step: bool) -> int:
    """Replaces ``out`` in a process that is killed as it calls a function of ``publishing``; returns its status."""
    child = os.fork()
    if not child:
        try:
            setattr(publishing, call, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
            if not in_one_step:
                publishing._renameat2 = lambda *arguments: False
            with staged(out, force=True) as staging:
                holding(staging, "new")
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is forked")
@pytest.mark.parametrize("next_run", ["load", "force", "no force"])
@pytest.mark.parametrize(
    ("call", "in_one_step", "left"),
    [
        ("_flush", True, "old"),
        ("_exchange", True, "old"),
        ("flush_names", True, "old"),  # while the files are written to the disk
        ("remove", True, "new"),
        ("_rename_to_free", False, ""),  # between two renames
        ("remove", False, "new"),
    ],
)
def test_a_kill_leaves_the_old_or_the_new_directory(
    call: str, in_one_step: bool, left: str, next_run: str, tmp_path: Path
) -> None:
    out = holding(tmp_path / "out", "old")
    assert kill_in(out, call, in_one_step=in_one_step) == signal.SIGKILL
    assert (out.exists() and (out / MARK).read_text()) == (left or False)
    assert part_of(out).is_dir()
    if next_run == "load":
        with pytest.raises(BundleError, match="cannot be read as JSON"):  # our bundle.json says "old"
            Bundle.open(out)
        assert (out / MARK).read_text() == (left or "old")
        return
    if next_run == "no force":
        with pytest.raises(OutputError, match="exists"), staged(out, force=False):
            pass
        assert (out / MARK).read_text() == (left or "old")
    with staged(out, force=True) as staging:
        holding(staging, "newest")
    assert (out / MARK).read_text() == "newest"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOENT, BundleError), (errno.ENOSPC, OutputError)])
def test_only_a_full_disk_makes_an_error_of_an_input_one_of_the_output(
    number: int, kind: type[Blip2EdgeError], out: Path
) -> None:
    with pytest.raises(Blip2EdgeError) as raised, staged(out, force=False):
        raise BundleError("a file cannot be read", "copy it again") from OSError(number, os.strerror(number))
    assert type(raised.value) is kind


def fault_while_handling(number: int) -> None:
    try:
        raise OSError(number, os.strerror(number))
    except OSError:
        raise KeyError("a fault of our own")  # noqa: B904 - it has a context and no cause


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOENT, KeyError), (errno.ENOSPC, OutputError)])
def test_an_error_beside_another_one_is_of_the_output_only_if_the_disk_is_full(
    number: int, kind: type[Exception], out: Path
) -> None:
    with pytest.raises((KeyError, OutputError)) as raised, staged(out, force=False):
        fault_while_handling(number)
    assert type(raised.value) is kind


def test_scratch_files_are_removed_with_the_run(out: Path) -> None:
    with staged(out, force=False) as staging:
        (scratch(staging, "feeds") / "1.npz").touch()
        holding(staging, "new")
    assert os.listdir(out.parent) == ["out"]
    assert os.listdir(out) == [MARK]


@pytest.mark.parametrize("folder", ["optimized", "engines"])
def test_a_bundle_is_not_replaced_while_a_run_writes_into_it(folder: str, out: Path) -> None:
    holding(out, "old")
    with (
        staged(out / folder / "cpu", force=True, marker=None),
        pytest.raises(OutputError, match=f"another run writes {out}/{folder}/cpu"),
        staged(out, force=True),
    ):
        pytest.fail("it began")
    with (
        staged(out, force=True) as staging,
        pytest.raises(OutputError, match=f"another run writes {out}: process {os.getpid()}"),
        staged(out / folder / "cpu", force=True, marker=None),
    ):
        pytest.fail(f"it began beside {staging}")


def test_a_bundle_is_not_replaced_between_reading_and_writing(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    opened = Bundle.open(copy)
    opened.check_unchanged()
    with staged(copy, force=True) as staging:
        shutil.copytree(tiny_bundle, staging, dirs_exist_ok=True)
    with pytest.raises(BundleError, match="was replaced by another run"):
        opened.check_unchanged()


def test_what_is_loaded_comes_from_one_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    tries: list[str] = []

    def load(bundle: Bundle) -> int:
        if not tries:  # it is replaced while it is loaded
            with staged(copy, force=True) as staging:
                shutil.copytree(tiny_bundle, staging, dirs_exist_ok=True)
        tries.append(bundle.sha256)
        if len(tries) == 1:
            raise BundleError("a file of the other bundle", "none")
        return (copy / MARK).stat().st_ino

    assert load_whole(copy, load) == (copy / MARK).stat().st_ino
    assert len(tries) == 2
