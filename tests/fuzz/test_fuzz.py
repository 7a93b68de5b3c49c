"""A few mutated files of every reader, in this process; ``make fuzz N=…`` reads more."""

from __future__ import annotations

import faulthandler
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the checkpoint and the bundle are made here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")

from blip2edge.bundle import fields
from blip2edge.errors import DataError
from blip2edge.reading import parse_json, reading
from tests.drawing import Drawn
from tests.fuzz.corpus import Corpus
from tests.fuzz.run import Outcome, counts, fuzz, mutated, own_fault, table
from tests.fuzz.targets import TARGETS

FEW, MANY = 6, 40  # inputs of a slow reader, and of the others


@pytest.fixture(scope="module")
def corpus(tiny_checkpoint: Drawn, tiny_bundle: Path) -> Corpus:
    return Corpus(tiny_checkpoint.directory, tiny_bundle)


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_raises_declared_errors_only(name: str, corpus: Corpus, tmp_path: Path) -> None:
    target = TARGETS[name]
    absent = [package for package in target.packages if importlib.util.find_spec(package) is None]
    if absent:
        pytest.skip(f"{absent[0]} is not installed")
    seeds = target.seeds(corpus)
    read = target.prepare(corpus, tmp_path)
    refused: list[str] = []
    for seed in seeds:
        read(seed)  # the seeds are valid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of broken metadata
        for number in range(len(seeds), len(seeds) + (FEW if target.share < 1 else MANY)):
            try:
                read(mutated(target, name, seeds, 11, number))
            except target.errors as error:
                refused.append(f"{number}: {error}")
    assert bool(refused) == target.refuses
    assert not [message for message in refused if "\n" in message]


def test_an_input_is_the_same_in_every_run(corpus: Corpus) -> None:
    target = TARGETS["bundle.json"]
    seeds = target.seeds(corpus)
    first, again, other = (mutated(target, "bundle.json", seeds, seed, 77) for seed in (1, 1, 2))
    assert first == again != other


def test_what_does_not_hold_is_counted(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that fails, one that crashes and one that does not end, each in a process of its own."""
    import dataclasses
    import os
    import signal
    import time

    from tests.fuzz import run

    def broken(number: bytes) -> None:
        if number == b"7":
            raise KeyError("no declared error")
        if number == b"8":
            faulthandler.disable()  # pytest's would print a traceback into its log
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == b"9":
            time.sleep(60)

    seeds = [str(number).encode() for number in range(12)]
    target = dataclasses.replace(
        TARGETS["recipe"], seeds=lambda _: seeds, prepare=lambda corpus, folder: broken, seconds=0.2, packages=()
    )
    monkeypatch.setitem(TARGETS, "recipe", target)
    monkeypatch.setattr(run, "warm", lambda read, seeds, errors: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside torch's threads
        found = fuzz("recipe", corpus, 12, 0)
    assert (found.tried, found.accepted, found.refused, found.failed) == (12, 9, 0, 3)
    kinds = {kind.split(" ")[0].rstrip(":"): numbers for kind, numbers in found.examples.items()}
    assert kinds == {"KeyError": [7], "crash": [8], "longer": [9]}


def test_a_fault_of_our_own_code_is_not_hidden_by_the_guard(tmp_path: Path) -> None:
    def refused(read: Callable[[], object]) -> DataError:
        with pytest.raises(DataError) as raised, reading("a", "a shard", DataError):
            read()
        return raised.value

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fields, "MAX_ITEMS", None)
        found = refused(lambda: fields.any_object({}, ""))
    hidden = own_fault(found)
    assert hidden.startswith("hidden by the guard: TypeError at fields.py:"), (found.__cause__, fields.__file__)
    assert not own_fault(refused(lambda: parse_json("[")))
    empty: dict[str, int] = {}
    assert not own_fault(refused(lambda: empty["a test's own"]))


def test_the_table_and_the_shares() -> None:
    outcomes = {"a": Outcome(tried=2000, accepted=1, refused=1998, findings={"x": 1}), "b": Outcome(skipped="none")}
    assert table(outcomes).splitlines()[2:] == [
        "| a | 2,000 | 1 | 1,998 | 1 |",
        "| b | – | – | – | skipped: none |",
        "| **all** | 2,000 | 1 | 1,998 | 1 |",
    ]
    given = dict(counts(10_000, ["bundle.json", "video"], 500))
    assert given["bundle.json"] > 9000
    assert given["video"] == 500
