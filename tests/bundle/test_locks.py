"""Locks of outputs: one run at a time, files of killed runs are removed, files of other runs are kept."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blip2edge.bundle.outputs import locks
from blip2edge.bundle.outputs.disk_errors import error_number, output_error
from blip2edge.bundle.outputs.locks import (
    BusyError,
    LeftFilesWarning,
    check_free,
    locked,
    part_of,
    recover,
    tidy,
    write_file,
)
from blip2edge.bundle.outputs.machine import on_network
from blip2edge.errors import OutputError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the other run is forked")


def in_child(call: Callable[[], None]) -> int:
    """Runs a function in a forked process; returns its process id once the function has said that it is ready."""
    child = os.fork()
    if not child:
        try:
            call()
        finally:
            os._exit(1)
    return child


def killed_run(target: Path) -> Path:
    """Leaves the files of a run that was killed; returns their directory."""

    def run() -> None:
        with locked(target) as part:
            (part / "new").mkdir()
            (part / "new" / "weights").write_bytes(bytes(1000))
            (part / "feeds").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.waitpid(in_child(run), 0)[1] == signal.SIGKILL
    return part_of(target)


def test_a_second_run_is_refused_with_what_to_do(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out) as part:
        (part / "new").touch()
        with (
            pytest.raises(BusyError, match=rf"another run writes .*out: process {os.getpid()}.*, started 20") as raised,
            locked(out),
        ):
            pytest.fail("it began")
        assert f"kill {os.getpid()}" in str(raised.value.fix)
        with pytest.raises(BusyError):
            check_free(out)
        assert sorted(os.listdir(part)) == ["new", "owner"]
        with locked(tmp_path / "other"):  # another output is free
            check_free(tmp_path / "third")
    check_free(out)
    assert os.listdir(tmp_path) == []


@needs_fork
def test_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    part = killed_run(tmp_path / "out")
    assert sorted(os.listdir(part)) == ["feeds", "new", "owner"]
    with locked(tmp_path / "other"):
        assert part.is_dir()
    with locked(tmp_path / "out") as again:
        assert again == part
        assert os.listdir(part) == ["owner"]
        assert json.loads((part / "owner").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


@needs_fork
def test_what_is_left_of_a_finished_file_is_removed_by_its_reader(tmp_path: Path) -> None:
    file = tmp_path / "cache.npz"
    file.write_bytes(b"complete")
    left = killed_run(file)
    with locked(tmp_path / "other"):
        tidy(tmp_path / "other")  # of a living run
        assert part_of(tmp_path / "other").is_dir()
    tidy(file)
    assert not left.exists()
    assert file.read_bytes() == b"complete"


def test_what_cannot_be_removed_now_is_removed_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    real = locks.remove
    with locked(out) as part:
        (part / "new").mkdir()
        monkeypatch.setattr(locks, "remove", lambda path: None)  # as without a free descriptor
    monkeypatch.setattr(locks, "remove", real)
    assert sorted(os.listdir(part)) == ["new", "owner"]
    with locked(out):
        assert os.listdir(part) == ["owner"]
    assert os.listdir(tmp_path) == []


@needs_fork
def test_files_of_a_living_run_are_kept(tmp_path: Path) -> None:
    out, (reading, writing) = tmp_path / "out", os.pipe()

    def run() -> None:
        with locked(out) as part:
            (part / "new").touch()
            os.write(writing, b"x")
            signal.pause()

    child = in_child(run)
    os.read(reading, 1)
    with pytest.raises(BusyError, match=f"process {child}"), locked(out):
        pytest.fail("it began")
    assert (part_of(out) / "new").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(out) as part:
        assert os.listdir(part) == ["owner"]


@needs_fork
def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path: Path) -> None:
    out, (reading, writing) = tmp_path / "out", os.pipe()

    def run() -> None:
        with locked(out):
            worker = in_child(signal.pause)
            os.write(writing, worker.to_bytes(4, "little"))
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(run), 0)
    worker = int.from_bytes(os.read(reading, 4), "little")
    try:
        with locked(out):
            os.kill(worker, 0)  # it lives
    finally:
        os.kill(worker, signal.SIGKILL)


def test_threads_that_begin_at_once(tmp_path: Path) -> None:
    inside, most, refused, done = [0], [0], [0], [0]
    guard = threading.Lock()

    def run() -> None:
        for _ in range(8):
            try:
                with locked(tmp_path / "out") as part:
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    (part / "new").mkdir()
                    with guard:
                        inside[0] -= 1
                        done[0] += 1
            except BusyError:
                refused[0] += 1

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert done[0] + refused[0] == 32
    assert done[0]
    assert os.listdir(tmp_path) == []


@needs_fork
def test_without_locks_the_files_of_other_runs_are_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    left = killed_run(out)

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with pytest.warns(LeftFilesWarning, match=rf"{left}: files of another run"), locked(out) as part:  # noqa: PT031
        assert part != left
        (part / "new").mkdir()
    assert sorted(os.listdir(left)) == ["feeds", "new", "owner"]
    assert os.listdir(tmp_path) == [left.name]


def test_without_locks_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with locked(tmp_path / "out") as part:
        (part / "new").mkdir()
    assert os.listdir(tmp_path) == []


@needs_fork
@pytest.mark.parametrize("network", [True, False])
def test_a_run_of_another_machine(network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = killed_run(tmp_path / "out")
    monkeypatch.setattr(locks, "machine", lambda: "another")
    monkeypatch.setattr(locks, "on_network", lambda path: network)
    if network:
        with pytest.warns(LeftFilesWarning), locked(tmp_path / "out"):
            assert (left / "new").is_dir()
        return
    with locked(tmp_path / "out"):  # a local disk after the machine was started again
        assert os.listdir(left) == ["owner"]


def test_kind_of_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not on_network(tmp_path)
    device = tmp_path.stat().st_dev
    line = f"30 20 {os.major(device)}:{os.minor(device)} / /mnt rw - nfs4 server:/ rw\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: line)
    assert on_network(tmp_path) == (os.name == "posix")


def test_a_directory_of_that_name_that_is_not_ours_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="was not made by blip2edge"), locked(tmp_path / "out"):
        pytest.fail("it began")
    assert (tmp_path / ".out.part" / "thesis.txt").exists()
    (tmp_path / "victim").mkdir()
    (tmp_path / ".linked.part").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="is a link"), locked(tmp_path / "linked"):
        pytest.fail("it began")
    assert os.listdir(tmp_path / "victim") == []


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "owner").symlink_to(victim)
    with pytest.raises(OutputError, match="could not be written"), locked(tmp_path / "out"):
        pytest.fail("it began")
    check_free(tmp_path / "out")
    assert victim.read_text() == "precious"


def test_no_flag_of_the_command_is_written_into_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/blip2edge", "serve", "BUNDLE", "--api-key", "s3cret"])
    with locked(tmp_path / "out") as part:
        assert json.loads((part / "owner").read_text())["command"] == "blip2edge serve"


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "*[a]?"])
def test_odd_names(name: str, tmp_path: Path) -> None:
    with locked(tmp_path / name) as part:
        (part / "new").mkdir()
        (part / "new").rename(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_name_with_a_nul(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"'.*a\\x00b' is not a usable file name"), locked(tmp_path / "a\0b"):
        pytest.fail("it began")
    with pytest.raises(OutputError, match="not a usable file name"):
        write_file(tmp_path / "a\0b", b"")


@needs_fork
def test_old_is_not_removed_where_it_cannot_get_its_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    left = killed_run(out)
    (left / "old").write_text("precious")
    real = Path.rename

    def refused(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    with locked(out):
        pass
    recover(out)
    assert (left / "old").read_text() == "precious"
    monkeypatch.setattr(Path, "rename", real)
    recover(out)
    assert out.read_text() == "precious"


def test_a_lock_that_was_removed_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock's file is replaced between open and flock: another run holds the new one, between two renames."""
    part = part_of(tmp_path / "out")
    part.mkdir()
    for name in ("old", "owner"):
        (part / name).touch()
    real = locks.fcntl.flock
    held: list[int] = []

    def replaced(descriptor: int, flags: int) -> None:
        if not held:
            (part / "owner").unlink()
            held.append(os.open(part / "owner", os.O_RDWR | os.O_CREAT))
            real(held[0], locks.fcntl.LOCK_EX)
        real(descriptor, flags)

    monkeypatch.setattr(locks.fcntl, "flock", replaced)
    monkeypatch.setattr(locks, "WAIT_S", 0.0)
    recover(tmp_path / "out")
    assert (part / "old").exists()
    os.close(held[0])
    recover(tmp_path / "out")
    assert (tmp_path / "out").exists()


# Single files


def test_a_file_is_replaced_as_a_whole_and_other_links_keep_theirs(tmp_path: Path) -> None:
    file, other = tmp_path / "report.json", tmp_path / "other"
    write_file(file, b"old")
    file.chmod(0o640)
    os.link(file, other)
    write_file(file, memoryview(b"new"))
    assert (file.read_bytes(), other.read_bytes()) == (b"new", b"old")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["other", "report.json"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_secret_file_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, real = tmp_path / "key.pem", os.fsync
    modes: list[int] = []
    key.touch(0o644)

    def fsync(descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(key, b"secret", mode=0o600)
    assert (modes, stat.S_IMODE(key.stat().st_mode), key.read_bytes()) == ([0o600], 0o600, b"secret")


def test_a_file_that_cannot_be_written_keeps_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    write_file(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_link_is_followed_and_a_directory_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", b"new")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_pipes_and_devices_are_written_directly(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):  # nothing reads: an error, not a wait
        write_file(tmp_path / "pipe", b"new")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    write_file(Path(os.devnull), b"new")
    with pytest.raises(OSError, match="No space left"):
        write_file(Path("/dev/full"), b"new")


# Errors


def test_errors_that_lost_their_number(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    array = np.zeros(1 << 16, np.float32)
    for write in (array.tofile, lambda file: np.save(file, array), lambda file: file.write(array.tobytes())):
        with pytest.raises(OSError, match=r"requested|No space") as raised, full.open("wb", buffering=0) as file:
            write(file)
        assert error_number(raised.value) == errno.ENOSPC
        problem = output_error(tmp_path, raised.value).problem
        assert problem == f"the disk is full: {tmp_path} could not be written"


@needs_fork
def test_errors_of_safetensors(tmp_path: Path) -> None:
    """It writes beside the file and renames, so never to /dev/full: the size of files is limited instead."""
    resource = pytest.importorskip("resource")
    safetensors = pytest.importorskip("safetensors.numpy")
    reading, writing = os.pipe()

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            safetensors.save_file({"a": np.zeros(1 << 16, np.float32)}, tmp_path / "file")
        except Exception as error:  # noqa: BLE001 - it is of the library
            os.write(writing, output_error(tmp_path, error).problem.encode())
            os._exit(0)

    assert os.waitpid(in_child(run), 0)[1] == 0
    assert os.read(reading, 1000).decode() == f"the file is larger than the limit: {tmp_path} could not be written"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "too many files are open"),
        (errno.EIO, "the disk reports an error"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EFBIG, "the file is larger than the limit"),
        (errno.EDQUOT, "the disk is full"),
    ],
)
def test_errors_in_plain_words(number: int, words: str, tmp_path: Path) -> None:
    error = RuntimeError("a library's own words")
    error.__cause__ = OSError(number, os.strerror(number))
    assert words in output_error(tmp_path, error).problem
