"""The pack plan, as host arrays: what every executor runs, and the checks that it is right."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.arguments import check_flag, check_integer

__all__ = ["AttentionShape", "PackPlan", "split_bounds", "verify_plan", "verify_slots"]

IntArray = NDArray[np.int64]

# One partial is float32 output and lse, written by the forward stage and read by the merge.
_PARTIAL_ITEMSIZE = 4
_PARTIAL_PASSES = 2
# A plan addresses KV by int32 slot index, read once per pack and KV head group.
_SLOT_ITEMSIZE = 4


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a plan and its executor need to know about the attention layers that they serve.

    Attributes:
        num_qo_heads, num_kv_heads: heads on this rank; the first is a multiple of the second.
        head_dim, v_head_dim: elements per head of q and k, and of v.
        q_itemsize, kv_itemsize: bytes per element of q, and of the KV cache.
        v_in_k: whether v is no tensor of its own but the first ``v_head_dim`` elements of each row
            of k, as in absorbed multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section
            2.1), where they are the latent and the rest of k is the part with RoPE.

    Raises:
        ValueError: one of the numbers is no positive integer, ``v_in_k`` is no flag, query heads
            do not come in whole groups, or v is longer than the k that it is in.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_itemsize: int
    kv_itemsize: int
    v_in_k: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "v_in_k":
                check_integer(field.name, getattr(self, field.name))
        check_flag("v_in_k", self.v_in_k)
        if self.v_in_k and self.v_head_dim > self.head_dim:
            raise ValueError(
                f"v_head_dim={self.v_head_dim}; legal with v_in_k: up to head_dim={self.head_dim}"
            )
        if self.num_qo_heads % self.num_kv_heads:
            raise ValueError(
                f"num_qo_heads={self.num_qo_heads}; legal: a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of K and V of one token, with its slot index."""
        return self.num_kv_heads * self.kv_row_size * self.kv_itemsize + _SLOT_ITEMSIZE

    @property
    def kv_row_size(self) -> int:
        """Elements of K and V that one token and KV head has in the cache."""
        return self.head_dim + (0 if self.v_in_k else self.v_head_dim)

    @property
    def query_bytes(self) -> int:
        """Bytes of one request's query."""
        return self.num_qo_heads * self.head_dim * self.q_itemsize

    @property
    def partial_size(self) -> int:
        """Bytes that one partial takes."""
        return self.num_qo_heads * (self.v_head_dim + 1) * _PARTIAL_ITEMSIZE

    @property
    def partial_bytes(self) -> int:
        """Bytes moved to write one request's partial and to read it again."""
        return self.partial_size * _PARTIAL_PASSES


@dataclass(frozen=True, slots=True, eq=False)
class PackPlan:
    """A partition of the attention work of one batch: ``P`` packs for ``B`` requests.

    A pack is a segment of positions whose KV several requests read together. Every (request,
    position) belongs to exactly one pack of that request. Shared packs come first, then one tail
    per request in batch order; pack ``P - B + b`` is the tail of request ``b``. Only tails grow.

    A request has one query token, or ``query_lens[b]``: its newest, whose KV is in the cache, as
    when drafts are verified or a cached prefix is extended. Queries are rows of q, of which a
    request's stand together, in order; there are ``R``. Query ``j`` of ``n`` of a request sees its
    positions up to its own, ``seq_len - n + j``. No query token's own position lies in a shared
    pack where there are several, so all queries of a pack's requests see all of it; the tail of
    ``L`` tokens has all ``n`` queries, and query ``j`` sees the first ``L - n + j + 1`` of them.

    A pack is cut into splits. Every (pack split, query) writes one partial. Partials are numbered
    query by query, so that those of a query are consecutive and there are no holes; PAT numbers
    them per pack, which collides on uneven trees.

    All arrays are int64 on the host.

    Attributes:
        seq_lens: [B] KV tokens of each request when the plan was made, query tokens included.
        pack_start, pack_end: [P] positions ``[start, end)`` of each pack.
        query_indptr: [P + 1] bounds of each pack in ``queries``.
        queries: rows of q that read the packs, pack after pack.
        num_splits: [P] splits of each pack.
        slot_offset: [P + 1] where the slots of each pack begin in ``kv_slots``. Behind those of a
            tail is room for ``reserved_tail_slots`` more.
        partial_indptr: [P + 1] bounds of each pack in ``partial_index``. Split ``s`` of pack ``p``
            writes, for its ``j``-th of ``n`` queries, the partial with number
            ``partial_index[partial_indptr[p] + s * n + j]``.
        partial_index: numbers of the partials, pack after pack.
        request_indptr: [R + 1] the partials of query ``r`` are the numbers from
            ``request_indptr[r]`` to ``request_indptr[r + 1]``.
        reserved_tail_slots: tokens that each tail may grow by before a new plan is needed.
        query_lens: [B] query tokens of each request; None for one each.
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
    _: KW_ONLY
    query_lens: IntArray | None = None

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return len(self.seq_lens)

    @property
    def num_rows(self) -> int:
        """Number of queries, which is that of the rows of q."""
        return len(self.request_indptr) - 1

    @property
    def request_of_row(self) -> IntArray:
        """[R] the request of each query."""
        if self.query_lens is None:
            return np.arange(self.batch_size)
        return np.repeat(np.arange(self.batch_size), self.query_lens)

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
        """Entries of ``kv_slots``, reserved tail slots included."""
        return int(self.slot_offset[-1])

    @property
    def tail_start(self) -> IntArray:
        """[B] first position of each request's tail."""
        return self.pack_start[self.num_shared_packs :]

    @property
    def tail_offset(self) -> IntArray:
        """[B] where the slots of each tail begin in ``kv_slots``."""
        return self.slot_offset[self.num_shared_packs : -1]

    def pack_queries(self, pack: int) -> IntArray:
        """Rows of q that read ``pack``."""
        return self.queries[self.query_indptr[pack] : self.query_indptr[pack + 1]]

    def same_as(self, other: PackPlan) -> bool:
        """Whether two plans are equal in every field."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def split_bounds(length: int, num_splits: int, split: int) -> tuple[int, int]:
    """Tokens of one split of a pack that holds ``length`` tokens now, as ``[begin, end)``.

    Splits are equal up to rounding and depend on the current length only, so a plan stays valid
    while its tails grow. A split of a short pack may be empty.
    """
    chunk = -(-length // num_splits)
    return min(split * chunk, length), min((split + 1) * chunk, length)


def verify_plan(plan: PackPlan) -> None:
    """Prove that a plan is a partition of the work; used by tests and SGLANG_PREFIX_VERIFY=1.

    Every (query, position that it sees) is covered by one pack split, every partial is written by
    one (pack split, query) and read by the query that it belongs to, and no two packs share an
    entry of ``kv_slots``. Independent of how the plan was made.

    Raises:
        RuntimeError: the plan is wrong; the message says where.
    """
    request_of = plan.request_of_row
    lens = np.ones(plan.batch_size, np.int64) if plan.query_lens is None else plan.query_lens
    adds_up = len(lens) == plan.batch_size and len(request_of) == plan.num_rows
    _require(adds_up and bool((lens >= 1).all()), "query_lens do not add up to the queries")
    first_row = np.cumsum(lens) - lens
    places = np.arange(plan.num_rows) - first_row[request_of]
    sees = (plan.seq_lens - lens + 1)[request_of] + places
    inside = (plan.queries >= 0) & (plan.queries < plan.num_rows)
    _require(bool(inside.all()), "a query is not in the batch")
    _require_span("query_indptr", plan.query_indptr, "queries", len(plan.queries))
    _require_span("partial_indptr", plan.partial_indptr, "partials", plan.num_partials)
    _require_span("request_indptr", plan.request_indptr, "partials", plan.num_partials)
    partials = plan.num_splits * np.diff(plan.query_indptr)
    equal = bool((np.diff(plan.partial_indptr) == partials).all())
    _require(equal, "a pack does not have one partial per split and query")
    covered = [np.zeros(int(length), dtype=np.int64) for length in sees]
    writer = np.zeros(plan.num_partials, dtype=np.int64)
    used = np.zeros(plan.num_slots, dtype=np.int64)
    for pack in range(plan.num_packs):
        start, end = int(plan.pack_start[pack]), int(plan.pack_end[pack])
        queries, tail = plan.pack_queries(pack), pack - plan.num_shared_packs
        fits = end <= (sees[queries] if tail < 0 else plan.seq_lens[request_of[queries]])
        _require(bool(fits.all()), f"pack {pack} outruns its query")
        if tail >= 0 and plan.query_lens is not None:
            own = np.arange(first_row[tail], first_row[tail] + lens[tail])
            _require(np.array_equal(queries, own), f"tail {tail} has not its request's queries")
        room = plan.reserved_tail_slots if tail >= 0 else 0
        first, last = int(plan.slot_offset[pack]), int(plan.slot_offset[pack]) + end - start + room
        _require(0 <= first <= last <= len(used), f"pack {pack} leaves kv_slots")
        used[first:last] += 1
        _require(len(set(queries.tolist())) == len(queries), f"pack {pack} repeats a query")
        for split in range(int(plan.num_splits[pack])):
            low, high = split_bounds(end - start, int(plan.num_splits[pack]), split)
            base = int(plan.partial_indptr[pack]) + split * len(queries)
            for j, query in enumerate(queries.tolist()):
                covered[query][start + low : start + high] += 1  # as far as it sees
                partial = int(plan.partial_index[base + j])
                mine = plan.request_indptr[query] <= partial < plan.request_indptr[query + 1]
                reader = request_of[query]
                _require(bool(mine), f"partial {partial} is not read by request {reader}")
                writer[partial] += 1
    for query, count in enumerate(covered):
        wrong, where = np.flatnonzero(count != 1), f"request {request_of[query]}"
        _require(not len(wrong), f"{where}: position {wrong[:1]} is not covered once")
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
    request_of = plan.request_of_row
    for pack in range(plan.num_shared_packs):
        requests = request_of[plan.pack_queries(pack)]
        part = rows[requests, int(plan.pack_start[pack]) : int(plan.pack_end[pack])]
        _require(bool((part == part[:1]).all()), f"pack {pack} claims sharing that is not there")


def _require_span(name: str, indptr: IntArray, what: str, count: int) -> None:
    spans = int(indptr[0]) == 0 and int(indptr[-1]) == count and bool((np.diff(indptr) >= 0).all())
    _require(spans, f"{name} does not span the {what}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"the pack plan is wrong: {what}")
