"""The flags of `build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.flags import add_command, positive_int

if TYPE_CHECKING:
    from blip2edge.cli.flags import Commands


def add_build(commands: Commands) -> None:
    """The command that makes TensorRT engines."""
    parser = add_command(commands, "build", "TensorRT engines of a bundle", "build", "build")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument(
        "--target",
        choices=("tensorrt", "rtx"),
        default="tensorrt",
        help="tensorrt, on the machine that runs them, or rtx, anywhere (tensorrt)",
    )
    parser.add_argument(
        "--sm",
        metavar="CC",
        type=positive_int,
        action="append",
        default=[],
        help="a compute capability, as 86 for 8.6, to build for without that GPU; rtx only, may be repeated",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        help="write a bundle of engines alone, which a board loads without any ONNX file",
    )
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists")
    sizes = parser.add_argument_group("sizes", "what engines are bound to; less takes less memory")
    sizes.add_argument(
        "--workspace", metavar="MiB", type=positive_int, help="bound on the builder's scratch memory"
    )
    sizes.add_argument(
        "--capacity",
        metavar="N",
        type=positive_int,
        help="tokens that prompt and answer have together (256 beyond the picture's, or the model's context)",
    )
    sizes.add_argument(
        "--max-batch", metavar="N", type=positive_int, help="rows, pictures times beams, decoded at once (8)"
    )
    kinds = parser.add_argument_group("kinds of engines")
    kinds.add_argument(
        "--decoder",
        choices=("constant", "concatenated"),
        default="constant",
        help="a cache of constant size, which the TensorRT runtime runs, or one that grows (constant)",
    )
    kinds.add_argument(
        "--timing-cache", metavar="FILE", type=Path, help="timings of kernels, kept from build to build"
    )
    kinds.add_argument(
        "--version-compatible", action="store_true", help="run on newer TensorRT of the same major version"
    )
    kinds.add_argument(
        "--hardware-compatible", action="store_true", help="run on every GPU from Ampere on; not on a Jetson"
    )
