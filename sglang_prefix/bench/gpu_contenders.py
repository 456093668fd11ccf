"""Contenders on a GPU: our Triton executor and other projects' kernels, layers in one CUDA graph.

Plan and copy run on the host in every step, as an engine runs them; all layers are one graph
replay, as engines decode. Layers have KV of their own, as far as it fits, so that it is cold.
"""

from __future__ import annotations

import time

import torch

from sglang_prefix.bench.baselines import (
    Baseline,
    FlashAttention3,
    FlashInferCascade,
    FlashInferDecode,
    SglangTriton,
)
from sglang_prefix.bench.contenders import Contender, ContenderMaker, StepSeconds
from sglang_prefix.bench.graphs import capture
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["BASELINES", "GpuBaseline", "TritonPacked", "find_baselines"]

BASELINES: tuple[type[Baseline], ...] = (
    SglangTriton,
    FlashInferDecode,
    FlashAttention3,
    FlashInferCascade,
)


class TritonPacked(Contender):
    """Our Triton executor under one policy, buffers and launches fixed as in a served graph."""

    kind = "ours"
    executor = "triton"

    def __init__(self, inputs: AttentionInputs, policy: str) -> None:
        super().__init__(inputs)
        self.name = f"triton/{policy}"
        self.policy = policy
        w = inputs
        shape = w.heads.shape(w.q.dtype, w.k.dtype)
        self._attention = PackedAttention(shape, w.q.device, policy=policy)
        plan = self._attention.plan(w.batch.forest())
        self._attention.fix_capacity([plan], w.req_to_token, w.rows, rows=w.batch.batch_size)
        self._attention.load(plan, w.req_to_token, w.rows)
        self.kv_tokens_read, self.num_packs = plan.kv_tokens_read, plan.num_packs
        self._replay = capture(self._layers, w.q.device)

    def first_layer(self) -> torch.Tensor:
        self._run(0)
        return self.inputs.out

    def step(self) -> StepSeconds:
        w = self.inputs
        began = _now(w)
        plan = self._attention.plan(w.batch.forest())
        planned = time.perf_counter()
        self._attention.load(plan, w.req_to_token, w.rows)
        copied = _now(w)
        self._replay()
        ended = _now(w)
        return StepSeconds(ended - began, planned - began, copied - planned, ended - copied)

    def _layers(self) -> None:
        for layer in range(self.inputs.num_layers):
            self._run(layer)

    def _run(self, layer: int) -> None:
        w = self.inputs
        self._attention.run(w.q, w.k[layer], w.v[layer], w.out, sm_scale=w.sm_scale)


class GpuBaseline(Contender):
    """A kernel of another project, with its own metadata once per step."""

    def __init__(self, inputs: AttentionInputs, baseline: type[Baseline]) -> None:
        reason = baseline.inapplicable(inputs)
        if reason:
            raise NotImplementedError(reason)
        super().__init__(inputs)
        self.name = self.executor = baseline.name
        self.kind = "stock" if baseline.stock else "peer"
        if not baseline.stock:  # the cascade reads every level once
            self.kv_tokens_read = inputs.unique_tokens
        self._baseline = baseline(inputs)
        self._baseline.plan()
        self._replay = capture(self._layers, inputs.q.device)

    def first_layer(self) -> torch.Tensor:
        return self._baseline.run(self.inputs.k[0], self.inputs.v[0])

    def step(self) -> StepSeconds:
        began = _now(self.inputs)
        self._baseline.plan()
        planned = _now(self.inputs)
        self._replay()
        ended = _now(self.inputs)
        return StepSeconds(ended - began, plan=planned - began, run=ended - planned)

    def _layers(self) -> None:
        for layer in range(self.inputs.num_layers):
            self._baseline.run(self.inputs.k[layer], self.inputs.v[layer])


def _now(inputs: AttentionInputs) -> float:
    """The host's clock after all work of the device."""
    if inputs.q.device.type == "cuda":
        torch.cuda.synchronize(inputs.q.device)
    return time.perf_counter()


def find_baselines(device: torch.device) -> tuple[dict[str, ContenderMaker], dict[str, str]]:
    """Makers of the baselines that can be imported here, and reasons for the others."""
    reasons = {baseline: baseline.unavailable(device) for baseline in BASELINES}
    makers: dict[str, ContenderMaker] = {
        baseline.name: lambda inputs, baseline=baseline: GpuBaseline(inputs, baseline)  # type: ignore[misc]
        for baseline, reason in reasons.items()
        if reason is None
    }
    absent = {baseline.name: reason for baseline, reason in reasons.items() if reason}
    return makers, absent
