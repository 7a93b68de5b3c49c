"""The cpu backend: ONNX Runtime."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BackendError, BundleError
from blip2edge.runtime.backends.base import Settled

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
PRESENT = np.uint64(63)  # bit of an entry; linux: Documentation/admin-guide/mm/pagemap.rst
ENTRY = 8  # bytes a page
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux: include/uapi/asm-generic/mman-common.h
FILLED = 0.75
"""The share of a huge page that has to be in use before it is made one: it takes all of its memory then."""


def huge_page_bytes() -> int:
    """Bytes of the huge pages that the kernel gives to a process that asks for them; 0 where it gives none."""
    if sys.platform != "linux":
        return 0
    try:
        allowed = "[never]" not in (SETTINGS / "enabled").read_text(encoding="ascii")
        return int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii")) if allowed else 0
    except OSError:  # a kernel without them
        return 0


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Gathers what is filled within, and is still there at the end, into huge pages; elsewhere it does nothing.

    The memory stays the process's own and goes back as it would have: only the size of its pages changes.
    """
    size = huge_page_bytes()
    if not size:
        yield
        return
    before = filled_pages(size)
    yield
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in sorted(filled_pages(size) - before):
        # Advice, a page at a time: one that the kernel cannot gather stays as it is, and the next is tried.
        madvise(page, size, MADV_HUGEPAGE)
        madvise(page, size, MADV_COLLAPSE)


def filled_pages(size: int) -> set[int]:
    """The addresses of huge pages' places, in this process's memory behind which there is no file, that are in use."""
    found: set[int] = set()
    small = size // mmap.PAGESIZE
    try:
        with PAGEMAP.open("rb", buffering=0) as pagemap:
            for start, end in anonymous_regions():
                first, last = -(-start // size) * size, end // size * size
                if first >= last:
                    continue
                pagemap.seek(first // mmap.PAGESIZE * ENTRY)
                entries = np.frombuffer(pagemap.read((last - first) // mmap.PAGESIZE * ENTRY), np.uint64)
                whole = entries[: len(entries) // small * small].reshape(-1, small)
                share = (whole >> PRESENT).mean(axis=1)
                found.update((first + np.flatnonzero(share >= FILLED) * size).tolist())
    except OSError:  # the system does not tell
        return set()
    return found


def anonymous_regions() -> list[tuple[int, int]]:
    """This process's private writable memory behind which there is no file: the first address, and that behind it."""
    regions = []
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            first, _, end = span.partition("-")
            regions.append((int(first, 16), int(end, 16)))
    return regions


WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option for a graph that is handed over as bytes: a copy's graphs may so use the bundle's weights."""

PROVIDERS = ["CPUExecutionProvider"]
SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasSkipLayerNormFusion"]
"""What ONNX Runtime would do, and a copy's recipe has decided."""


class OnnxRuntimeSession:
    """A graph in ONNX Runtime on the CPU; it follows :class:`blip2edge.runtime.backends.base.Session`.

    Args:
        path: The ``.onnx`` file; its weights may lie beside it.
        threads: Threads within an operator; None leaves the choice to ONNX Runtime.
        lean: Run the graph as it is written, with as little memory as that takes: no folded constants, no
            repacked weights, no arena. Slow; for checking a graph that is larger than the memory.
        settled: Of a graph that was optimised for ONNX Runtime when it was written.

    Raises:
        BackendError: onnxruntime is not installed.
        BundleError: The file is no graph that it can run.
    """

    def __init__(
        self, path: Path, threads: int | None = None, *, lean: bool = False, settled: Settled | None = None
    ) -> None:
        onnxruntime = _package()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: a warning is no news for who captions
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        # An idle pool that spins takes the cores from the session that runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if lean or (settled is not None and not settled.layout):
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        if settled is not None:
            options.add_session_config_entry(WEIGHTS_FOLDER, str(settled.weights))
        try:
            graph = str(path) if settled is None else path.read_bytes()
            with nullcontext() if lean else on_huge_pages():
                self._session = onnxruntime.InferenceSession(
                    graph, options, providers=PROVIDERS, disabled_optimizers=SLOW_FUSIONS if settled else None
                )
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            reason = str(error).strip().splitlines()[0]
            raise BundleError(
                f"ONNX Runtime cannot load {path} ({reason})", "export the checkpoint again"
            ) from error
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """See :class:`blip2edge.runtime.backends.base.Session`."""
        names = self.output_names if outputs is None else outputs
        try:
            values = self._session.run(list(names), dict(inputs))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            reason = str(error).strip().splitlines()[0]
            raise BackendError(
                f"ONNX Runtime cannot run the graph ({reason})", "try fewer pictures at once, or fewer beams"
            ) from error
        return dict(zip(names, values, strict=True))

    def close(self) -> None:
        """See :class:`blip2edge.runtime.backends.base.Session`."""
        del self._session

    def in_place(self, pairs: Mapping[str, str]) -> InPlace:
        """Runs in which some outputs are written over inputs.

        Args:
            pairs: The input that each of these outputs is written to.
        """
        return InPlace(self._session, pairs)


class InPlace:
    """Runs of a graph over buffers that are read and written where they lie.

    Args:
        session: ONNX Runtime's own.
        pairs: The input that each of these outputs is written to.
    """

    def __init__(self, session: Any, pairs: Mapping[str, str]) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._pairs = dict(pairs)
        self._value = _package().OrtValue.ortvalue_from_numpy

    def hold(self, buffers: Mapping[str, Array]) -> None:
        """Takes buffers, contiguous arrays by the input's name; they are neither copied nor let go before the next."""
        held = {name: self._value(array) for name, array in buffers.items()}
        for name, value in held.items():
            self._binding.bind_ortvalue_input(name, value)
        for output, name in self._pairs.items():
            self._binding.bind_ortvalue_output(output, held[name])

    def run(self, inputs: Mapping[str, Array], output: str, shape: Sequence[int]) -> Array:
        """Runs once.

        Args:
            inputs: The other inputs by name.
            output: An output beside the buffers, float32.
            shape: Its shape.

        Returns:
            That output.
        """
        result = np.empty(tuple(shape), np.float32)
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, self._value(np.ascontiguousarray(array)))
        self._binding.bind_ortvalue_output(output, self._value(result))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            reason = str(error).strip().splitlines()[0]
            raise BackendError(f"ONNX Runtime cannot run the optimised decoder ({reason})") from error
        return result


def open_graph(path: Path, threads: int | None = None, settled: Settled | None = None) -> OnnxRuntimeSession:
    """Loads a graph; arguments as :class:`OnnxRuntimeSession`."""
    return OnnxRuntimeSession(path, threads, settled=settled)


def _package() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "the cpu backend needs onnxruntime, which is not installed",
            'install it: pip install "blip2edge[cpu]"',
        ) from error
    return onnxruntime
