"""The tests notice changes of the kernels: a sample of the mutants, and the list of what is changed."""

from __future__ import annotations

import re

import pytest

from tests.runtime.cuda.kernel_mutants import SAME, SUITES, mutants, run

LEAST = 0.95


def test_every_source_is_changed_and_barriers_are_removed() -> None:
    found = {file: list(mutants(file)) for file in SUITES}
    assert all(len(changes) >= 10 for changes in found.values())
    barriers = [one for changes in found.values() for one in changes if "__syncthreads" in one.before]
    assert len(barriers) >= 10
    for file, changes in found.items():
        for one in changes:
            assert one.after != one.before
            assert not any(re.search(same, one.after) for same, _ in SAME), file


@pytest.mark.slow
def test_a_sample_of_the_mutants_is_killed() -> None:
    tried = run(20, seed=2, files=sorted(SUITES))
    survived = [f"{one.file}:{one.line}: {one.after.strip()}" for one in tried if one.outcome == "survived"]
    assert len(tried) - len(survived) >= LEAST * len(tried), survived
