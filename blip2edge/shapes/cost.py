"""The cost of a stage, and the roofline model for its time (Williams et al., CACM 52(4), 2009)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Roofline:
    """The highest rates that a processor reaches.

    Attributes:
        bytes_per_s: Bytes read from memory per second, in one stream.
        float_ops_per_s: Additions and multiplications per second in floating-point matrix multiplications.
        integer_ops_per_s: Additions and multiplications per second in matrix multiplications of 8-bit activations and
            weights.
    """

    bytes_per_s: float
    float_ops_per_s: float
    integer_ops_per_s: float

    def to_json(self) -> dict[str, float]:
        """Returns the rates as a JSON object, in gigabytes and billions of operations per second."""
        return {
            "gigabytes_per_s": round(self.bytes_per_s / 1e9, 1),
            "gigaflops_fp32": round(self.float_ops_per_s / 1e9, 1),
            "gigaops_int8": round(self.integer_ops_per_s / 1e9, 1),
        }


@dataclass(frozen=True)
class StageCost:
    """The smallest number of operations and bytes that a stage needs.

    Attributes:
        float_ops: Additions and multiplications in floating point.
        integer_ops: Additions and multiplications in 8-bit integers.
        bytes: Bytes of weights, keys and values that are read from memory.
    """

    float_ops: float
    integer_ops: float
    bytes: float

    def __add__(self, other: StageCost) -> StageCost:
        return StageCost(
            self.float_ops + other.float_ops, self.integer_ops + other.integer_ops, self.bytes + other.bytes
        )

    def seconds(self, roofline: Roofline, *, overlaps: bool = True) -> float:
        """Returns the shortest possible time of the stage in seconds: the longer of computing and reading memory.

        Args:
            roofline: The rates of the processor.
            overlaps: Whether the processor reads while it computes; if False, both times are added.
        """
        products = self.float_ops / roofline.float_ops_per_s + self.integer_ops / roofline.integer_ops_per_s
        reading = self.bytes / roofline.bytes_per_s
        return max(products, reading) if overlaps else products + reading

    def limited_by(self, roofline: Roofline) -> str:
        """Returns what limits the time of the stage.

        ``products``: the matrix multiplications take longer than reading memory; ``bytes``: they do not.
        """
        return "bytes" if self.seconds(roofline) <= self.bytes / roofline.bytes_per_s else "products"
