"""Decoders in kernels, made for the tests of this folder; what they need is imported when a test asks for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.runtime.cuda.pairs import Pair


@pytest.fixture(scope="session")
def bundle_of(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The bundle of a kind in a precision; see :func:`tests.runtime.cuda.pairs.bundles`."""
    from tests.runtime.cuda.pairs import bundles

    return bundles(tiny_bundle, tmp_path_factory.mktemp("decoders"))


@pytest.fixture
def pair_of(bundle_of: Callable[[str, str], Path]) -> Iterator[Callable[..., Pair]]:
    """Opens a decoder in kernels and as the portable graph; afterwards nothing is left on the device."""
    from tests.runtime.cuda.pairs import Pair

    made: list[Pair] = []

    def make(kind: str, precision: str, rows: Sequence[int], **given: Any) -> Pair:
        made.append(Pair(bundle_of(kind, precision), rows, **given))
        return made[-1]

    yield make
    for pair in made:
        pair.session.close()
        assert not pair.driver.memory
        assert not pair.driver.live
