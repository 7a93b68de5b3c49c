"""Formats text tables and numbers with units for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

GAP = "  "


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Lays out rows under a header, with two spaces between columns.

    Args:
        header: The name of each column.
        rows: The cells of each row, one for each column.
        right: Indices of the columns that are aligned to the right (numbers).
    """
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def lay(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])
            for column, cell in enumerate(line)
        ]
        return GAP.join(cells).rstrip()

    rule = GAP.join("-" * width for width in widths)
    return "\n".join([lay(lines[0]), rule, *[lay(line) for line in lines[1:]]])


def size(count: int) -> str:
    """Formats a number of bytes: 512 B, 1.5 KB, 7.4 GB (powers of 1000)."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("KB", "MB", "GB"):
        value /= 1000.0
        if value < 999.5:
            return f"{value:.1f} {unit}"
    return f"{value / 1000.0:.1f} TB"


def difference(value: float) -> str:
    """Formats a numerical difference: 1.2e-05, or 0."""
    return "0" if value == 0.0 else f"{value:.1e}"
