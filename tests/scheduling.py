"""The scheduler's side of a :class:`DecodePlanner`: pools, a radix cache of SGLang's, its passes.

Every decode step runs under the plan in use and is compared with the oracle, for two attention
shapes. Slots hold values of their own, so that a plan which kept a slot too long shows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from prefix_kernels.executor import AttentionParams, make_executor
from prefix_kernels.oracle import decode_attention_oracle
from prefix_patches.schedule_context import BATCH_ATTRIBUTE, ScheduleContext
from sglang_prefix.backend.counters import BackendCounters
from sglang_prefix.backend.decode_batch import DecodeBatch
from sglang_prefix.backend.decode_planner import DecodePlanner, LayerGroup
from sglang_prefix.packing import CPU_PROFILE, AttentionShape
from sglang_prefix.packing.planner import RESERVED_TAIL_SLOTS, PackPlanner
from tests.attention import assert_close

__all__ = [
    "NUM_ROWS",
    "SHAPES",
    "Request",
    "Scheduler",
    "Step",
    "make_forward_batch",
    "make_request",
]

Request = Any  # SGLang's ``Req``, with the ``tokens`` that it holds KV of

CPU = torch.device("cpu")
NUM_SLOTS, NUM_ROWS, CONTEXT = 2048, 16, 160
# Query heads, KV heads, head dim.
SHAPES = ((4, 2, 32), (3, 1, 16))


def make_request(row: int, tokens: Sequence[int], node: Any = None, owned: int = 0) -> Request:
    """A request that holds KV of ``tokens`` in a row, of which the tree owns the first ones."""
    # Here, because importing SGLang takes ten seconds, and collecting tests should not.
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    req: Any = Req(f"r{row}", "", array("q", tokens), SamplingParams())
    req.last_node, req.tokens = node, list(tokens)
    req.kv.req_pool_idx, req.kv.cache_protected_len = row, owned
    return req


def make_forward_batch(
    mode: str, rows: Sequence[int], lens: Sequence[int], new_slots: Sequence[int], pads: int = 0
) -> Any:
    """SGLang's view of a batch, as far as attention reads it.

    Args:
        mode: of the forward pass.
        rows: of ``req_to_token``.
        lens: tokens of each row, the new one included.
        new_slots: of the new tokens.
        pads: rows of padding behind them.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    seq_lens = [*lens, *[1] * pads]
    return ForwardBatch(
        forward_mode=ForwardMode[mode],
        batch_size=len(seq_lens),
        input_ids=torch.zeros(len(seq_lens), dtype=torch.int64),
        req_pool_indices=torch.tensor([*rows, *[0] * pads], dtype=torch.int64),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int64),
        seq_lens_cpu=torch.tensor(seq_lens, dtype=torch.int64),
        seq_lens_sum=sum(seq_lens),
        out_cache_loc=torch.tensor([*new_slots, *[0] * pads], dtype=torch.int64),
    )


class Step(NamedTuple):
    """What a decode step added to the counters."""

    plans: int
    read: int
    logical: int


class Scheduler:
    """Prefills, decodes and publishes requests around one planner.

    Args:
        page_size: tokens per KV page.
        reserved_tail_slots: tokens that a plan's tails may grow by.
        verify: the planner checks every plan and step.
        gate: the planner's.
        ranks_agree: whether :meth:`decode_agreed` may pack against the gate.
        bigrams: the tree's keys are pairs of tokens, as where EAGLE or MTP drafts.
    """

    def __init__(
        self,
        *,
        page_size: int = 1,
        reserved_tail_slots: int = RESERVED_TAIL_SLOTS,
        verify: bool = True,
        gate: Any = None,
        ranks_agree: bool = False,
        bigrams: bool = False,
    ) -> None:
        self.page_size, self.bigrams = page_size, bigrams
        self.allocator, self.cache = _pools(page_size, bigrams)
        generator = torch.Generator().manual_seed(0)
        self.caches = [
            torch.randn(2, NUM_SLOTS + page_size, heads, dim, generator=generator)
            for _, heads, dim in SHAPES
        ]
        # Row 0 is all zeros and belongs to padding; the others hold what was left in them.
        self.table = torch.randint(1, NUM_SLOTS, (NUM_ROWS, CONTEXT), generator=generator).int()
        self.table[0] = 0
        self.free_rows = list(range(1, NUM_ROWS))
        self.schedule = ScheduleContext()
        self.counters = BackendCounters()
        # Policy "node" packs every node however small, so that what is read can be foretold.
        shapes = [
            AttentionShape(qo_heads, kv_heads, dim, dim, 4, 4) for qo_heads, kv_heads, dim in SHAPES
        ]
        self.groups = [
            LayerGroup(
                PackPlanner(
                    shape, CPU_PROFILE, policy="node", reserved_tail_slots=reserved_tail_slots
                ),
                make_executor("torch", shape, CPU),
            )
            for shape in shapes
        ]
        self.planner = DecodePlanner(
            self.schedule,
            self.table,
            page_size,
            self.groups,
            self.counters,
            gate=gate,
            ranks_agree=ranks_agree,
            verify=verify,
        )

    def prefill(self, *prompts: Sequence[int]) -> list[Request]:
        """One prefill pass over new requests, each of which adopts what the tree has.

        The tree learns of them in :meth:`publish`: under overlap scheduling not before their
        first decode step.
        """
        reqs = []
        for prompt in prompts:
            node, slots = self._match(prompt[:-1])
            row = self.free_rows.pop()
            self.table[row, : len(slots)] = slots.int()
            req = make_request(row, prompt[: len(slots)], node, len(slots))
            self.grow(req, prompt[len(slots) :])
            reqs.append(req)
        self.run_pass("EXTEND", reqs)
        return reqs

    def fork(self, leader: Request) -> Request:
        """A beam member: a row that holds what its leader's does."""
        row = self.free_rows.pop()
        self.table[row] = self.table[leader.kv.req_pool_idx]
        return make_request(row, leader.tokens)

    def publish(self, *reqs: Request) -> None:
        """Insert requests into the tree; their rows now hold the tree's slots."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        for req in reqs:
            whole = len(req.tokens) // self.page_size * self.page_size
            key = self._radix_key(req.tokens[:whole])
            slots = self.table[req.kv.req_pool_idx, : len(key)].long()
            self.cache.insert(InsertParams(key=key, value=slots))
            req.last_node, slots = self._match(req.tokens[:whole])
            self.table[req.kv.req_pool_idx, : len(slots)] = slots.int()
            req.kv.cache_protected_len = len(slots)

    def start(self, *prompts: Sequence[int]) -> list[Request]:
        """Requests that decode under a plan which may be reused."""
        reqs = self.prefill(*prompts)
        self.decode(reqs)
        self.publish(*reqs)
        assert self.decode(reqs).plans == 1
        return reqs

    def decode(
        self,
        reqs: Sequence[Request],
        *,
        members: Sequence[Request] = (),
        pads: int = 0,
        published: bool = True,
    ) -> Step:
        """One decode step of every request, compared with the oracle.

        Args:
            reqs: the requests of the batch.
            members: rows that no request of the batch stands for, as in beam search.
            pads: rows of padding, as under DP attention.
            published: whether the schedule batch reaches the planner.
        """
        before = self.counted()
        forward_batch = self.decode_batch(reqs, members=members, pads=pads, published=published)
        reason = self.prepare(forward_batch)
        assert reason is None
        self.check_attention(forward_batch)
        # As SGLang does: the next step's lengths are made in place.
        forward_batch.seq_lens_cpu.add_(1)
        return Step(*(now - then for now, then in zip(self.counted(), before, strict=True)))

    def verify(self, reqs: Sequence[Request], drafts: int, accepted: Sequence[int]) -> Step:
        """One verify pass over ``drafts`` tokens of every request, compared with the oracle.

        Args:
            reqs: the requests of the batch.
            drafts: tokens of each that are checked.
            accepted: of each, how many of them it keeps; the others' slots are given up.
        """
        before = self.counted()
        for req in reqs:
            self.grow(req, range(drafts))
        forward_batch = self._forward_batch("TARGET_VERIFY", reqs, 0, reqs, drafts)
        assert self.prepare(forward_batch, drafts=drafts) is None
        self.check_attention(forward_batch, drafts=drafts)
        for req, kept in zip(reqs, accepted, strict=True):
            del req.tokens[len(req.tokens) - drafts + kept :]
        return Step(*(now - then for now, then in zip(self.counted(), before, strict=True)))

    def decode_agreed(
        self, reqs: Sequence[Request], packed: bool | None, *, pads: int = 0
    ) -> tuple[tuple[float, float] | None, str | None]:
        """A decode step on whose graph ranks have agreed; compared with the oracle if it is packed.

        Args:
            reqs: the requests of the batch.
            packed: what ranks agreed on; None for an eager step.
            pads: rows of padding, which the batch gets after it has been scheduled.

        Returns:
            What the planner predicted ahead of the step, and what it said to it.
        """
        forward_batch = self.decode_batch(reqs, pads=pads)
        batch = vars(forward_batch)[BATCH_ATTRIBUTE]
        predicted = self.planner.decide_ahead(DecodeBatch.scheduled(batch))
        reason = self.prepare(forward_batch, packed=packed)
        if reason is None:
            self.check_attention(forward_batch, len(reqs))
        return predicted, reason

    def decode_batch(
        self,
        reqs: Sequence[Request],
        *,
        members: Sequence[Request] = (),
        pads: int = 0,
        published: bool = True,
    ) -> Any:
        """The forward batch of a decode step, for which every row has got its new slot."""
        held = [*reqs, *members]
        for req in held:
            self.grow(req, (int(torch.randint(1000, (1,))),))
        return self._forward_batch("DECODE", held, pads, reqs if published else None)

    def prepare(
        self,
        forward_batch: Any,
        *,
        in_graph: bool = False,
        packed: bool | None = None,
        drafts: int = 0,
    ) -> str | None:
        """What the planner says within the forward pass; counted as the backend counts."""
        previous = self.schedule.push(forward_batch)
        try:
            batch = DecodeBatch(forward_batch, self.schedule.batch, in_graph, drafts)
            reason = self.planner.prepare(batch, packed=packed)
        finally:
            self.schedule.pop(previous)
        if reason is None:
            self.planner.count_step()
        return reason

    def run_pass(self, mode: str, reqs: Sequence[Request]) -> None:
        """A forward pass that our decode has no part in."""
        self.schedule.pop(self.schedule.push(self._forward_batch(mode, reqs, 0, reqs)))

    def check_attention(
        self, forward_batch: Any, count: int | None = None, *, drafts: int = 0
    ) -> None:
        """Both executors' outputs for this batch are the oracle's, for the first rows or all."""
        rows, lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        if drafts:  # each sees what is before it
            rows, lens = (each.repeat_interleave(drafts) for each in (rows, lens))
            lens = lens + 1 + torch.arange(len(lens)) % drafts
        for group, (qo_heads, _, dim), (k_cache, v_cache) in zip(
            self.groups, SHAPES, self.caches, strict=True
        ):
            q = torch.randn(len(rows), qo_heads, dim)
            out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
            group.executor.run(q, k_cache, v_cache, out, lse, AttentionParams(dim**-0.5))
            expected = decode_attention_oracle(
                q,
                k_cache,
                v_cache,
                self.table,
                rows,
                lens,
                sm_scale=dim**-0.5,
            )
            out, lse = out[:count], lse[:count]
            assert_close((out, lse), (expected[0][:count], expected[1][:count]))

    def grow(self, req: Request, tokens: Sequence[int]) -> None:
        """Append tokens to a request, on pages of its own."""
        row = self.table[req.kv.req_pool_idx]
        for token in tokens:
            position = len(req.tokens)
            inside = position % self.page_size
            row[position] = row[position - 1] + 1 if inside else self._new_page()
            req.tokens.append(token)

    def counted(self) -> tuple[int, int, int]:
        """Plans, KV tokens read and KV tokens of all requests so far."""
        kinds = [self.counters.of[kind] for kind in ("decode", "verify")]
        return (
            sum(counts.plans for counts in kinds),
            sum(counts.kv_tokens_read for counts in kinds),
            sum(counts.kv_tokens_logical for counts in kinds),
        )

    def distinct_slots(self, reqs: Sequence[Request]) -> int:
        """KV tokens of some requests when those that they share count once."""
        held = [self.table[req.kv.req_pool_idx, : len(req.tokens)] for req in reqs]
        return len(set(torch.cat(held).tolist()))

    def _new_page(self) -> torch.Tensor:
        slots: torch.Tensor = self.allocator.alloc(self.page_size)
        return slots[0].int()

    def _match(self, tokens: Sequence[int]) -> tuple[Any, torch.Tensor]:
        """The node that a prefix ends at, and the slots that the tree has for it."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        found = self.cache.match_prefix(MatchPrefixParams(key=self._radix_key(tokens)))
        node = found.last_device_node
        return node, self.cache.path_device_indices(node)

    def _radix_key(self, tokens: Sequence[int]) -> Any:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(array("q", tokens), is_bigram=self.bigrams)

    def _forward_batch(
        self,
        mode: str,
        held: Sequence[Request],
        pads: int,
        reqs: Sequence[Request] | None,
        drafts: int = 0,
    ) -> Any:
        """A forward batch of ``held``; behind it stands a schedule batch of ``reqs``, if any."""
        from sglang.srt.managers.schedule_batch import ScheduleBatch

        rows = [req.kv.req_pool_idx for req in held]
        ends = [len(req.tokens) for req in held]
        new = [self.table[row, n - (drafts or 1) : n] for row, n in zip(rows, ends, strict=True)]
        new_slots = torch.cat(new).tolist() if new else []
        lens = [n - drafts for n in ends]
        forward_batch = make_forward_batch(mode, rows, lens, new_slots, pads)
        if reqs is not None:
            batch: Any = ScheduleBatch(reqs=list(reqs), tree_cache=self.cache)
            batch.req_pool_indices = torch.tensor(rows, dtype=torch.int64)
            batch.req_pool_indices_cpu = batch.req_pool_indices
            batch.seq_lens = batch.seq_lens_cpu = torch.tensor(lens, dtype=torch.int64)
            batch.out_cache_loc = torch.tensor(new_slots, dtype=torch.int64)
            setattr(forward_batch, BATCH_ATTRIBUTE, batch)
        return forward_batch


def _pools(page_size: int, bigrams: bool) -> tuple[Any, Any]:
    """SGLang's slot allocator and radix cache."""
    # Here, because importing SGLang takes ten seconds, and collecting tests should not.
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    kv_pool = MHATokenToKVPool(NUM_SLOTS, page_size, torch.float32, 1, 8, 1, "cpu", False)
    options = (torch.float32, "cpu", kv_pool, False)
    allocator = (
        TokenToKVPoolAllocator(NUM_SLOTS, *options)
        if page_size == 1
        else PagedTokenToKVPoolAllocator(NUM_SLOTS, page_size, *options)
    )
    cache = UnifiedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(NUM_ROWS, CONTEXT, "cpu", False),
            token_to_kv_pool_allocator=allocator,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
            is_eagle=bigrams,
        )
    )
    return allocator, cache
