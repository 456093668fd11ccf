"""The standalone interface: plan a batch, then run its layers. Imports nothing of SGLang."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.arguments import INT64_MAX, check_flag, check_integer, check_number
from prefix_kernels.executor import (
    AttentionParams,
    choose_executor,
    make_executor,
    why_not_shape,
)
from prefix_kernels.plan import AttentionShape, verify_plan, verify_slots
from sglang_prefix import checks
from sglang_prefix.config import verify_requested
from sglang_prefix.forest import PrefixForest
from sglang_prefix.gate import limits_of
from sglang_prefix.packing.layout import CostedPlan, PlanStats
from sglang_prefix.packing.planner import planner_for

__all__ = ["PrefixDecodeWrapper"]

IntArray = NDArray[np.int64]

# What partial results may take where the caller names no bound: 65,000 of them at 32 query heads of
# head dim 128, which is 16 for each of 4,096 requests.
_PARTIALS_BYTES = 1 << 30


class PrefixDecodeWrapper:
    """Decode attention over a slot table that reads KV shared by several requests once.

    ``plan`` once per batch, ``run`` once per layer and step::

        w = PrefixDecodeWrapper(32, 8, 128, dtype=torch.float32)
        w.plan(req_to_token, req_pool_indices, seq_lens)
        out = w.run(q, k_cache, v_cache)

    With ``query_lens`` a request has several query tokens, which are its last ones, as when drafts
    are verified or a cached prefix is extended: append attention, causal among themselves.

    Args:
        num_qo_heads, num_kv_heads: heads; the first must be a multiple of the second.
        head_dim: elements per head of q and k.
        v_head_dim: elements per head of v; None for ``head_dim``.
        v_in_k: whether v is the first ``v_head_dim`` elements of each row of k, as in absorbed
            multi-head latent attention; ``run`` then reads them once for both.
        page_size: tokens per KV page; only whole pages are shared.
        sm_scale: factor on the scores; None for ``1 / sqrt(head_dim)``. This and the next, and
            scales of :meth:`run`: from 2**-32 to 2**32, so that float32 holds their products.
        logit_cap: scores become ``cap * tanh(score / cap)``; 0 for none.
        policy: "pat", "node", "chunk" or "query".
        q_dtype: dtype of q and of the output: float32, float16 or bfloat16.
        kv_dtype: dtype of the caches: as q, or float8_e4m3fn, float8_e5m2; None for ``q_dtype``.
        dtype: sets both at once.
        max_batch_size, max_kv_tokens: bounds on a planned batch and on the sum of its lengths;
            None for none.
        max_partials: bound on partial results, each ``num_qo_heads * (v_head_dim + 1)`` float32; a
            plan over it gives up splits, then sharing. Must hold one per request. None for those
            that 1 GiB holds; a plan that would have to give up sharing for these is refused.
        device: where q, the caches and ``req_to_token`` live.
        executor: "native" (the CPU; compiled the first time, for some seconds), "torch" (any
            device), "triton" (a GPU, or the CPU under ``TRITON_INTERPRET=1``), or "auto", the
            fastest one that works.

    Raises:
        ValueError: an argument is not legal; the message names it, its value and what is legal.
    """

    def __init__(
        self,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        v_in_k: bool = False,
        page_size: int = 1,
        sm_scale: float | None = None,
        logit_cap: float = 0.0,
        policy: str = "pat",
        q_dtype: torch.dtype = torch.bfloat16,
        kv_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int | None = None,
        max_kv_tokens: int | None = None,
        max_partials: int | None = None,
        device: str | torch.device = "cpu",
        executor: str = "auto",
    ) -> None:
        self.num_qo_heads = check_integer("num_qo_heads", num_qo_heads)
        self.num_kv_heads = check_integer("num_kv_heads", num_kv_heads)
        self.head_dim = check_integer("head_dim", head_dim)
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.v_head_dim = check_integer("v_head_dim", v_head_dim)
        self.v_in_k = check_flag("v_in_k", v_in_k)
        self.page_size = check_integer("page_size", page_size)
        self.q_dtype, self.kv_dtype = checks.check_dtypes(dtype, q_dtype, kv_dtype)
        self.max_batch_size = _check_bound("max_batch_size", max_batch_size)
        self.max_kv_tokens = _check_bound("max_kv_tokens", max_kv_tokens)
        self.max_partials = _check_bound("max_partials", max_partials)
        if self.max_partials is not None and self.max_partials < (self.max_batch_size or 1):
            raise ValueError(
                f"max_partials={self.max_partials} is below max_batch_size="
                f"{self.max_batch_size}; legal: at least one partial per request"
            )
        default = self.head_dim**-0.5
        self.sm_scale = default if sm_scale is None else check_number("sm_scale", sm_scale)
        self.logit_cap = checks.check_logit_cap(logit_cap)
        self.device = checks.check_device(device)
        self.executor = choose_executor(executor, self.device, self.q_dtype, self.kv_dtype)
        heads, dims = (self.num_qo_heads, self.num_kv_heads), (self.head_dim, self.v_head_dim)
        sizes = (self.q_dtype.itemsize, self.kv_dtype.itemsize)
        shape = AttentionShape(*heads, *dims, *sizes, self.v_in_k)
        if why_not := why_not_shape(self.executor, shape, self.device):
            raise ValueError(f"executor={self.executor!r} cannot be used here: {why_not}")
        most = self.max_partials or max(1, _PARTIALS_BYTES // shape.partial_size)
        options = {"max_parts": most} if self.executor == "native" else {}
        self._executor = make_executor(
            self.executor, shape, self.device, check_slots=verify_requested(), **options
        )
        bandwidth = limits_of(self.device).read_bytes_per_s
        self._planner = planner_for(self._executor, bandwidth, policy=policy, max_partials=most)
        self._plan: CostedPlan | None = None
        self._seq_lens = np.zeros(0, dtype=np.int64)  # in use: those planned, or advanced to
        self._req_to_token = torch.empty(0, 0, dtype=torch.int32)
        self._req_pool_indices = torch.empty(0, dtype=torch.int64)

    @property
    def current_plan(self) -> CostedPlan:
        """The plan in use.

        Raises:
            ValueError: nothing has been planned yet.
        """
        if self._plan is None:
            raise ValueError("nothing has been planned; legal: call plan(...) before run(...)")
        return self._plan

    @property
    def stats(self) -> PlanStats:
        """What the plan in use reads, at the lengths in use.

        Raises:
            ValueError: nothing has been planned yet.
        """
        plan = self.current_plan
        return plan.stats(int((self._seq_lens - plan.seq_lens).sum()))

    def plan(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        forest: PrefixForest | None = None,
        query_lens: torch.Tensor | None = None,
    ) -> None:
        """Find what the batch shares and lay out its work.

        With a ``forest`` and lengths on the CPU nothing is read back from the device. Without a
        forest, rows on another device are copied to the CPU first, which synchronises once.

        Args:
            req_to_token: [rows, context] int32 or int64, slot of every position; on the device.
                Kept, so that ``run(seq_lens=...)`` sees what is added to it later.
            req_pool_indices: [B] int32 or int64, row of each request.
            seq_lens: [B] int32 or int64, KV tokens of each request, at least 1. They include its
                query tokens, whose KV must be in the caches before ``run``.
            forest: what is shared, if the caller knows; trusted, and compared with the rows
                only under ``SGLANG_PREFIX_VERIFY=1``.
            query_lens: [B] int32 or int64, query tokens of each request, from 1 to its length; on
                the CPU, or else reading them synchronises. They are its last tokens: row ``j`` of
                ``n`` attends to positions up to ``seq_len - n + j``. Of the positions of several
                nothing is shared, whatever the rows or the forest say. None for one each.

        Raises:
            ValueError: an argument is not legal, or the batch is over a bound. The plan that was
                in use stays in use.
            RuntimeError: ``SGLANG_PREFIX_VERIFY=1`` and the forest or the plan is wrong.
        """
        checks.check_table(req_to_token, self.device)
        checks.check_index("req_pool_indices", req_pool_indices, self.device)
        size, why = len(req_pool_indices), ", as req_pool_indices has"
        checks.check_index("seq_lens", seq_lens, self.device, size, why)
        if query_lens is not None:
            checks.check_index("query_lens", query_lens, self.device, size, why)
        if self.max_batch_size is not None and len(seq_lens) > self.max_batch_size:
            raise ValueError(
                f"seq_lens has {len(seq_lens)} entries; legal: up to "
                f"max_batch_size={self.max_batch_size}"
            )
        verify = verify_requested()
        if forest is not None and not verify:
            lens = checks.check_given_forest(forest, seq_lens)
            checks.check_lengths(lens, req_to_token.shape[1])
            if self.device.type == "cpu" or req_pool_indices.device.type == "cpu":
                pool_indices = checks.to_host("req_pool_indices", req_pool_indices)
                checks.check_pool_indices(pool_indices, req_to_token.shape[0])
        else:
            lens = checks.to_host("seq_lens", seq_lens)
            checks.check_lengths(lens, req_to_token.shape[1])
            pool_indices = checks.to_host("req_pool_indices", req_pool_indices)
            checks.check_pool_indices(pool_indices, req_to_token.shape[0])
            rows = _host_rows(req_to_token, pool_indices, int(lens.max()))
            checks.check_table_rows(rows, lens)
            found = PrefixForest.from_rows(rows, lens, page_size=self.page_size)
            if forest is not None:
                checks.check_given_forest(forest, seq_lens)
                checks.check_same_sharing(forest, found)
            forest = found
        if self.max_kv_tokens is not None and lens.sum() > self.max_kv_tokens:
            raise ValueError(
                f"seq_lens adds up to {lens.sum()} KV tokens; legal: up to "
                f"max_kv_tokens={self.max_kv_tokens}"
            )
        num_queries = None if query_lens is None else checks.to_host("query_lens", query_lens)
        plan = self._planner.plan(forest, query_lens=num_queries)
        if plan.refused_partials and self.max_partials is None:
            raise self._too_many_partials(plan.refused_partials)
        if verify:
            verify_plan(plan)
            verify_slots(plan, rows)
        rows_in_use = req_pool_indices.to(self.device, copy=True)
        self._executor.load(plan, req_to_token, rows_in_use)
        self._req_to_token, self._req_pool_indices = req_to_token, rows_in_use
        self._plan, self._seq_lens = plan, plan.seq_lens

    def advance(
        self, seq_lens: torch.Tensor, new_slots: torch.Tensor, *, rewrite: bool = False
    ) -> None:
        """Let requests grow without planning again, and without ``req_to_token``.

        Under a plan with ``query_lens`` the query tokens are the last ones of the new lengths.
        Where drafts were rejected, a request grows by fewer than it has query tokens, and some of
        these stand where the rejected ones did: in the same slots, or in others with ``rewrite``.

        Args:
            seq_lens: [B] int32 or int64, the new lengths; lengths on another device cost a sync.
            new_slots: [sum of growth] int32 or int64, the slots of the new tokens, request after
                request. With ``rewrite`` those of all query tokens, and of the new tokens before
                them: [sum of the larger of growth and query tokens].
            rewrite: whether query tokens at positions in use get new slots, too. Every request
                grows then.

        Raises:
            ValueError: lengths shrink, or pass the reserved tail slots ("plan again"), or
                ``new_slots`` does not have one slot per new token. Nothing is changed then.
        """
        lens = self._checked_lengths(seq_lens)
        if (lens < self._seq_lens).any():
            b = int((lens < self._seq_lens).argmax())
            raise ValueError(
                f"seq_lens[{b}]={lens[b]} shrinks below {self._seq_lens[b]}; legal: the lengths in "
                "use or longer. Plan again."
            )
        first, why = self._seq_lens, ", one per token by which seq_lens grows"
        if check_flag("rewrite", rewrite):
            if (lens == first).any():
                b = int((lens == first).argmax())
                raise ValueError(
                    f"seq_lens[{b}]={lens[b]} does not grow; legal with rewrite=True: more"
                )
            query_lens = self.current_plan.query_lens
            first = np.minimum(first, lens - (1 if query_lens is None else query_lens))
            why += ", and per query token before"
        num_new = int((lens - first).sum())
        checks.check_index("new_slots", new_slots, self.device, num_new, why)
        checks.check_new_slots(new_slots)
        targets = self._slot_targets(*_positions(first, lens))
        self._executor.write_slots(targets, new_slots.to(self.device))
        self._seq_lens = lens
        self._set_lengths(lens)

    @torch.no_grad()
    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        seq_lens: torch.Tensor | None = None,
        sm_scale: float | None = None,
        logit_cap: float | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        window_left: int = -1,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend one layer's queries under the plan.

        Args:
            q: [B, Hq, D] of ``q_dtype``, or [sum of query_lens, Hq, D], request after request;
                like all tensors here dense in its last dimension.
            k_cache, v_cache: [slots, Hkv, D] and [slots, Hkv, Dv] of ``kv_dtype``; with ``v_in_k``
                the latter is the view ``k_cache[..., :Dv]``.
            out: [B, Hq, Dv] of ``q_dtype`` to write into, a row for each of q; None for a new one.
                Like ``lse`` it shares memory with no other tensor of the call.
            lse: [B, Hq] float32 to write the natural-log lse into, likewise: that of the KV alone,
                without ``sinks``, so that it merges with partial results over other KV.
            return_lse: also return the lse.
            seq_lens: [B] lengths for this call only, at least the planned ones; the slots of
                positions past the lengths in use are read from the ``req_to_token`` given to
                ``plan``. None for the lengths in use: those planned, or of the last
                :meth:`advance`.
            sm_scale, logit_cap: override the wrapper's for this call.
            k_scale, v_scale: dequantisation factors, numbers or device tensors of shape [] or
                [Hkv]; None for 1. The values of a tensor are checked on the CPU alone.
            sinks: [Hq] float32, bfloat16 or float16, contiguous: a logit per query head that takes
                part in the softmax and brings no value, so that the output is what it is without,
                times ``sigmoid(lse - sinks)``. None for none, and so is -inf. The values are
                checked on the CPU alone.
            window_left: not supported; anything but -1 is refused.

        Returns:
            The output [B, Hq, Dv], or (output, lse) with ``return_lse``.

        Raises:
            ValueError: an argument is not legal, nothing has been planned, or the batch size is
                not the planned one.
        """
        plan = self.current_plan
        checks.check_unsupported(window_left)
        shape = (plan.num_rows, self.num_qo_heads, self.head_dim)
        checks.check_tensor("q", q, shape, self.q_dtype, self.device)
        checks.check_row_span("q", q)
        k_shape = (None, self.num_kv_heads, self.head_dim)
        checks.check_tensor("k_cache", k_cache, k_shape, self.kv_dtype, self.device)
        v_shape = (None, self.num_kv_heads, self.v_head_dim)
        checks.check_tensor("v_cache", v_cache, v_shape, self.kv_dtype, self.device)
        checks.check_num_slots(k_cache, v_cache)
        if self.v_in_k:
            checks.check_v_in_k(k_cache, v_cache)
        return_lse = check_flag("return_lse", return_lse)
        scales = {
            name: checks.check_kv_scale(name, scale, self.num_kv_heads, self.device)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        }
        sinks = checks.check_sinks(sinks, self.num_qo_heads, self.device)
        sm_scale = self.sm_scale if sm_scale is None else check_number("sm_scale", sm_scale)
        logit_cap = self.logit_cap if logit_cap is None else checks.check_logit_cap(logit_cap)
        out_shape = (plan.num_rows, self.num_qo_heads, self.v_head_dim)
        given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "sinks": sinks, **scales}
        if out is not None:
            checks.check_tensor("out", out, out_shape, self.q_dtype, self.device)
            checks.check_output("out", out, **given)
        if lse is not None:
            checks.check_tensor("lse", lse, out_shape[:2], torch.float32, self.device)
            checks.check_output("lse", lse, **given, out=out)
        longer: AbstractContextManager[None] = nullcontext()
        if seq_lens is not None:
            lens = self._checked_lengths(seq_lens)
            checks.check_lengths(lens, self._req_to_token.shape[1])
            longer = self._lengths_for_one_call(lens)
        if out is None:
            out = torch.empty(out_shape, dtype=self.q_dtype, device=self.device)
        if lse is None and return_lse:
            lse = torch.empty(out_shape[:2], dtype=torch.float32, device=self.device)
        params = AttentionParams(sm_scale, logit_cap, **scales, sinks=sinks)
        with longer:
            self._executor.run(q, k_cache, v_cache, out, lse, params)
        return (out, lse) if return_lse and lse is not None else out

    def _too_many_partials(self, needed: int) -> ValueError:
        bound, policy = self._planner.max_partials, self._planner.policy_name
        ways_out = f"max_partials={needed} or more for the memory that takes, or {bound} to share"
        better = "" if policy == "pat" else "; policy='pat' needs fewer"
        return ValueError(
            f"max_partials=None allows {bound} partial results, {_PARTIALS_BYTES >> 20} MiB, and "
            f"policy={policy!r} needs {needed} for this batch; legal: {ways_out} nothing{better}"
        )

    def _checked_lengths(self, seq_lens: torch.Tensor) -> IntArray:
        """Lengths on the host, refused where the plan cannot serve them."""
        plan = self.current_plan
        checks.check_index("seq_lens", seq_lens, self.device, plan.batch_size)
        lens = checks.to_host("seq_lens", seq_lens)
        checks.check_planned_lengths(lens, plan.seq_lens, plan.reserved_tail_slots)
        return lens

    @contextmanager
    def _lengths_for_one_call(self, seq_lens: IntArray) -> Iterator[None]:
        """For a ``with`` block, let tails reach to ``seq_lens`` [B] as ``req_to_token`` has them.

        Slots of positions past the lengths in use are read from the table now; others stay.
        """
        executor = self._executor
        range_in_use = executor.slot_range
        requests, positions = _positions(self._seq_lens, seq_lens)
        on_device = (torch.from_numpy(part).to(self.device) for part in (requests, positions))
        request_index, position_index = on_device
        rows = self._req_pool_indices.long()[request_index]
        try:
            slots = self._req_to_token[rows, position_index]
            executor.write_slots(self._slot_targets(requests, positions), slots)
            self._set_lengths(seq_lens)
            yield
        finally:
            executor.slot_range = range_in_use
            self._set_lengths(self._seq_lens)

    def _slot_targets(self, requests: IntArray, positions: IntArray) -> IntArray:
        """Where the slots of tail positions stand in ``kv_slots``."""
        plan = self.current_plan
        return plan.tail_offset[requests] + positions - plan.tail_start[requests]

    def _set_lengths(self, seq_lens: IntArray) -> None:
        self._executor.set_tail_lengths(seq_lens - self.current_plan.tail_start)


def _positions(first: IntArray, end: IntArray) -> tuple[IntArray, IntArray]:
    """Request and position of every token from ``first`` [B] to ``end`` [B]."""
    counts = np.maximum(end - first, 0)
    requests = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(requests)) - np.repeat(np.cumsum(counts) - counts, counts)
    return requests, first[requests] + within


def _check_bound(name: str, bound: int | None) -> int | None:
    return None if bound is None else check_integer(name, bound, most=INT64_MAX)


def _host_rows(
    req_to_token: torch.Tensor, pool_indices: IntArray, width: int
) -> NDArray[np.integer]:
    """The batch's slot rows up to the longest length, on the host."""
    if req_to_token.device.type == "cpu":
        return req_to_token.numpy()[pool_indices, :width]
    if req_to_token.device.type == "meta":
        raise ValueError("req_to_token is on meta, which holds no values; legal: with a forest")
    index = torch.from_numpy(pool_indices).to(req_to_token.device)
    return req_to_token[:, :width].index_select(0, index).cpu().numpy()
