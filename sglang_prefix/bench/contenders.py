"""What `bench kernel` times: our executors under every policy, and the stock kernels that are here.

Each contender runs whole decode steps: what it does once per step, then every layer.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from prefix_kernels.executor import AttentionParams
from prefix_kernels.torch_executor import TorchExecutor, merge_partials
from prefix_patches.stock_backend import torch_native_decode
from sglang_prefix.bench.workloads.inputs import AttentionInputs
from sglang_prefix.packing import CPU_PROFILE
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.planner import PackPlanner

__all__ = ["STOCK_ON_CPU", "Contender", "StepSeconds", "TorchNative", "TorchPacked", "find_stock"]

STOCK_ON_CPU = "sglang-torch-native"
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Time of one decode step and of its parts; None for a part that there is not.

    ``merge`` is timed after the step, on partials of the same shape; see :class:`TorchPacked`.
    """

    total: float
    plan: float | None = None
    copy: float | None = None
    run: float | None = None
    merge: float | None = None


class Contender(ABC):
    """An attention kernel, prepared for one batch.

    Attributes:
        name: unique in a cell.
        kind: "ours", "stock" (SGLang would use it) or "peer".
        executor: what runs it.
        policy: of our packing; None for others.
        kv_tokens_read: KV tokens that it reads per layer.
        num_packs: None for others than ours.
    """

    name: str
    kind: str
    executor: str
    policy: str | None = None
    num_packs: int | None = None
    kv_tokens_read: int

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs
        self.kv_tokens_read = inputs.logical_tokens

    @abstractmethod
    def first_layer(self) -> torch.Tensor:
        """Output [B, Hq, Dv] of the first layer, for the check."""

    @abstractmethod
    def step(self) -> StepSeconds:
        """Time one decode step: what is done once, then all layers."""


class TorchNative(Contender):
    """SGLang's ``torch_native`` decode: a loop over requests; it keeps nothing between layers."""

    name = STOCK_ON_CPU
    kind = "stock"
    executor = "torch"

    def __init__(self, inputs: AttentionInputs, decode: Callable[..., None]) -> None:
        super().__init__(inputs)
        self._decode = decode

    def first_layer(self) -> torch.Tensor:
        self._run(0)
        return self.inputs.out

    def step(self) -> StepSeconds:
        began = time.perf_counter()
        for layer in range(self.inputs.num_layers):
            self._run(layer)
        took = time.perf_counter() - began
        return StepSeconds(took, run=took)

    def _run(self, layer: int) -> None:
        w = self.inputs
        self._decode(
            w.q, w.out, w.k[layer], w.v[layer], w.req_to_token, w.rows, w.seq_lens, w.sm_scale
        )


class TorchPacked(Contender):
    """Our torch executor under one policy: forest, packs and layout; slots; every layer.

    The merge is a part of the executor's run. It is timed once more after each step, alone, on
    random partials of this plan's shape; what the layers take beyond it is the forward pass.
    """

    kind = "ours"
    executor = "torch"

    def __init__(self, inputs: AttentionInputs, policy: str) -> None:
        super().__init__(inputs)
        self.name = f"torch/{policy}"
        self.policy = policy
        shape = inputs.heads.shape(inputs.q.dtype, inputs.k.dtype)
        self._planner = PackPlanner(shape, CPU_PROFILE, policy=policy)
        self._executor = TorchExecutor(shape, inputs.q.device)
        plan = self._plan()
        self._load(plan)
        self.kv_tokens_read, self.num_packs = plan.kv_tokens_read, plan.num_packs
        self._merge = _MergeAlone(plan, inputs)

    def first_layer(self) -> torch.Tensor:
        self._run(0)
        return self.inputs.out

    def step(self) -> StepSeconds:
        times = [time.perf_counter()]
        plan = self._plan()
        times.append(time.perf_counter())
        self._load(plan)
        times.append(time.perf_counter())
        for layer in range(self.inputs.num_layers):
            self._run(layer)
        times.append(time.perf_counter())
        for _ in range(self.inputs.num_layers):
            self._merge()
        began, planned, copied, ended, merged = *times, time.perf_counter()
        return StepSeconds(
            ended - began, planned - began, copied - planned, ended - copied, merged - ended
        )

    def _plan(self) -> CostedPlan:
        return self._planner.plan(self.inputs.batch.forest())

    def _load(self, plan: CostedPlan) -> None:
        self._executor.load(plan, self.inputs.req_to_token, self.inputs.rows)

    def _run(self, layer: int) -> None:
        w = self.inputs
        params = AttentionParams(w.sm_scale)
        self._executor.run(w.q, w.k[layer], w.v[layer], w.out, None, params)


class _MergeAlone:
    """The merge of one plan on random partials, into an output of its own."""

    def __init__(self, plan: CostedPlan, inputs: AttentionInputs) -> None:
        heads = inputs.heads
        self._lse = torch.randn(plan.num_partials, heads.qo)
        self._out = torch.empty(plan.num_partials, heads.qo, heads.v_dim).fill_(0.5)
        self._indptr = torch.from_numpy(plan.request_indptr)
        self._width = int((plan.request_indptr[1:] - plan.request_indptr[:-1]).max())
        self._merged = torch.empty_like(inputs.out)

    def __call__(self) -> None:
        merge_partials(self._out, self._lse, self._indptr, self._width, self._merged)


ContenderMaker = Callable[[AttentionInputs], Contender]


def find_stock(device: torch.device) -> tuple[dict[str, ContenderMaker], dict[str, str]]:
    """Stock and peer kernels: how to make those that are here, and why others are absent.

    Imports SGLang, which takes seconds.

    Returns:
        Makers by name, which raise ``NotImplementedError`` where one cannot run a batch; reasons
        by name.
    """
    # Not at the top: it needs Triton, which takes a second to import.
    from sglang_prefix.bench.gpu_contenders import BASELINES, find_baselines

    if device.type == "cuda":
        makers, absent = find_baselines(device)
        return makers, absent | {STOCK_ON_CPU: "SGLang's CPU backend; the device is a GPU"}
    absent = {baseline.name: NEEDS_GPU for baseline in BASELINES}
    absent["sglang-intel-amx"] = "needs sgl_kernel's AMX kernels; this command does not call them"
    try:
        decode = torch_native_decode()
    except Exception as error:  # SGLang raises what it likes when it loads
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return {}, {STOCK_ON_CPU: reason} | absent
    return {STOCK_ON_CPU: lambda inputs: TorchNative(inputs, decode)}, absent
