"""The token embedding table on the GPU, from which the kernel that chooses a token copies the token's embedding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.safetensors_file import SafetensorsFile
from blip2edge.bundle.token_table import COLUMNS, ROWS, SCALE
from blip2edge.errors import BundleError, option
from blip2edge.runtime.cuda.device.interface import KernelDevice
from blip2edge.runtime.cuda.kernel import Kernel
from blip2edge.runtime.cuda.steps import choose_kernel, sample_kernel, score_kernel

FORMS = {ROWS: "ROWS_OF_INTEGERS", COLUMNS: "COLUMNS_OF_INTEGERS"}
FLOATS = {"F32": ("float", 32), "F16": ("__half", 16)}


@dataclass(frozen=True)
class TableFormat:
    """Format of a token embedding table.

    Attributes:
        form: One of :data:`blip2edge.runtime.cuda.steps.TABLES`.
        bits: Bits of a value.
        value: C++ type of the floats or scales.
        block: Number of neighbouring values of an embedding that share a scale; 0 for floats.
    """

    form: str
    bits: int
    value: str
    block: int = 0

    @property
    def kernel(self) -> Kernel:
        """Returns the kernel that chooses a token and copies its embedding from a table of this format."""
        return choose_kernel(self.form, self.bits, self.value)

    @property
    def drawing_kernel(self) -> Kernel:
        """Returns the kernel that draws a token at random and copies its embedding from a table of this format."""
        return sample_kernel(self.form, self.bits, self.value)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Returns all kernels that choose tokens."""
        return self.kernel, score_kernel(), self.drawing_kernel


@dataclass(frozen=True)
class TableOnDevice:
    """A token embedding table on the GPU, as the bundle stores it.

    Attributes:
        format: The format.
        address: Address of the values.
        scales: Address of the scales; 0 for floats.
    """

    format: TableFormat
    address: int
    scales: int = 0


def table_format(file: SafetensorsFile, tensor: str) -> TableFormat:
    """Returns the format of a token embedding table.

    Args:
        file: The table's file.
        tensor: The tensor's name.

    Raises:
        BundleError: The table is in bf16.
    """
    if "bits" in file.metadata:
        value = "__half" if file.stored(tensor + SCALE).dtype == "F16" else "float"
        bits, block = int(file.metadata["bits"]), int(file.metadata["block"])
        return TableFormat(FORMS[file.metadata["layout"]], bits, value, block)
    dtype = file.stored(tensor).dtype
    if dtype not in FLOATS:
        raise BundleError(
            f"expected a token table in fp32, fp16 or integers, got {dtype}", f"export with {option('precision')} fp16"
        )
    value, bits = FLOATS[dtype]
    return TableFormat("FLOATS", bits, value)


def load_table(path: Path, tensor: str, device: KernelDevice) -> TableOnDevice:
    """Copies a token embedding table to the GPU.

    Args:
        path: The safetensors file; :class:`blip2edge.bundle.token_table.TokenTable` has checked it.
        tensor: The tensor's name.
        device: The GPU.

    Raises:
        BundleError: The table is in bf16.
    """
    file = SafetensorsFile(path)
    found = table_format(file, tensor)

    def put(values: Array) -> int:
        address = device.allocate(values.nbytes)
        device.write(address, values)
        return address

    scales = put(file.array(tensor + SCALE)) if found.block else 0
    return TableOnDevice(found, put(file.array(tensor)), scales)
