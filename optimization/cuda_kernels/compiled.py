"""Makes the copy for the backend ``cuda-decoder``: the decoder's layout, and its kernels for every kind of GPU.

NVRTC compiles the kernels, which needs no GPU. What is checked: the graph has the structure that the kernels compute,
and every kernel fits the registers and the shared memory of each GPU. The kernels are run only if this machine has a
GPU, to time them (``timing.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from blip2edge.bundle.safetensors_file import SafetensorsFile
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.errors import BackendError
from blip2edge.optimization.checks import CopyTask
from blip2edge.optimization.cuda_kernels.of_bundle import layout_of_bundle
from blip2edge.optimization.cuda_kernels.timing import timed_tokens
from blip2edge.runtime.backends.optimized_copy import OptimizedGraph, timing_conditions
from blip2edge.runtime.cuda.compilation.compiler import compile_kernels, supported_targets
from blip2edge.runtime.cuda.compilation.cubin import kernel_usage
from blip2edge.runtime.cuda.copy_files import LAYOUT, cubin_name, write_layout
from blip2edge.runtime.cuda.kernel import THREADS, Kernel
from blip2edge.runtime.cuda.layout import DecoderLayout
from blip2edge.runtime.cuda.plan import needed_kernels
from blip2edge.runtime.cuda.steps import MOST_SHARED
from blip2edge.runtime.cuda.token_table import table_format
from blip2edge.runtime.cuda.weights import planned_weights

KERNELS, ROUNDED = "CUDA kernels", "weights in FP16 in place of FP32"
"""Names of passes in the record of the copy; the second is listed if weights in fp32 were rounded to fp16."""

DIFFERENT = "tokens differ from those of the CUDA provider"
"""Listed as a pass if a GPU ran the kernels and ONNX Runtime's CUDA provider, and they chose different tokens."""

REGISTERS = 65536
"""Number of registers that a thread block can use, equal on every GPU that kernels are compiled for."""


def compiled_decoder(task: CopyTask, name: str) -> tuple[OptimizedGraph, dict[str, FileRecord]] | str:
    """Writes the layout of a decoder and its compiled kernels.

    Args:
        task: The bundle, and the directories of the copies.
        name: The graph's name.

    Returns:
        The copy's record and files. For a graph other than the decoder: a text that says why it has no copy.

    Raises:
        BundleError: There are no kernels for this decoder.
        BackendError: NVRTC is not installed, or does not compile the kernels.
    """
    if name != DECODER:
        return "ONNX Runtime runs it: make its copy with --backend cuda"
    bundle = task.bundle
    layout = layout_of_bundle(bundle)
    table = table_format(SafetensorsFile(bundle.file(EMBEDDINGS_FILE)), EMBEDDINGS_TENSOR)
    kernels = [*needed_kernels(planned_weights(layout)), *table.kernels]
    targets = supported_targets()
    names = write_layout(layout, task.target)
    for done, capability in enumerate(targets):
        task.report(f"compile {name}", done, len(targets))
        cubin = compile_kernels(kernels, capability)
        check_usage(cubin, kernels, capability)
        (task.target / cubin_name(capability)).write_bytes(cubin)
        names.append(cubin_name(capability))
    passes: tuple[str, ...] = (KERNELS, ROUNDED) if is_rounded(layout) else (KERNELS,)
    times = timed_tokens(bundle, task.target)
    if times == "different":
        passes, times = (*passes, DIFFERENT), None
    timed_with = timing_conditions(bundle) if times is not None else {}
    copy = OptimizedGraph(LAYOUT, passes, False, False, (), None, times, timed_with)
    return copy, {name: FileRecord.of(task.target / name) for name in names}


def is_rounded(layout: DecoderLayout) -> bool:
    """Returns whether a matrix of the decoder is in fp32, so that the kernels round it to fp16."""
    return any(matrix.weight.dtype == "float32" for matrix, _, _ in layout.matrices())


def check_usage(cubin: bytes, kernels: Sequence[Kernel], capability: int) -> None:
    """Checks that a cubin has every kernel, and that a thread block has enough registers and shared memory for each.

    Raises:
        BackendError: A kernel is missing, or needs more than a GPU has.
    """
    found = kernel_usage(cubin)
    for kernel in kernels:
        used = found.get(kernel.name)
        if used is None or used.registers * THREADS > REGISTERS or kernel.shared + used.shared > MOST_SHARED:
            raise BackendError(
                f"expected the kernel {kernel.name} to fit a GPU sm_{capability}, found {used or 'no such kernel'}",
                "install another version of nvidia-cuda-nvrtc",
            )
