"""Which row of a KV cache's memory holds each slot of each row: beams are reordered in this table, not in the cache.

Row b always writes its new tokens to row b of the memory. After ``select``, the earlier slots of a row may lie in rows
of the memory that belong to others. That is safe as long as no row writes to a slot that another row still reads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Origins:
    """The table of one KV cache.

    It has the slots of the last selection; every later slot is in the row that wrote it.
    """

    def __init__(self) -> None:
        self._table = np.zeros((0, 0), np.int32)  # [slots, rows]

    @property
    def plain(self) -> bool:
        """Returns whether every slot is in its own row of the memory."""
        return not self._table.size

    def table(self, slots: int, rows: int) -> NDArray[np.int32]:
        """Returns the table of the first slots, int32 ``[slots, rows]``.

        Args:
            slots: Number of slots.
            rows: Number of rows of the memory.
        """
        whole = np.repeat(np.arange(rows, dtype=np.int32)[None], slots, axis=0)
        kept = self._table[:slots, :rows]
        whole[: kept.shape[0], : kept.shape[1]] = kept
        return whole

    def select(self, rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> bool:
        """Makes row i a copy of row ``rows[i]``, without moving any keys or values.

        Args:
            rows: ``[B']``.
            lengths: Number of tokens of each old row, ``[B]``.

        Returns:
            Whether the rows can go on: False if a row would write to a slot that another row reads. Then the cache must
            be moved to other memory by :meth:`table`, before it is used.
        """
        used, most = int(lengths.max(initial=0)), max(len(rows), len(lengths))
        self._table = self.table(used, most)[:, rows]
        return self.shorten(lengths[rows])

    def shorten(self, lengths: NDArray[np.int64]) -> bool:
        """Takes over that the rows have ``lengths`` tokens, ``[B]``; returns the same as :meth:`select`."""
        if self.plain:
            return True
        own = np.arange(len(lengths), dtype=np.int32)
        table = self.table(min(len(self._table), int(lengths.max(initial=0))), len(own))
        slots = np.arange(len(table))[:, None]
        table = np.where(slots < lengths, table, own)
        moved = table != own
        self._table = table if moved.any() else self._table[:0, :0]
        holders, read = table[moved], np.nonzero(moved)[0]
        writes = np.full(max(len(own), int(holders.max(initial=0)) + 1), np.iinfo(np.int64).max)
        writes[: len(own)] = lengths  # the first slot that the row of the memory is written to
        return bool((read < writes[holders]).all())

    def reset(self) -> None:
        """Takes over that the cache was moved: every slot is in its own row."""
        self._table = self._table[:0, :0]
