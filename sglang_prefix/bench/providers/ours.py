"""Our executors: the torch executor on the CPU, Triton's on a GPU or in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from prefix_kernels.tiles import LAUNCH_MODES, MERGE_MODES
from prefix_kernels.torch_executor import merge_partials
from sglang_prefix.bench.graphs import launches_of
from sglang_prefix.bench.packed_attention import PackedAttention, work_item_counts
from sglang_prefix.bench.providers.base import Provider, ProviderMaker
from sglang_prefix.bench.workloads.inputs import AttentionInputs
from sglang_prefix.packing.layout import CostedPlan

__all__ = ["Chain", "TorchOurs", "TritonOurs", "all_launches", "chains", "our_providers"]

# A usual depth; launches cost what they cost, whatever is attended to.
_CHAIN_LAYERS = 32
# Classes of rows in use, and the policy that leads to it on requests that share a short prefix:
# packs of all of them beside their tails, or their tails alone.
_CHAIN_POLICIES = {"none": "query", "one": "query", "all": "node", "fitted": "query"}


class _Ours(Provider):
    """A policy on an executor: forest, packs and plan; slots; every layer."""

    kind = "ours"
    step_parts = ("plan", "copy")

    def __init__(self, inputs: AttentionInputs, policy: str, **options: Any) -> None:
        super().__init__(inputs)
        self.name, self.policy = f"{self.executor}/{policy}", policy
        shape = inputs.heads.shape(inputs.q.dtype, inputs.k.dtype)
        self._attention = PackedAttention(
            shape, inputs.q.device, executor=self.executor, policy=policy, **options
        )
        self._plan = self._attention.plan(inputs.batch.forest())
        self.num_packs = self._plan.num_packs

    @property
    def kv_tokens_read(self) -> int:
        """KV tokens that the plan's packs read."""
        return self._plan.kv_tokens_read

    def plan(self) -> None:
        """Pack the batch anew, as the backend does when it changes."""
        self._plan = self._attention.plan(self.inputs.batch.forest())

    def copy(self) -> None:
        """Take the plan into use: copy it, and the slots of its positions."""
        self._attention.load(self._plan, self.inputs.req_to_token, self.inputs.req_pool_indices)

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        self._attention.executor.run(w.q, k, v, w.out, None, w.params)
        return w.out


class TorchOurs(_Ours):
    """The torch executor.

    The merge is a part of its run. It is timed once more after each step, alone, on random
    partials of this plan's shape; what the layers take beyond it is the forward pass.
    """

    executor = "torch"
    parts_alone = ("merge",)

    def __init__(self, inputs: AttentionInputs, policy: str) -> None:
        super().__init__(inputs, policy)
        self._partials = _random_partials(self._plan, inputs)

    def merge(self) -> None:
        """The merges of all layers of a step."""
        for _ in range(self.inputs.num_layers):
            merge_partials(*self._partials)


def _random_partials(
    plan: CostedPlan, inputs: AttentionInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    heads, indptr = inputs.heads, plan.request_indptr
    return (
        torch.empty(plan.num_partials, heads.qo, heads.v_dim).fill_(0.5),
        torch.randn(plan.num_partials, heads.qo),
        torch.from_numpy(indptr),
        int((indptr[1:] - indptr[:-1]).max()),
        torch.empty_like(inputs.out),
    )


class TritonOurs(_Ours):
    """The Triton executor in one launch mode and merge mode.

    Args:
        inputs: of the case.
        policy, mode, merge: names.
        fixed: buffers and launches as in a served graph; else fitted to the plan.
        is_usual: whether these modes are the usual ones, which the name then leaves out.
    """

    executor = "triton"
    parts_alone: tuple[str, ...] = ("append",)

    def __init__(
        self,
        inputs: AttentionInputs,
        policy: str,
        mode: str = "streams",
        merge: str = "launch",
        *,
        fixed: bool = True,
        is_usual: bool = True,
    ) -> None:
        super().__init__(inputs, policy, mode=mode, merge=merge)
        self.launch = {"mode": mode, "merge": merge, "fixed": fixed}
        if not is_usual:
            self.name += f"/{mode}/{merge}" + ("" if fixed else "/fitted")
        w = inputs
        if fixed:
            self._attention.fix_capacity(
                [self._plan],
                w.req_to_token,
                w.req_pool_indices,
                padded_batch_size=w.batch.batch_size,
            )
        # The newest token again: the same lengths, the same slots.
        self._newest = w.newest_slots()

    def append(self) -> None:
        """What a graph does once per step in front of the layers."""
        self._attention.executor.append(self.inputs.seq_lens, self._newest)


class Chain(TritonOurs):
    """Layers that differ in what their launches find to do; nothing is compared.

    "none" minus nothing is the price of empty launches and of the fork and join; the modes differ
    in how many they make. "fitted" launches what one class needs and nothing else.

    Attributes:
        launches: of one layer: kernel, grid, rows of a tile.
    """

    kind = "chain"
    parts_alone: tuple[str, ...] = ()

    def __init__(
        self, inputs: AttentionInputs, mode: str, merge: str, used: str, *, layers: int
    ) -> None:
        super().__init__(inputs, _CHAIN_POLICIES[used], mode, merge, fixed=used != "fitted")
        self.name, self.layers = f"chain/{mode}/{merge}/{used}", layers
        self._is_empty = used == "none"
        self.copy()
        self.launches = [
            " ".join(
                (
                    kernel.__name__,
                    "x".join(map(str, grid)),
                    f"rows {arguments['BLOCK_M']}" if "BLOCK_M" in arguments else "",
                )
            ).strip()
            for kernel, grid, arguments in launches_of(lambda: self.run(inputs.k[0], inputs.v[0]))
        ]

    def facts(self) -> dict[str, Any]:
        return {"launches": self.launches}

    def copy(self) -> None:
        super().copy()
        if self._is_empty:
            work_item_counts(self._attention.executor).zero_()


def our_providers(
    policies: Sequence[str], host: str, launches: Sequence[tuple[str, str, str, bool]] = ()
) -> dict[str, ProviderMaker]:
    """Ours by name, the first policy first.

    Args:
        policies: names.
        host: of :data:`~sglang_prefix.bench.providers.base.HOSTS`.
        launches: policy, launch mode, merge mode and whether buffers are fixed, of more variants of
            the Triton executor.
    """
    if host == "cpu":
        return {f"torch/{p}": partial(TorchOurs, policy=p) for p in policies}
    makers: dict[str, ProviderMaker] = {
        f"triton/{policy}": partial(TritonOurs, policy=policy) for policy in policies
    }
    for policy, mode, merge, fixed in launches:
        name = f"triton/{policy}/{mode}/{merge}" + ("" if fixed else "/fitted")
        makers[name] = partial(
            TritonOurs, policy=policy, mode=mode, merge=merge, fixed=fixed, is_usual=False
        )
    return makers


def all_launches(
    policies: Sequence[str], *, dry: bool, fitted: bool
) -> Iterator[tuple[str, str, str, bool]]:
    """Every launch and merge mode of the first policy, every launch mode of the others.

    The usual modes with fixed buffers are left out: they have their provider anyway.

    Args:
        policies: names.
        dry: no other policy than the first one in other modes.
        fitted: the first one with launches fitted to the plan, too, which are compiled for every
            length of pack.
    """
    first, *others = policies
    usual = (LAUNCH_MODES[0], MERGE_MODES[0])
    for mode in LAUNCH_MODES:
        for merge in MERGE_MODES:
            if (mode, merge) != usual:
                yield first, mode, merge, True
    for policy in () if dry else others:
        for mode in LAUNCH_MODES[1:]:
            yield policy, mode, MERGE_MODES[0], True
    if fitted:
        yield first, *usual, False


def chains(*, dry: bool) -> dict[str, ProviderMaker]:
    """All of :class:`Chain`, by name."""
    return {
        f"chain/{mode}/{merge}/{used}": partial(
            Chain, mode=mode, merge=merge, used=used, layers=1 if dry else _CHAIN_LAYERS
        )
        for mode in LAUNCH_MODES
        for merge in MERGE_MODES
        for used in _CHAIN_POLICIES
    }
