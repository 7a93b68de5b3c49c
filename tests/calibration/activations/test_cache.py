"""The cache of observations: saved ones are read again, damaged ones are ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blip2edge.calibration.activations.cache import load_observations, save_observations
from blip2edge.calibration.activations.observer import Observation, Observer
from blip2edge.errors import DataError


def observed() -> dict[str, Observation]:
    random = np.random.default_rng(0)
    found = {}
    for name in ("norm", "gelu"):
        observer = Observer(5, seed=1)
        for _ in range(5):
            observer.update(random.standard_t(3, (1, 7, 12)).astype(np.float32))
        found[name] = observer.result()
    return found


def test_what_is_written_is_read(tmp_path: Path) -> None:
    kept = observed()
    save_observations(tmp_path / "new" / "one.npz", kept)
    read = load_observations(tmp_path / "new" / "one.npz", list(kept))
    assert read is not None
    assert list(read) == list(kept)
    for name, wanted in kept.items():
        got = read[name]
        assert (got.histogram.width, got.histogram.maximum) == (
            wanted.histogram.width,
            wanted.histogram.maximum,
        )
        np.testing.assert_array_equal(got.histogram.counts, wanted.histogram.counts)
        for part in ("channel_max", "rows", "largest"):
            np.testing.assert_array_equal(getattr(got, part), getattr(wanted, part))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.npz"]


def test_no_file_is_no_fault(tmp_path: Path) -> None:
    assert load_observations(tmp_path / "absent.npz", ["norm"]) is None


@pytest.mark.parametrize("damage", ["cut", "changed", "nonsense", "empty"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "one.npz"
    save_observations(path, observed())
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "changed": whole[:99] + bytes([whole[99] ^ 1]) + whole[100:],
            "nonsense": b"nonsense" * 20,
            "empty": b"",
        }[damage]
    )
    with pytest.raises(DataError, match="is damaged"):
        load_observations(path, ["norm", "gelu"])


def test_a_file_of_another_graph_is_refused(tmp_path: Path) -> None:
    save_observations(tmp_path / "one.npz", observed())
    with pytest.raises(DataError, match="belongs to another graph"):
        load_observations(tmp_path / "one.npz", ["norm", "softmax"])
