"""From packs to the plan that executors run: into how many splits, and with what costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.plan import PackPlan
from sglang_prefix.jit import jit
from sglang_prefix.packing.cost import CostModel
from sglang_prefix.packing.packs import Packs
from sglang_prefix.packing.splits import ClassLoad, class_loads

__all__ = ["CostedPlan", "PlanStats"]

IntArray = NDArray[np.int64]

_ONE_EACH = np.zeros(0, dtype=np.int64)  # query tokens, to compiled loops


@dataclass(frozen=True, slots=True)
class PlanStats:
    """What a plan reads, in numbers that can be compared between plans.

    Attributes:
        kv_tokens_read: KV tokens read; a pack's segment counts once per row block that reads it.
        kv_tokens_logical: KV tokens of all requests, which stock kernels read.
        kv_tokens_unique: KV tokens of the batch with every shared one counted once.
        kv_read_ratio: read / logical.
        kv_unique_ratio: unique / logical, the ideal.
        bytes_ratio: bytes moved with queries, slot indices and partials, over the bytes of one
            pass per request.
        num_packs: packs, the tails included.
        num_partials: partial results, one per (pack split, query).
        waves: on a GPU, rounds in which the items of a tile class are given out to its programs,
            of the class with the most work; None elsewhere.
        balance: on a GPU, the time of a program if all of a class had equal parts of the work over
            that of the fullest, added up over the classes, by estimated costs; None elsewhere.
    """

    kv_tokens_read: int
    kv_tokens_logical: int
    kv_tokens_unique: int
    kv_read_ratio: float
    kv_unique_ratio: float
    bytes_ratio: float
    num_packs: int
    num_partials: int
    waves: float | None = None
    balance: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CostedPlan(PackPlan):
    """A pack plan with the costs that it was made by, which is what the planner returns.

    Attributes:
        kv_tokens_unique: KV tokens of the batch with every shared one counted once.
        costs: shape and device that the plan was made for.
        refused_partials: partials of the plan that the policy gave, where a bound did not allow
            them and this one shares nothing instead; 0 where the policy's is in use.
    """

    kv_tokens_unique: int
    costs: CostModel
    refused_partials: int

    @classmethod
    def build(
        cls,
        packs: Packs,
        seq_lens: IntArray,
        num_splits: IntArray,
        *,
        reserved_tail_slots: int,
        kv_tokens_unique: int,
        costs: CostModel,
        refused_partials: int = 0,
        query_lens: IntArray | None = None,
    ) -> CostedPlan:
        """Lay packs out: tails behind the shared packs, slots and partials by prefix sums.

        Args:
            packs: shared packs, of rows of q, and tail starts.
            seq_lens: [B] KV tokens of each request.
            num_splits: [S + B] splits of each shared pack, then of each tail.
            reserved_tail_slots: tokens that each tail may grow by before a new plan is needed.
            kv_tokens_unique: the forest's unique tokens, for the statistics.
            costs: shape and device that the plan was made for.
            refused_partials: of the plan that this one stands in for; 0 for none.
            query_lens: [B] query tokens of each request; None for one each.
        """
        laid_out = lay_out(
            packs.start,
            packs.end,
            packs.query_indptr,
            packs.queries,
            packs.tail_start,
            seq_lens,
            num_splits,
            reserved_tail_slots,
            _ONE_EACH if query_lens is None else query_lens,
        )
        return cls(
            seq_lens,
            *laid_out,
            reserved_tail_slots,
            kv_tokens_unique,
            costs,
            refused_partials,
            query_lens=query_lens,
        )

    @property
    def kv_tokens_read(self) -> int:
        """KV tokens read; a pack's segment counts once per row block that reads it."""
        return tokens_read(
            self.pack_start,
            self.pack_end,
            self.query_indptr,
            self.costs.shape.group_size,
            self.costs.device.max_block_rows,
        )

    def loads(self) -> list[ClassLoad]:
        """How the work lies on the programs of each tile class; none without such classes."""
        qo_rows = np.diff(self.query_indptr) * self.costs.shape.group_size
        lengths = self.pack_end - self.pack_start
        return class_loads(qo_rows, lengths, self.num_splits, self.costs)

    def stats(self, grown_tokens: int = 0) -> PlanStats:
        """Statistics of this plan after its tails have grown by ``grown_tokens`` in all."""
        shape = self.costs.shape
        read = self.kv_tokens_read + grown_tokens
        logical = int(self.seq_lens.sum()) + grown_tokens
        unique = self.kv_tokens_unique + grown_tokens
        # A query with one partial needs no merge: its output is written straight away, as stock
        # kernels write theirs.
        partials = np.diff(self.request_indptr)
        merged = int(partials[partials > 1].sum())
        output_bytes = self.num_rows * shape.num_qo_heads * shape.v_head_dim * shape.q_itemsize
        moved = read * shape.kv_token_bytes + self.num_partials * shape.query_bytes + output_bytes
        moved += merged * shape.partial_bytes
        waves = balance = None
        if loads := self.loads():
            waves = max(loads, key=lambda load: load.even_us).waves
            fullest_us = sum(load.fullest_us for load in loads)
            balance = sum(load.even_us for load in loads) / fullest_us
        stock = logical * shape.kv_token_bytes + self.num_rows * shape.query_bytes + output_bytes
        return PlanStats(
            read,
            logical,
            unique,
            read / logical,
            unique / logical,
            moved / stock,
            self.num_packs,
            self.num_partials,
            waves,
            balance,
        )


@jit
def lay_out(
    start: IntArray,
    end: IntArray,
    query_indptr: IntArray,
    queries: IntArray,
    tail_start: IntArray,
    seq_lens: IntArray,
    num_splits: IntArray,
    reserved_tail_slots: int,
    query_lens: IntArray,
) -> tuple[
    IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray
]:
    """Put the tails behind the shared packs, and number slots and partials.

    One loop for what would be twenty NumPy calls on arrays of a few hundred entries, each of which
    costs more than its work.

    Args:
        start, end, query_indptr, queries, tail_start: of the shared packs, see :class:`Packs`.
        seq_lens, num_splits, reserved_tail_slots: as in :meth:`CostedPlan.build`.
        query_lens: likewise, empty for one each.

    Returns:
        The fields of :class:`PackPlan` from ``pack_start`` to ``request_indptr``.
    """
    shared, batch, readers = len(start), len(seq_lens), len(queries)
    num_rows = query_lens.sum() if len(query_lens) else batch
    pack_start = np.empty(shared + batch, dtype=np.int64)
    pack_end = np.empty(shared + batch, dtype=np.int64)
    indptr = np.empty(shared + batch + 1, dtype=np.int64)
    all_queries = np.empty(readers + num_rows, dtype=np.int64)
    slot_offset = np.zeros(shared + batch + 1, dtype=np.int64)
    partial_indptr = np.zeros(shared + batch + 1, dtype=np.int64)
    all_queries[:readers] = queries
    for row in range(num_rows):
        all_queries[readers + row] = row
    indptr[0] = 0
    for pack in range(shared + batch):
        if pack < shared:
            pack_start[pack], pack_end[pack] = start[pack], end[pack]
            indptr[pack + 1] = query_indptr[pack + 1]
            room = 0
        else:
            request = pack - shared
            pack_start[pack], pack_end[pack] = tail_start[request], seq_lens[request]
            indptr[pack + 1] = indptr[pack] + (query_lens[request] if len(query_lens) else 1)
            room = reserved_tail_slots
        slot_offset[pack + 1] = slot_offset[pack] + pack_end[pack] - pack_start[pack] + room
        num_partials = num_splits[pack] * (indptr[pack + 1] - indptr[pack])
        partial_indptr[pack + 1] = partial_indptr[pack] + num_partials
    partial_index, request_indptr = number_partials(all_queries, indptr, num_splits, num_rows)
    return (
        pack_start,
        pack_end,
        indptr,
        all_queries,
        num_splits,
        slot_offset,
        partial_indptr,
        partial_index,
        request_indptr,
    )


@jit
def tokens_read(
    pack_start: IntArray,
    pack_end: IntArray,
    query_indptr: IntArray,
    group_size: int,
    max_block_rows: int,
) -> int:
    """The loop behind :attr:`CostedPlan.kv_tokens_read`."""
    read = 0
    for pack in range(len(pack_start)):
        rows = (query_indptr[pack + 1] - query_indptr[pack]) * group_size
        read += (pack_end[pack] - pack_start[pack]) * -(-rows // max_block_rows)
    return read


@jit
def number_partials(
    queries: IntArray, query_indptr: IntArray, num_splits: IntArray, num_rows: int
) -> tuple[IntArray, IntArray]:
    """Number the partials query by query, by counting; within a query, pack by pack.

    Args:
        queries, query_indptr, num_splits: as in :class:`PackPlan`.
        num_rows: number of queries.

    Returns:
        ``partial_index`` and ``request_indptr``.
    """
    request_indptr = np.zeros(num_rows + 1, dtype=np.int64)
    for pack in range(len(num_splits)):
        for i in range(query_indptr[pack], query_indptr[pack + 1]):
            request_indptr[queries[i] + 1] += num_splits[pack]
    for row in range(num_rows):
        request_indptr[row + 1] += request_indptr[row]
    following = request_indptr.copy()
    partial_index = np.empty(request_indptr[num_rows], dtype=np.int64)
    count = 0
    for pack in range(len(num_splits)):
        for _ in range(num_splits[pack]):
            for i in range(query_indptr[pack], query_indptr[pack + 1]):
                partial_index[count] = following[queries[i]]
                following[queries[i]] += 1
                count += 1
    return partial_index, request_indptr
