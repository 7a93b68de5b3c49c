"""The backend ``cuda-decoder``: the decoder runs as this project's CUDA kernels, the other graphs in ONNX Runtime.

Not run on a GPU yet: the tests run it with a simulated driver, whose kernels run on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import BackendError, BundleError, option
from blip2edge.runtime.backends import probe
from blip2edge.runtime.backends.base import closed_graph
from blip2edge.runtime.cuda.copy_files import find_cubin, read_layout
from blip2edge.runtime.cuda.decoding.decoder import KernelDecoder
from blip2edge.runtime.cuda.decoding.session import KernelSession
from blip2edge.runtime.cuda.device.driver import DriverDevice, load_driver
from blip2edge.runtime.cuda.token_table import TableOnDevice, load_table
from blip2edge.runtime.cuda.weights import load_weights


def open_decoder(bundle: Bundle, directory: Path) -> CudaDecoderSession:
    """Loads a bundle's decoder onto the GPU.

    Args:
        bundle: An opened bundle.
        directory: Directory of the bundle's copy for this backend; its files are checked already.

    Raises:
        BackendError: There is no driver, no GPU, no cuda-bindings, or the copy has no kernels for this GPU.
        BundleError: The copy's layout cannot be read, or the bundle describes no KV cache.
    """
    if bundle.manifest.cache is None:
        raise BundleError(f"{bundle.path} describes no KV cache in its bundle.json", "export the checkpoint again")
    layout = read_layout(bundle, directory)
    api = load_driver()
    driver = probe.nvidia_driver()
    if not driver.version:
        raise BackendError(
            f"there is no working NVIDIA driver here ({driver.problem})",
            f"use {option('backend')} cpu, or a machine with an NVIDIA GPU; see `blip2edge doctor`",
        )
    device = DriverDevice(api)
    try:
        device.load(find_cubin(directory, device.capability).read_bytes())
        session = KernelSession(load_weights(layout, bundle.path, device), device)
        table = load_table(bundle.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, device)
    except BaseException:
        with suppress(BackendError):  # the first error says what is wrong
            device.close()
        raise
    return CudaDecoderSession(bundle, session, table)


def fault_of_copy(bundle: Bundle, directory: Path) -> str:
    """Says why the copy in this directory cannot be used; empty if it can."""
    try:
        read_layout(bundle, directory)
    except BundleError as error:
        return error.problem
    return ""


class CudaDecoderSession:
    """A decoder whose kernels and weights are on the GPU; :meth:`decoder` adds the KV cache.

    Args:
        bundle: The bundle.
        kernels: The decoder's kernels and weights.
        stored: The token embedding table on the GPU.
    """

    def __init__(self, bundle: Bundle, kernels: KernelSession, stored: TableOnDevice) -> None:
        self._bundle, self._kernels, self._stored = bundle, kernels, stored
        self._spec = bundle.graph(DECODER).spec
        self.input_names = tuple(tensor.name for tensor in self._spec.inputs)
        self.output_names = tuple(tensor.name for tensor in self._spec.outputs)
        self.closed = False

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:  # noqa: ARG002
        """Always raises an error: keys and values stay on the GPU, so :meth:`decoder` runs the kernels.

        Raises:
            BackendError: Always.
        """
        raise BackendError(
            "the backend cuda-decoder runs decode steps only, and cannot run the decoder's graph",
            f"use {option('backend')} cuda for the graph",
        )

    def decoder(self, table: TokenTable) -> KernelDecoder:
        """Makes the decoder; ``table`` is the bundle's token embedding table on the host."""
        manifest = self._bundle.manifest
        if self.closed or manifest.cache is None:
            raise closed_graph()
        return KernelDecoder(self._kernels, self._spec, manifest.cache, table, manifest.max_positions, self._stored)

    def close(self) -> None:
        """Frees the decoder's memory on the GPU; see :class:`blip2edge.runtime.backends.base.Session`."""
        self.closed = True
        self._kernels.close()
