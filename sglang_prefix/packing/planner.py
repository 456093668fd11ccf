"""From a forest to a plan: the one planner that the wrapper and the backend share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.arguments import INT64_MAX, check_integer, check_integers, refusal
from sglang_prefix.forest import PrefixForest, RadixPath
from sglang_prefix.packing import (
    CPU_PROFILES,
    GPU_PROFILE,
    AttentionShape,
    CostModel,
    DeviceProfile,
    policy_named,
)
from sglang_prefix.packing.gpu import H200_BYTES_PER_S, gpu_profile
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.packs import Packs
from sglang_prefix.packing.splits import choose_num_splits

if TYPE_CHECKING:
    from prefix_kernels.executor import PlanExecutor

__all__ = ["RESERVED_TAIL_SLOTS", "PackPlanner", "check_query_lens", "planner_for", "warm_up"]

IntArray = NDArray[np.int64]

# Tokens that a tail may grow by before its slots need a new plan. At 8 bytes a slot, 256 requests
# cost 0.5 MB; at one token a step a plan lives for at most this many steps.
RESERVED_TAIL_SLOTS = 256


def planner_for(
    executor: PlanExecutor, read_bytes_per_s: float = H200_BYTES_PER_S, **options: Any
) -> PackPlanner:
    """A planner of plans for an executor.

    Args:
        executor: what runs them.
        read_bytes_per_s: bandwidth of its device; the CPU's profiles are ratios to that.
        options: of :class:`PackPlanner`.
    """
    setting = executor.launch_setting
    if setting is None:
        return PackPlanner(executor.shape, CPU_PROFILES[executor.name], **options)

    def batch_profile(padded_batch_size: int) -> DeviceProfile:
        return gpu_profile(setting, read_bytes_per_s, padded_batch_size=padded_batch_size)

    return PackPlanner(
        executor.shape,
        gpu_profile(setting, read_bytes_per_s),
        batch_profile=batch_profile,
        **options,
    )


@cache
def warm_up() -> None:
    """Compile every loop of planning, or load its machine code; the first planner does it.

    Some 8 s of one core (numba 0.65) where nothing is cached yet, which is once per installation
    if there is a place to write to, else 0.6 s; see :func:`sglang_prefix.jit.jit`.
    """
    forest = PrefixForest.from_paths([RadixPath((1,), (4,))] * 2, [4, 4], [5, 5])
    costs = CostModel(AttentionShape(1, 1, 1, 1, 1, 1), GPU_PROFILE)
    packs = policy_named("pat")(forest, costs)
    num_splits = choose_num_splits(packs, forest.seq_lens, costs)
    plan = CostedPlan.build(
        packs, forest.seq_lens, num_splits, reserved_tail_slots=0, kv_tokens_unique=0, costs=costs
    )
    plan.stats()


class PackPlanner:
    """Makes plans for one attention shape, one device and one policy.

    The first one of a process calls :func:`warm_up`.

    Args:
        shape: heads, head dims and item sizes of the layers served.
        device: profile that the cost model uses.
        policy: name of the packing policy.
        max_partials: upper bound on a plan's partials; None for no bound. A plan over it loses
            its splits first and its sharing next, so a bound of at least the batch size always
            holds. Nothing of the size of the refused plan is made.
        reserved_tail_slots: tokens that each tail may grow by.
        batch_profile: the profile for batches of a padded size, where launches follow from that;
            None for ``device`` at all sizes.

    Raises:
        ValueError: the policy is unknown, or a number is no integer that it can be.
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: DeviceProfile,
        *,
        policy: str = "pat",
        max_partials: int | None = None,
        reserved_tail_slots: int = RESERVED_TAIL_SLOTS,
        batch_profile: Callable[[int], DeviceProfile] | None = None,
    ) -> None:
        self.costs = CostModel(shape, device)
        self._batch_profile = batch_profile
        self._batch_costs: dict[int, CostModel] = {}
        self.policy_name = policy
        if max_partials is not None:
            max_partials = check_integer("max_partials", max_partials, most=INT64_MAX)
        self.max_partials = max_partials
        self.reserved_tail_slots = check_integer("reserved_tail_slots", reserved_tail_slots, 0)
        self._policy = policy_named(policy)
        warm_up()
        self._query_policy = policy_named("query")

    def costs_of(self, padded_batch_size: int | None) -> CostModel:
        """The costs of batches of a padded size; None for any.

        Raises:
            ValueError: the size is no positive integer.
        """
        if padded_batch_size is None:
            return self.costs
        padded_batch_size = check_integer("padded_batch_size", padded_batch_size)
        if self._batch_profile is None:
            return self.costs
        found = self._batch_costs.get(padded_batch_size)
        if found is None:
            found = CostModel(self.costs.shape, self._batch_profile(padded_batch_size))
            self._batch_costs[padded_batch_size] = found
        return found

    def plan(
        self,
        forest: PrefixForest,
        padded_batch_size: int | None = None,
        *,
        query_lens: IntArray | None = None,
    ) -> CostedPlan:
        """Pack a forest and lay the plan out, within the bound on partials.

        Args:
            forest: what the batch shares. What it says of positions of query tokens counts as
                private where a request may have several: ``query_lens``.
            padded_batch_size: rows of q, which are requests where each has one query token, with
                the padding behind them; None where that is no matter.
            query_lens: [B] int64, query tokens of each request, its last ones; None for one each,
                which a plan for ones everywhere says, too.

        Raises:
            ValueError: the batch has more queries than partials are allowed, or an argument is
                none that it can be.
        """
        if not isinstance(forest, PrefixForest):
            raise refusal("forest", forest, "a PrefixForest")
        num_rows = forest.batch_size
        if query_lens is not None:
            query_lens = check_query_lens(query_lens, forest.seq_lens)
            num_rows = int(query_lens.sum())
            forest = forest.limited_to(forest.seq_lens - query_lens * (query_lens > 1))
            query_lens = query_lens if num_rows > forest.batch_size else None
        if self.max_partials is not None and num_rows > self.max_partials:
            raise ValueError(
                f"max_partials={self.max_partials} is below the {num_rows} queries of the batch; "
                "legal: at least one partial per request, or per query token if it has several"
            )
        costs = self.costs_of(padded_batch_size)
        packs = self._policy(forest, costs, query_lens)
        if query_lens is not None:
            packs = packs.of_rows(query_lens)
        least = len(packs.queries) + num_rows  # without splits: one per pack and query
        if not self._allows(least):
            private = self._query_policy(forest, costs, query_lens)
            return self._lay_out(
                private, forest, costs, query_lens, split=False, refused_partials=least
            )
        plan = self._lay_out(packs, forest, costs, query_lens, split=True)
        if self._allows(plan.num_partials):
            return plan
        return self._lay_out(packs, forest, costs, query_lens, split=False)

    def _allows(self, num_partials: int) -> bool:
        return self.max_partials is None or num_partials <= self.max_partials

    def _lay_out(
        self,
        packs: Packs,
        forest: PrefixForest,
        costs: CostModel,
        query_lens: IntArray | None,
        *,
        split: bool,
        refused_partials: int = 0,
    ) -> CostedPlan:
        if split:
            num_splits = choose_num_splits(packs, forest.seq_lens, costs, query_lens)
        else:
            num_splits = np.ones(len(packs.start) + forest.batch_size, dtype=np.int64)
        return CostedPlan.build(
            packs,
            forest.seq_lens,
            num_splits,
            reserved_tail_slots=self.reserved_tail_slots,
            kv_tokens_unique=forest.unique_tokens,
            costs=costs,
            refused_partials=refused_partials,
            query_lens=query_lens,
        )


def check_query_lens(query_lens: Any, seq_lens: IntArray) -> IntArray:
    """Query tokens of each request: at least one, and no more than it has tokens.

    Raises:
        ValueError: they are none of these; the message names ``query_lens``.
    """
    found = check_integers("query_lens", query_lens, -INT64_MAX, INT64_MAX, size=len(seq_lens))
    bad = np.flatnonzero((found < 1) | (found > seq_lens))
    if len(bad):
        b = bad[0]
        raise ValueError(
            f"query_lens[{b}]={found[b]}; legal: 1 to {seq_lens[b]}, the tokens of the request"
        )
    return np.array(found)
