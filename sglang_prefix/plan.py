"""The pack plan: what the executors run, as host arrays, and the checks that it is right."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.executor import split_bounds
from sglang_prefix.jit import jit
from sglang_prefix.packing.cost import CostModel
from sglang_prefix.packing.packs import Packs

__all__ = ["PackPlan", "PlanStats", "verify_plan", "verify_slots"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PlanStats:
    """What a plan reads, in numbers that can be compared between plans.

    Attributes:
        kv_tokens_read: KV tokens read; a pack's stretch counts once per row block that reads it.
        kv_tokens_logical: KV tokens of all requests, which stock kernels read.
        kv_tokens_unique: KV tokens of the batch with every shared one counted once.
        kv_read_ratio: read / logical.
        kv_unique_ratio: unique / logical, the ideal.
        bytes_ratio: bytes moved with queries, slot indices and partials, over the bytes of one
            pass per request.
        num_packs: packs, the tails included.
        num_partials: partial results, one per (pack split, query).
    """

    kv_tokens_read: int
    kv_tokens_logical: int
    kv_tokens_unique: int
    kv_read_ratio: float
    kv_unique_ratio: float
    bytes_ratio: float
    num_packs: int
    num_partials: int


@dataclass(frozen=True, slots=True, eq=False)
class PackPlan:
    """A partition of the attention work of one decode batch.

    Every (request, position) belongs to exactly one pack of that request. ``P`` packs: shared ones
    first, then one tail per request in batch order, which alone grows. Every (pack split, query)
    owns one partial, numbered request by request, so that a request's partials are consecutive
    and there are no holes; PAT numbers them per pack, which collides on uneven
    trees. All arrays are int64 on the host; see
    :class:`prefix_kernels.executor.PlanArrays` for how they are read.
    """

    seq_lens: IntArray
    pack_start: IntArray
    pack_end: IntArray
    query_indptr: IntArray
    queries: IntArray
    num_splits: IntArray
    slot_offset: IntArray
    partial_indptr: IntArray
    partial_index: IntArray
    request_indptr: IntArray
    reserved_tail_slots: int
    kv_tokens_unique: int
    costs: CostModel

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
    ) -> PackPlan:
        """Lay packs out: tails behind the shared packs, slots and partials by prefix sums.

        Args:
            packs: shared packs and tail starts.
            seq_lens: [B] KV tokens of each request.
            num_splits: [S + B] pieces of each shared pack, then of each tail.
            reserved_tail_slots: tokens that each tail may grow by before a new plan is needed.
            kv_tokens_unique: the forest's unique tokens, for the statistics.
            costs: shape and device that the plan was made for.
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
        )
        return cls(seq_lens, *laid_out, reserved_tail_slots, kv_tokens_unique, costs)

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return len(self.seq_lens)

    @property
    def num_packs(self) -> int:
        """Number of packs, the tails included."""
        return len(self.pack_start)

    @property
    def num_shared_packs(self) -> int:
        """Number of packs before the tails."""
        return self.num_packs - self.batch_size

    @property
    def num_partials(self) -> int:
        """Number of partials: one per (pack split, query)."""
        return len(self.partial_index)

    @property
    def num_slots(self) -> int:
        """Entries of ``kv_slots``, growth room included."""
        return int(self.slot_offset[-1])

    @property
    def kv_tokens_read(self) -> int:
        """KV tokens read; a pack's stretch counts once per row block that reads it."""
        return tokens_read(
            self.pack_start,
            self.pack_end,
            self.query_indptr,
            self.costs.shape.group_size,
            self.costs.device.max_block_rows,
        )

    def pack_queries(self, pack: int) -> IntArray:
        """Batch rows of the requests that read ``pack``."""
        return self.queries[self.query_indptr[pack] : self.query_indptr[pack + 1]]

    def stats(self, grown_tokens: int = 0) -> PlanStats:
        """Statistics of this plan after its tails have grown by ``grown_tokens`` in all."""
        shape = self.costs.shape
        read = self.kv_tokens_read + grown_tokens
        logical = int(self.seq_lens.sum()) + grown_tokens
        unique = self.kv_tokens_unique + grown_tokens
        # A request with one partial needs no merge: its output is written straight away, as stock
        # kernels write theirs.
        partials = np.diff(self.request_indptr)
        merged = int(partials[partials > 1].sum())
        output_bytes = self.batch_size * shape.num_qo_heads * shape.v_head_dim * shape.q_itemsize
        moved = read * shape.kv_token_bytes + self.num_partials * shape.query_bytes + output_bytes
        moved += merged * shape.partial_bytes
        stock = logical * shape.kv_token_bytes + self.batch_size * shape.query_bytes + output_bytes
        return PlanStats(
            read,
            logical,
            unique,
            read / logical,
            unique / logical,
            moved / stock,
            self.num_packs,
            self.num_partials,
        )

    def same_as(self, other: PackPlan) -> bool:
        """Whether two plans are equal in every field."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


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
) -> tuple[
    IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, IntArray
]:
    """Put the tails behind the shared packs, and number slots and partials.

    One loop for what would be twenty NumPy calls on arrays of a few hundred entries, each of which
    costs more than its work.

    Args:
        start, end, query_indptr, queries, tail_start: of the shared packs, see :class:`Packs`.
        seq_lens, num_splits, reserved_tail_slots: as in :meth:`PackPlan.build`.

    Returns:
        The fields of :class:`PackPlan` from ``pack_start`` to ``request_indptr``.
    """
    shared, batch, readers = len(start), len(seq_lens), len(queries)
    pack_start = np.empty(shared + batch, dtype=np.int64)
    pack_end = np.empty(shared + batch, dtype=np.int64)
    indptr = np.empty(shared + batch + 1, dtype=np.int64)
    all_queries = np.empty(readers + batch, dtype=np.int64)
    slot_offset = np.zeros(shared + batch + 1, dtype=np.int64)
    partial_indptr = np.zeros(shared + batch + 1, dtype=np.int64)
    all_queries[:readers] = queries
    indptr[0] = 0
    for pack in range(shared + batch):
        if pack < shared:
            pack_start[pack], pack_end[pack] = start[pack], end[pack]
            indptr[pack + 1] = query_indptr[pack + 1]
            room = 0
        else:
            request = pack - shared
            pack_start[pack], pack_end[pack] = tail_start[request], seq_lens[request]
            all_queries[readers + request] = request
            indptr[pack + 1] = indptr[pack] + 1
            room = reserved_tail_slots
        slot_offset[pack + 1] = slot_offset[pack] + pack_end[pack] - pack_start[pack] + room
        pieces = num_splits[pack] * (indptr[pack + 1] - indptr[pack])
        partial_indptr[pack + 1] = partial_indptr[pack] + pieces
    partial_index, request_indptr = number_partials(all_queries, indptr, num_splits, batch)
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
    """The loop behind :attr:`PackPlan.kv_tokens_read`."""
    read = 0
    for pack in range(len(pack_start)):
        rows = (query_indptr[pack + 1] - query_indptr[pack]) * group_size
        read += (pack_end[pack] - pack_start[pack]) * -(-rows // max_block_rows)
    return read


@jit
def number_partials(
    queries: IntArray, query_indptr: IntArray, num_splits: IntArray, batch_size: int
) -> tuple[IntArray, IntArray]:
    """Number the partials request by request, by counting; within a request, pack by pack.

    Args:
        queries, query_indptr, num_splits: as in :class:`PackPlan`.
        batch_size: number of requests.

    Returns:
        ``partial_index`` and ``request_indptr``.
    """
    request_indptr = np.zeros(batch_size + 1, dtype=np.int64)
    for pack in range(len(num_splits)):
        for i in range(query_indptr[pack], query_indptr[pack + 1]):
            request_indptr[queries[i] + 1] += num_splits[pack]
    for request in range(batch_size):
        request_indptr[request + 1] += request_indptr[request]
    following = request_indptr.copy()
    partial_index = np.empty(request_indptr[batch_size], dtype=np.int64)
    count = 0
    for pack in range(len(num_splits)):
        for _ in range(num_splits[pack]):
            for i in range(query_indptr[pack], query_indptr[pack + 1]):
                partial_index[count] = following[queries[i]]
                following[queries[i]] += 1
                count += 1
    return partial_index, request_indptr


def verify_plan(plan: PackPlan) -> None:
    """Prove that a plan is a partition of the work; used by tests and SGLANG_PREFIX_VERIFY=1.

    Every (request, position) is covered by one pack split, every partial is written by one
    (pack split, query) and read by the request that it belongs to, and no two packs share an
    entry of ``kv_slots``. Independent of how the plan was made.

    Raises:
        RuntimeError: the plan is wrong; the message says where.
    """
    inside = (plan.queries >= 0) & (plan.queries < plan.batch_size)
    _require(bool(inside.all()), "a query is not in the batch")
    _require_span("query_indptr", plan.query_indptr, "queries", len(plan.queries))
    _require_span("partial_indptr", plan.partial_indptr, "partials", plan.num_partials)
    _require_span("request_indptr", plan.request_indptr, "partials", plan.num_partials)
    partials = plan.num_splits * np.diff(plan.query_indptr)
    equal = bool((np.diff(plan.partial_indptr) == partials).all())
    _require(equal, "a pack does not have one partial per split and query")
    covered = [np.zeros(int(length), dtype=np.int64) for length in plan.seq_lens]
    writer = np.zeros(plan.num_partials, dtype=np.int64)
    used = np.zeros(plan.num_slots, dtype=np.int64)
    for pack in range(plan.num_packs):
        start, end = int(plan.pack_start[pack]), int(plan.pack_end[pack])
        queries = plan.pack_queries(pack)
        fits = (end <= plan.seq_lens[queries]).all()
        _require(bool(fits), f"pack {pack} outruns its query")
        room = plan.reserved_tail_slots if pack >= plan.num_shared_packs else 0
        first, last = int(plan.slot_offset[pack]), int(plan.slot_offset[pack]) + end - start + room
        _require(0 <= first <= last <= len(used), f"pack {pack} leaves kv_slots")
        used[first:last] += 1
        _require(len(set(queries.tolist())) == len(queries), f"pack {pack} repeats a query")
        for split in range(int(plan.num_splits[pack])):
            low, high = split_bounds(end - start, int(plan.num_splits[pack]), split)
            base = int(plan.partial_indptr[pack]) + split * len(queries)
            for j, query in enumerate(queries.tolist()):
                covered[query][start + low : start + high] += 1
                partial = int(plan.partial_index[base + j])
                mine = plan.request_indptr[query] <= partial < plan.request_indptr[query + 1]
                _require(bool(mine), f"partial {partial} is not read by request {query}")
                writer[partial] += 1
    for query, count in enumerate(covered):
        wrong = np.flatnonzero(count != 1)
        _require(not len(wrong), f"request {query}: position {wrong[:1]} is not covered once")
    _require(bool((writer == 1).all()), "a partial is not written exactly once")
    _require(bool((used == 1).all()), "an entry of kv_slots does not belong to exactly one pack")


def verify_slots(plan: PackPlan, rows: NDArray[np.integer]) -> None:
    """Prove that every request of every pack holds the pack's slots at the pack's positions.

    Args:
        plan: the plan.
        rows: [B, >= max(seq_lens)] slot rows of the batch.

    Raises:
        RuntimeError: a pack claims sharing that the rows do not show.
    """
    for pack in range(plan.num_shared_packs):
        queries = plan.pack_queries(pack)
        part = rows[queries, int(plan.pack_start[pack]) : int(plan.pack_end[pack])]
        _require(bool((part == part[:1]).all()), f"pack {pack} claims sharing that is not there")


def _require_span(name: str, indptr: IntArray, what: str, count: int) -> None:
    spans = int(indptr[0]) == 0 and int(indptr[-1]) == count and bool((np.diff(indptr) >= 0).all())
    _require(spans, f"{name} does not span the {what}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"the pack plan is wrong: {what}")
