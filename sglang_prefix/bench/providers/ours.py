"""Our executors: compiled code and torch on the CPU, Triton's on a GPU or in its interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch

from prefix_kernels.launches import AUTO, LAUNCH_MODES, MERGE_MODES
from prefix_kernels.torch_executor import merge_blocks, merge_partials
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.providers.base import Provider, ProviderMaker
from sglang_prefix.bench.settings import SETTINGS
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["Chain", "NativeOurs", "TorchOurs", "TritonOurs", "chains", "our_providers"]

_USUAL = (AUTO, AUTO)
# A usual depth. The cost of launches does not depend on the batch.
_CHAIN_LAYERS = 32
# Classes of rows in use, and the policy that leads to it on requests that share a short prefix:
# packs of all of them beside their tails, or their tails alone.
_CHAIN_POLICIES = {"none": "query", "one": "query", "all": "node"}


class _Ours(Provider):
    """A policy on an executor: forest, packs and plan; slots; every layer."""

    kind = "ours"
    takes_latents = takes_queries = True
    step_parts = ("plan", "copy")

    def __init__(self, inputs: AttentionInputs, policy: str, **options: Any) -> None:
        super().__init__(inputs)
        shape = inputs.heads.shape(inputs.q.dtype, inputs.k.dtype)
        self._attention = PackedAttention(
            shape, inputs.q.device, executor=self.executor, policy=policy, **options
        )
        self.plan()
        self.kv_tokens_read = self._plan.kv_tokens_read
        self.facts |= {"policy": policy, "packs": self._plan.num_packs}

    def plan(self) -> None:
        """Pack the batch anew, as the backend does when it changes."""
        w = self.inputs
        self._plan = self._attention.plan(w.batch.forest(), query_lens=w.query_lens)

    def copy(self) -> None:
        """Take the plan into use: copy it, and the slots of its positions."""
        self._attention.load(self._plan, self.inputs.req_to_token, self.inputs.req_pool_indices)

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        self._attention.executor.run(w.q, k, v, w.out, None, w.params)
        return w.out


class NativeOurs(_Ours):
    """The native executor, which serves on a CPU: its merge is a part of its one call."""

    executor = "native"


class TorchOurs(_Ours):
    """The torch executor.

    The merge is a part of its run. It is timed once more after each step, alone, on random
    partials of this plan's shape; what the layers take beyond it is the forward pass.
    """

    executor = "torch"
    parts_alone: ClassVar[Sequence[str]] = ("merge",)

    def __init__(self, inputs: AttentionInputs, policy: str) -> None:
        super().__init__(inputs, policy)
        num_partials, heads = self._plan.num_partials, inputs.heads
        self._partials = (
            torch.full((num_partials, heads.qo, heads.v_dim), 0.5),
            torch.randn(num_partials, heads.qo),
            merge_blocks(self._plan.request_indptr, torch.device("cpu")),
            torch.empty_like(inputs.out),
        )

    def merge(self) -> None:
        """The merges of all layers of a step."""
        for _ in range(self.inputs.num_layers):
            merge_partials(*self._partials)


class TritonOurs(_Ours):
    """The Triton executor in one launch mode and merge mode, launched as in a served graph."""

    executor = "triton"
    parts_alone: ClassVar[Sequence[str]] = ("append",)

    def __init__(
        self,
        inputs: AttentionInputs,
        policy: str,
        mode: str = _USUAL[0],
        merge: str = _USUAL[1],
        **options: Any,
    ) -> None:
        super().__init__(inputs, policy, mode=mode, merge=merge, **options)
        self.facts |= {"mode": mode, "merge": merge}
        tables, size = (inputs.req_to_token, inputs.req_pool_indices), inputs.num_queries
        self._attention.fix_capacity([self._plan], *tables, padded_batch_size=size)
        # The newest tokens again: the same lengths, the same slots.
        self._newest = inputs.newest_slots()

    def append(self) -> None:
        """What a graph does once per step in front of the layers."""
        self._attention.executor.append(self.inputs.seq_lens, self._newest)


class Chain(TritonOurs):
    """Layers that differ in what their launches find to do; nothing is compared.

    "none" minus nothing is the price of empty launches and of the fork and join; the modes differ
    in how many they make.
    """

    kind = "chain"
    parts_alone = ()

    def __init__(
        self, inputs: AttentionInputs, mode: str, merge: str, used: str, *, layers: int
    ) -> None:
        super().__init__(inputs, _CHAIN_POLICIES[used], mode, merge)
        self.layers, self._is_empty = layers, used == "none"

    def copy(self) -> None:
        super().copy()
        if self._is_empty:
            self._attention.work_item_counts().zero_()


def our_providers(
    policies: Sequence[str],
    host: str,
    *,
    compiled: bool = True,
    all_launches: bool = False,
    settings: Sequence[str] = (),
    dry: bool = False,
) -> dict[str, ProviderMaker]:
    """Ours by name, the first policy first.

    Args:
        policies: names.
        host: of those that a provider names.
        compiled: whether the native executor can be had on the CPU. Where it can, the torch
            executor runs the first policy alone, for comparison; else it runs all of them.
        all_launches: on the Triton executor every launch and merge mode of the first policy, too,
            and every launch mode of the others.
        settings: names of :data:`SETTINGS`, with each of which the Triton executor runs the first
            policy, too.
        dry: no other policy than the first one in other modes.
    """
    if host == "cpu":
        native, plain = (policies, policies[:1]) if compiled else ([], policies)
        return {
            **{f"native/{policy}": partial(NativeOurs, policy=policy) for policy in native},
            **{f"torch/{policy}": partial(TorchOurs, policy=policy) for policy in plain},
        }
    makers: dict[str, ProviderMaker] = {
        f"triton/{policy}": partial(TritonOurs, policy=policy) for policy in policies
    }
    first = policies[0]
    variants = product(policies, LAUNCH_MODES, MERGE_MODES) if all_launches else ()
    for policy, mode, merge in variants:
        if policy == first or (merge == MERGE_MODES[0] and not dry):
            name = f"triton/{policy}/{mode}/{merge}"
            makers[name] = partial(TritonOurs, policy=policy, mode=mode, merge=merge)
    for name in settings:
        makers[f"triton/{first}/{name}"] = partial(TritonOurs, policy=first, **SETTINGS[name])
    return makers


def chains(*, dry: bool) -> dict[str, ProviderMaker]:
    """All of :class:`Chain`, by name."""
    layers = 1 if dry else _CHAIN_LAYERS
    return {
        f"chain/{mode}/{merge}/{used}": partial(
            Chain, mode=mode, merge=merge, used=used, layers=layers
        )
        for mode, merge, used in product(LAUNCH_MODES, MERGE_MODES, _CHAIN_POLICIES)
    }
