"""The GPU's memory runs out once, at each kind of allocation: no freed memory is used, and later texts are right."""

from __future__ import annotations

import ctypes
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="the portable graph runs in ONNX Runtime")

from blip2edge.errors import BackendError
from blip2edge.runtime.cuda.decoding.decoder import KernelDecoder
from blip2edge.runtime.cuda.decoding.session import KernelSession
from blip2edge.runtime.cuda.kernel import Launch
from blip2edge.runtime.cuda.layout import DecoderLayout
from blip2edge.runtime.decoding.kv import in_place
from blip2edge.runtime.decoding.options import GenerationOptions
from tests.runtime.cuda.pairs import Array, Pair
from tests.runtime.cuda.shim_device import ShimDevice
from tests.runtime.decoding.generating import generate

SLOTS = 8
"""Slots that the buffers are first made for; longer texts need larger ones."""

DRAWN = GenerationOptions(max_new_tokens=3, temperature=0.9, top_k=8, seed=4)
GREEDY = GenerationOptions(max_new_tokens=6)
BEAMS = GenerationOptions(max_new_tokens=3, num_beams=2)
TEXTS = (((4, 3), DRAWN), ((4, 3), GREEDY), ((3, 6), BEAMS))
"""Lengths of the prompts, and how texts are generated."""

CALLS = 6
"""Number of nested calls that tell the kinds of allocations apart."""


class Guarded:
    """Watches the device of a pair: an allocation that fails, and the use of memory that is not allocated."""

    def __init__(self, shim: ShimDevice, patch: pytest.MonkeyPatch) -> None:
        self._shim, self.fails_at, self.asked = shim, 0, 0
        self.places: dict[tuple[str, ...], int] = {}  # the last allocation of each kind
        for name in ("allocate", "free", "write", "run"):
            patch.setattr(shim, name, getattr(self, name))

    def allocate(self, size: int) -> int:
        self.asked += 1
        calls = [frame.name for frame in traceback.extract_stack(limit=CALLS + 1)[:-1]]
        self.places[tuple(calls)] = self.asked
        if self.asked == self.fails_at:
            raise BackendError("cuMemAlloc failed: out of memory", "lower the batch size")
        return ShimDevice.allocate(self._shim, size)

    def free(self, address: int) -> None:
        assert address in self._shim.memory, "freed twice"
        ShimDevice.free(self._shim, address)

    def write(self, address: int, values: Array) -> None:
        self.check(address)
        ShimDevice.write(self._shim, address, values)

    def run(self, launch: Launch) -> None:
        for address in pointers(launch.arguments):
            self.check(address)
        ShimDevice.run(self._shim, launch)

    def check(self, address: int) -> None:
        if address in self._shim.memory:
            return
        inside = (start <= address < start + max(size, 1) for start, (_, size) in self._shim.memory.items())
        assert any(inside), "the memory was freed, or never allocated"


def pointers(arguments: Any) -> Iterator[int]:
    """The addresses in a structure of arguments, without null."""
    if isinstance(arguments, ctypes.Array):
        for one in arguments:
            yield from pointers(one)
        return
    for name, kind, *_ in arguments._fields_:
        value = getattr(arguments, name)
        if kind is ctypes.c_void_p:
            if value:
                yield value
        elif isinstance(value, ctypes.Structure | ctypes.Array):
            yield from pointers(value)


def decoder_of(pair: Pair) -> KernelDecoder:
    """A decoder without buffers, on the weights of the pair."""
    made, session = copy(pair.kernels), KernelSession(pair.session.weights, pair.device)
    made.kernels = made.session = session
    made.new_buffers = lambda: session.in_place({})
    made._free = deque()
    return made


def text_of(decoder: KernelDecoder, pair: Pair, number: int) -> list[tuple[int, ...]]:
    lengths, options = TEXTS[number]
    logits, state = decoder.prefill(pair.prompts(lengths, number))
    texts = generate(logits, state, [[5]] * len(lengths), options)
    return [tuple(one.tokens) for one in texts]


def test_any_allocation_may_fail(pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that fails is generated again, as after a smaller batch: then its tokens are right."""
    monkeypatch.setattr(in_place, "ROOM", 2)
    monkeypatch.setattr(DecoderLayout, "max_positions", SLOTS)
    pair = pair_of("opt", "fp32", (1, 2, 3, 5))
    guarded = Guarded(pair.shim, monkeypatch)
    weights, first = set(pair.shim.memory), decoder_of(pair)
    wanted = [text_of(first, pair, number) for number in range(len(TEXTS))]
    assert first.kernels.moves
    places = dict(guarded.places)
    failed: set[str] = set()
    for calls, at in places.items():
        for address in set(pair.shim.memory) - weights:
            pair.shim.free(address)
        decoder = decoder_of(pair)
        guarded.asked, guarded.fails_at = 0, at
        for number, texts in enumerate(wanted):
            try:
                found, fails = text_of(decoder, pair, number), False
            except BackendError:
                failed.update(calls)
                found, fails = text_of(decoder, pair, number), True
            assert found == texts, (calls, number)
            if fails:
                break
    assert failed >= {"move", "enlarge", "_prepared", "_write_draws", "_new_buffers", "__init__"}
