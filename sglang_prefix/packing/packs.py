"""The result of packing: which queries read which segment of KV together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["Packs", "PacksBuilder"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """``S`` packs of shared positions, and one tail per request that starts where they stop.

    The tail of request ``b`` covers ``[tail_start[b], seq_len)``, grows with the request, and is
    read by it alone; folding a shared segment into it means starting it earlier.

    Attributes:
        start, end: [S] positions of each shared pack.
        query_indptr: [S + 1] bounds of each shared pack in ``queries``.
        queries: batch rows of the shared packs' requests, pack after pack; after :meth:`of_rows`
            rows of q.
        tail_start: [B] first position of each request's tail.
    """

    start: IntArray
    end: IntArray
    query_indptr: IntArray
    queries: IntArray
    tail_start: IntArray

    def of_rows(self, query_lens: IntArray) -> Packs:
        """The same read by each of a request's ``query_lens`` [B] queries, named by rows of q."""
        counts = query_lens[self.queries]
        behind = np.append(0, np.cumsum(counts))
        first = (np.cumsum(query_lens) - query_lens)[self.queries]
        rows = np.arange(behind[-1]) + np.repeat(first - behind[:-1], counts)
        return replace(self, query_indptr=behind[self.query_indptr], queries=rows)


class PacksBuilder:
    """Collects shared packs; requests that are never mentioned keep a tail from position 0."""

    def __init__(self, batch_size: int) -> None:
        self.tail_start = np.zeros(batch_size, dtype=np.int64)
        self._bounds: list[tuple[int, int]] = []
        self._queries: list[IntArray] = []

    def add(self, start: int, end: int, queries: IntArray) -> None:
        """Add one pack of ``queries`` (batch rows) over positions ``[start, end)``."""
        self._bounds.append((start, end))
        self._queries.append(queries)

    def build(self) -> Packs:
        """Freeze what was collected."""
        bounds = np.asarray(self._bounds, dtype=np.int64).reshape(len(self._bounds), 2)
        start, end = np.ascontiguousarray(bounds.T)  # as compiled loops want them
        counts = [len(queries) for queries in self._queries]
        indptr = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        queries = np.concatenate(self._queries) if self._queries else np.zeros(0, dtype=np.int64)
        return Packs(start, end, indptr, queries, self.tail_start)
