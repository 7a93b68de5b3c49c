"""Runs the decoder on a GPU: KV cache, decode steps as CUDA graphs, and greedy decoding on the GPU.

A :class:`Workspace` has the buffers and the execution contexts for a batch of B rows; the addresses never change. A
decode step (run the decoder, choose the token, copy the token's embedding) is captured once as a CUDA graph, which is
then launched as a whole. There are two kinds of decoder engines:

- ``constant``: keys, values and the small tensors have two buffers each. A step reads one buffer and writes the other,
  so there are two CUDA graphs: from the first buffer to the second, and back.
- ``in-place``: keys and values have one buffer, which is input and output of the decoder. The small tensors have two
  buffers; the CUDA graph ends with a copy from the second buffer to the first, so there is one graph.

In the code, the two buffers are called halves, with the numbers 0 and 1.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Generator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import CROSS_MASK
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import BackendError, EngineError, option
from blip2edge.runtime.backends.engine_files import CONSTANT, TOKEN_LOGPROBS
from blip2edge.runtime.decoding.kv.fixed import CACHE_POSITION, FixedDecoder, FixedState
from blip2edge.runtime.decoding.sampling import StepScores, broken_logits
from blip2edge.runtime.decoding.state import ChosenStep, stacked
from blip2edge.runtime.tensorrt.cuda import Mirror
from blip2edge.runtime.tensorrt.workspace import TOKENS_IN_FLIGHT, WIDE, Engines, Workspace, is_cross

NEXT = "next_"
GREEDY = ("inputs_embeds", "position_ids", CACHE_POSITION, "seen", "held_steps")
"""Inputs of a decode step that the ``step`` engine computed in the previous step."""


class DeviceCache:
    """The KV cache of a batch on the GPU; implements :class:`blip2edge.runtime.decoding.kv.fixed.FixedCache`.

    Args:
        engines: The decoder's engine and the engine that chooses tokens.
        rows: B, the number of rows.
        context: Cross-attention keys and values, and their mask, by the inputs' names.
    """

    def __init__(self, engines: Engines, rows: int, context: Mapping[str, Array]) -> None:
        self.engines, self.cuda, self.lane = engines, engines.device.cuda, engines.lane
        self._cross = dict(context)
        self.half = 0
        with self.lane.lock:
            self._adopt(rows)
            for half in self.workspace.halves:
                self.cuda.zero(half.address, half.size, self.lane.stream)

    def run(self, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        """Runs the decoder's engine once, and updates the cache.

        Args:
            inputs: All inputs except the KV cache, by name.

        Returns:
            The logits, float32 ``[B, K, V]``, where K is the number of columns of ``logits_indices`` in ``inputs``.
        """
        lane, space = self.lane, self.workspace
        steps, asked = inputs["inputs_embeds"].shape[1], inputs["logits_indices"].shape[1]
        profile = "verify" if asked > 1 else "decode" if steps == 1 else "prefill"
        context, place = space.contexts[profile], self.half if profile == "decode" else WIDE
        with lane.lock:
            for name, values in inputs.items():
                mirror = space.mirror(name, place, values.shape)
                mirror.put(values, lane.stream)
                context.bind(name, mirror.address, values.shape)
            shape = (space.rows, asked, space.vocabulary)
            logits = space.mirror("logits", 0 if profile == "decode" else WIDE, shape)
            context.bind("logits", logits.address)
            space.bind_cache(context, self.half)
            context.enqueue()
            self.half = space.after(self.half)
            view = logits.fetch(shape, lane.stream)
            lane.synchronize()
            return np.array(view, np.float32)

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of old row ``rows[i]``; see :class:`blip2edge.runtime.decoding.kv.fixed.FixedCache`."""
        self._cross = {name: array[rows] for name, array in self._cross.items()}
        with self.lane.lock:
            old = self.workspace
            source, release = old.halves[self.half], self._release
            self._adopt(len(rows))
            self.half = 0
            for row, origin in enumerate(rows.tolist()):
                self._copy_row(row, old, source.address, origin)
            release()

    def shift(self, row: int, by: int, length: int) -> None:
        """Moves the first ``length`` slots of a row ``by`` slots to the right (to the left if negative).

        Each layer is copied to a spare buffer and back. See :class:`blip2edge.runtime.decoding.kv.fixed.FixedCache`.
        """
        space, lane = self.workspace, self.lane
        source, target = max(-by, 0) * space.slot_bytes, max(by, 0) * space.slot_bytes
        width, pitch = (length - max(-by, 0)) * space.slot_bytes, space.head_bytes
        start, heads = row * space.row_bytes, self.engines.cache.num_heads
        with lane.lock:
            for layer in range(space.layers):
                here, there = space.halves[self.half].address + start + layer * space.layer_bytes, space.spare.address
                copy = self.cuda.copy_rows
                copy(there + target, pitch, here + source, pitch, width, heads, lane.stream)
                copy(here + target, pitch, there + target, pitch, width, heads, lane.stream)

    def append(self, other: DeviceCache) -> None:
        """Adds the rows of ``other`` to the cache; see :class:`blip2edge.runtime.decoding.kv.fixed.FixedCache`."""
        self._cross = {name: stacked(name, array, other._cross[name]) for name, array in self._cross.items()}
        with self.lane.lock:
            first, second = self.workspace, other.workspace
            here, there = first.halves[self.half].address, second.halves[other.half].address
            release = self._release
            self._adopt(first.rows + second.rows)
            self.half = 0
            for row in range(first.rows):
                self._copy_row(row, first, here, row)
            for row in range(second.rows):
                self._copy_row(first.rows + row, second, there, row)
            release()
            other._release()

    def _adopt(self, rows: int) -> None:
        """Takes an idle or new workspace for ``rows`` rows, and copies the cross-attention inputs into it."""
        lengths = tuple(
            self._cross[tensor.name].shape[1 if tensor.name == CROSS_MASK else 2]
            for tensor in self.engines.decoder_record.spec.inputs
            if is_cross(tensor.name) and tensor.name in self._cross
        )
        self.workspace = space = self.engines.take(rows, lengths)
        self._release = weakref.finalize(self, self.engines.give, space)
        for name, values in self._cross.items():
            if name not in space.cross:
                dtype = NUMPY_DTYPES[space.tensors[name].dtype]
                space.cross[name] = Mirror(self.cuda, values.shape, dtype, on_device=True)
            space.cross[name].put(values, self.lane.stream)

    def _copy_row(self, row: int, old: Workspace, source: int, origin: int) -> None:
        """Copies a row of another workspace's KV cache into the current buffer of this workspace, all layers at once.

        Args:
            row: Number of the row in this workspace.
            old: The other workspace.
            source: GPU address of the other workspace's buffer.
            origin: Number of the row in the other workspace.
        """
        space = self.workspace
        self.cuda.copy_rows(
            space.halves[self.half].address + row * space.row_bytes,
            space.layer_bytes,
            source + origin * old.row_bytes,
            old.layer_bytes,
            space.row_bytes,
            space.layers,
            self.lane.stream,
        )


class DeviceState(FixedState):
    """The decoding state of a batch on a GPU; adds greedy decoding on the GPU to :class:`FixedState`."""

    cache: DeviceCache

    @property
    def gives_logprobs(self) -> bool:
        """Returns whether the step engine outputs log-probabilities; see :class:`ChoosingState`."""
        return self.cache.engines.gives_logprobs

    @property
    def draws(self) -> bool:
        """Returns False: the engine chooses likeliest tokens only; see :class:`ChoosingState`."""
        return False

    def choose(self, token_ids: NDArray[np.int64], rules: Sequence[StepScores]) -> Generator[ChosenStep, None, None]:
        """Yields the likeliest next tokens ``[B]`` and their log-probabilities ``[B]`` step by step.

        The next step is launched before the caller gets a token, so the GPU computes while the caller uses the token.
        When the caller stops, the KV cache has all tokens except the last token of each row, as after :meth:`step`.

        Args:
            token_ids: The last token of each row, ``[B]``.
            rules: How the logits of each row are changed before its token is chosen.

        Raises:
            BackendError: The cache is full, or the logits of a row contain NaN.
        """
        scores = _RowScores(rules, self.cache.workspace.vocabulary)
        while True:
            self.make_room(1)
            for tokens, logprobs in self._greedy_until_full(token_ids, scores):
                if tokens.min() < 0:
                    raise broken_logits()
                scores.add(tokens)
                token_ids = tokens
                yield tokens, logprobs

    def _greedy_until_full(self, token_ids: NDArray[np.int64], scores: _RowScores) -> Generator[ChosenStep, None, None]:
        """Yields tokens and log-probabilities until the cache is full; the token −1 means that logits contain NaN."""
        cache, lane = self.cache, self.cache.lane
        space, cuda = cache.workspace, cache.cuda
        first, launched, given = self.slot, 0, 0
        start, room = self.positions.copy(), self.decoder.capacity - self.slot
        with lane.lock:
            self._put_first(token_ids, scores)
        try:
            while given < room:
                with lane.lock:
                    while launched < min(given + 2, room):
                        self._launch(launched)
                        launched += 1
                cuda.wait(space.events[given % TOKENS_IN_FLIGHT])
                rings = (ring[given % TOKENS_IN_FLIGHT] for ring in (space.ring, space.logprobs_ring))
                tokens, logprobs = (ring.view((space.rows, 1))[:, 0].copy() for ring in rings)
                given += 1
                self.slot, self.positions = first + given, start + given
                yield tokens, logprobs
        finally:
            with lane.lock:
                lane.synchronize()

    def _put_first(self, token_ids: NDArray[np.int64], scores: _RowScores) -> None:
        """Copies the inputs of the first step to the GPU; later inputs are computed on the GPU."""
        cache = self.cache
        values = self.inputs(self.decoder.embed(token_ids[:, None]), self.positions[:, None] + 1, 1)
        values[CACHE_POSITION] = self.decoder.cache_position(self.slot, self.batch_size)
        self._shapes = {name: array.shape for name, array in values.items()}
        for name, array in {**values, **scores.arrays()}.items():
            halves = (cache.half,) if name in GREEDY else range(len(cache.workspace.halves))
            for half in halves:
                cache.workspace.mirror(name, half, array.shape).put(array, cache.lane.stream)
        self._rules = {name: array.shape for name, array in scores.arrays().items()}

    def _launch(self, number: int) -> None:
        """Launches decode step ``number``, and starts the copy of its tokens and log-probabilities to the host."""
        cache, lane, cuda = self.cache, self.cache.lane, self.cache.cuda
        space, half = cache.workspace, cache.half
        if half in space.graphs:
            cuda.launch(space.graphs[half], lane.stream)
        elif half in space.warm and space.can_be_captured:  # TensorRT must run once in these shapes before a capture
            space.graphs[half] = cuda.capture(lane.stream, partial(self._enqueue, half))
            cuda.launch(space.graphs[half], lane.stream)
        else:
            self._enqueue(half)
            space.warm.add(half)
        for rings, written in ((space.ring, space.tokens), (space.logprobs_ring, space.logprobs)):
            ring = rings[number % TOKENS_IN_FLIGHT]
            cuda.copy(ring.address, written[1 - half].address, ring.dtype.itemsize * space.rows, lane.stream)
            ring.fetch((space.rows, 1), lane.stream)
        cuda.record(space.events[number % TOKENS_IN_FLIGHT], lane.stream)
        cache.half = space.after(half)

    def _enqueue(self, half: int) -> None:
        space = self.cache.workspace
        context, choice = space.contexts["decode"], space.choice
        for name, shape in self._shapes.items():
            context.bind(name, space.mirror(name, half, shape).address, shape)
        shape = (space.rows, 1, space.vocabulary)
        logits = space.mirror("logits", 0, shape)
        context.bind("logits", logits.address)
        space.bind_cache(context, half)
        context.enqueue()
        choice.bind("logits", logits.address, shape)
        shapes = {**self._shapes, **self._rules}
        for name in dict.fromkeys((*GREEDY[1:], *self._rules)):
            choice.bind(name, space.mirror(name, half, shapes[name]).address, shapes[name])
        for name in GREEDY[1:]:
            choice.bind(f"{NEXT}{name}", space.mirror(name, 1 - half, shapes[name]).address)
        choice.bind("inputs_embeds", space.mirror("inputs_embeds", 1 - half, shapes["inputs_embeds"]).address)
        choice.bind("token_ids", space.tokens[1 - half].address)
        choice.bind(TOKEN_LOGPROBS, space.logprobs[1 - half].address)
        choice.enqueue()
        if space.after(half) == half:
            for name in GREEDY:
                target, source = (space.mirror(name, place, shapes[name]) for place in (half, 1 - half))
                size = source.dtype.itemsize * math.prod(shapes[name])
                self.cache.cuda.copy(target.address, source.address, size, self.cache.lane.stream)


class _RowScores:
    """Computes the ``step`` engine's inputs that say how to change the logits: penalties and tokens not to choose.

    Args:
        rules: How the logits of each of the B rows are changed.
        vocabulary: V, the number of logits.
    """

    def __init__(self, rules: Sequence[StepScores], vocabulary: int) -> None:
        self._penalised = any(rule.penalty != 1 for rule in rules)
        self._seen = _marked([rule.seen for rule in rules], vocabulary)
        self._held = _marked([rule.held if rule.held_steps > 0 else rule.held[:0] for rule in rules], vocabulary)
        self._penalty = np.array([[rule.penalty] for rule in rules], np.float32)
        self._held_steps = np.array([[rule.held_steps] for rule in rules], np.int64)

    def add(self, tokens: NDArray[np.int64]) -> None:
        """Updates the inputs after a step in which the tokens ``[B]`` were chosen."""
        self._held_steps -= 1
        if self._penalised:
            np.put_along_axis(self._seen, tokens[:, None], 1, axis=1)

    def arrays(self) -> dict[str, Array]:
        """Returns the ``step`` engine's inputs by name.

        ``seen`` (tokens with the repetition penalty) and ``held`` (tokens not to choose) are float32 ``[B, V]``;
        ``penalty`` and ``held_steps`` (for how many steps ``held`` applies) are ``[B, 1]``.
        """
        return {"seen": self._seen, "penalty": self._penalty, "held": self._held, "held_steps": self._held_steps}


def _marked(ids: Sequence[NDArray[np.int64]], vocabulary: int) -> NDArray[np.float32]:
    """Returns an array ``[B, V]`` that is 1 at the token ids in the list of each row, else 0."""
    marks = np.zeros((len(ids), vocabulary), np.float32)
    for row, chosen in zip(marks, ids, strict=True):
        row[chosen] = 1
    return marks


class DeviceDecoder(FixedDecoder):
    """The decoder of a bundle's engines.

    Args:
        engines: The decoder's engine and the engine that chooses tokens.
        table: The token embedding table, for prompts and for decoding that is not greedy.
    """

    state_class = DeviceState

    def __init__(self, engines: Engines, table: TokenTable) -> None:
        spec = engines.decoder_record.spec
        if not engines.capacity:
            raise BackendError(
                "the decoder's engine has a growing KV cache, which this runtime does not support",
                f"build the engines again without {option('decoder')} concatenated",
            )
        super().__init__(
            lambda rows, context: DeviceCache(engines, rows, context),
            spec,
            engines.capacity,
            spec.axes()["batch"].max,
            table,
        )
        self.engines = engines
        if engines.in_place:
            engine, cache = engines.decoder, engines.cache
            for past, present in zip(cache.past_names(), cache.present_names(), strict=True):
                if engine.get_aliased_input_tensor(present) != past:
                    raise EngineError(
                        f"expected the decoder's engine to update {past} in place, got a separate {present}",
                        f"build the engines again with {option('decoder')} {CONSTANT}",
                    )
