"""Caches on a simulated GPU: decoding in a full cache, and tensors in the GPU's own memory on a board."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnx_ir", reason="engines are made of graphs with onnx_ir")
pytest.importorskip("onnxruntime", reason="the stand-in computes in ONNX Runtime")

from blip2edge import Captioner
from blip2edge.bundle.bundle import Bundle
from blip2edge.errors import BackendError
from blip2edge.runtime.backends.engine_files import CONSTANT, IN_PLACE, KIND
from blip2edge.runtime.decoding.sampling import StepScores, penalize_repetition
from blip2edge.runtime.tensorrt.backend import EngineOpener
from blip2edge.runtime.tensorrt.cuda import Mirror
from blip2edge.runtime.tensorrt.kv_cache import DeviceCache, DeviceState
from blip2edge.runtime.tensorrt.session import TrtSession
from blip2edge.runtime.tensorrt.workspace import WIDE
from tests.drawing import draw_pictures
from tests.engine.conftest import BundleOf
from tests.engine.fake_engines import plug_in, write_engines
from tests.engine.fake_gpu import INVALID

CAPACITY = 32


@pytest.mark.parametrize("form", [CONSTANT, IN_PLACE])
def test_rules_go_on_where_rows_were_moved_in_a_full_cache(
    form: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows move over unused slots when the cache is full; penalties and held tokens know the tokens from before."""
    plug_in(monkeypatch)
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    write_engines(path, path / KIND, capacity=CAPACITY, decoder=form)
    on_cpu, on_gpu = (Captioner.load(path, backend=name, threads=1) for name in ("cpu", "tensorrt"))
    host, device = (captioner.generator.language.decoder for captioner in (on_cpu, on_gpu))
    random = np.random.default_rng(5)
    prompts = [random.normal(0, 0.7, (length, device.table.width)).astype(np.float32) for length in (20, 4)]
    rule = StepScores(np.array([7, 9]), 1.7, np.arange(0, 90, 2), 15)

    def choose(logits: Any, tokens: list[int]) -> int:
        scores = logits.copy()
        penalize_repetition(scores, np.unique([*rule.seen, *tokens]), rule.penalty)
        if len(tokens) < rule.held_steps:
            scores[rule.held] = -np.inf
        return int(scores.argmax())

    logits, expected_state = host.prefill(prompts[1:])
    wanted: list[int] = []
    for _ in range(24):
        wanted.append(choose(logits[0], wanted))
        logits = expected_state.step(np.array(wanted[-1:]))
    logits, state = device.prefill(prompts)
    assert isinstance(state, DeviceState)
    state.select(np.array([1]))
    first = choose(logits[1], [])
    seen = np.unique([*rule.seen, first])
    greedy = state.choose(np.array([first]), [StepScores(seen, rule.penalty, rule.held, rule.held_steps - 1)])
    got = [first, *(int(tokens[0]) for tokens, _ in islice(greedy, 23))]
    greedy.close()
    assert state.slot < 20 + len(got)  # the row was moved
    assert got == wanted
    on_gpu.close()


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_a_board_reads_large_tensors_from_the_gpus_own_memory(
    name: str, bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, marks of tokens, and keys and values of cross-attention; on a Jetson, pinned memory is not cached."""
    cuda, _ = plug_in(monkeypatch, integrated=True)
    path = Path(shutil.copytree(bundle_of(name), tmp_path / "bundle"))
    write_engines(path, path / KIND)
    with Captioner.load(path, backend="tensorrt", threads=1) as captioner:
        captioner.caption(draw_pictures(1)[0], max_new_tokens=6, eos_token_ids=())
        decoder: Any = captioner.generator.language.decoder
        (space,) = decoder.engines.idle

        def shared(mirror: Mirror) -> bool:
            return bool(mirror.address == mirror.view((1,)).ctypes.data)

        where: dict[str, set[bool]] = {}
        for (tensor, _), mirror in space.mirrors.items():
            where.setdefault(tensor, set()).add(shared(mirror))
        own = {tensor for tensor, kinds in where.items() if kinds == {False}}
        assert own == {"logits", "seen", "held"}
        assert where["position_ids"] == {True}
        assert bool(space.cross) == (name == "blip2-t5")
        assert not any(shared(mirror) for mirror in space.cross.values())
        del space, decoder
    gc.collect()
    assert cuda.memory == {}


@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 11}, {"repetition_penalty": 1.3, "min_new_tokens": 11}])
def test_logits_are_read_by_the_host_for_the_prompt_alone(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Minimum lengths and penalties do not need the host in any step."""
    plug_in(monkeypatch)
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    write_engines(path, path / KIND)
    runs: list[int] = []
    original = DeviceCache.run

    def watched(self: DeviceCache, inputs: Any) -> Any:
        runs.append(inputs["inputs_embeds"].shape[1])
        return original(self, inputs)

    monkeypatch.setattr(DeviceCache, "run", watched)
    with Captioner.load(path, backend="tensorrt", threads=1) as captioner:
        result = captioner.caption(draw_pictures(1)[0], max_new_tokens=12, **options)
    assert result.new_tokens >= options.get("min_new_tokens", 1)
    assert len(runs) == 1


def test_a_buffer_that_could_not_be_enlarged_is_made_again(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out when a larger buffer replaces a smaller one: the smaller one is freed, and not used any more."""
    cuda, _ = plug_in(monkeypatch)
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    write_engines(path, path / KIND)
    with Captioner.load(path, backend="tensorrt", threads=1) as captioner:
        wanted = captioner.caption(draw_pictures(1)[0], max_new_tokens=6, eos_token_ids=()).tokens
        decoder: Any = captioner.generator.language.decoder
        (space,) = decoder.engines.idle
        session = EngineOpener(Bundle.open(path), "tensorrt")("bridge")
        assert isinstance(session, TrtSession)
        tensor = session._spec.inputs[0]
        small = (1,)
        enlarging: tuple[Callable[[tuple[int, ...]], Mirror], ...] = (
            partial(space.mirror, "logits", WIDE),
            partial(session._mirror, tensor),
        )
        for mirror in enlarging:
            mirror(small)
            with monkeypatch.context() as short:
                short.setattr(cuda, "cudaHostAlloc", no_memory)
                with pytest.raises(BackendError, match="no_memory failed"):
                    mirror((1000, 1000))
            assert cuda.holds(mirror(small).address, 1)
        session.close()
        assert captioner.caption(draw_pictures(1)[0], max_new_tokens=6, eos_token_ids=()).tokens == wanted


def no_memory(*_: Any) -> tuple[int]:
    return (INVALID,)
