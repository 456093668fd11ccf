"""Extends over cached prefixes: our backend on SGLang's own pools and batches, without an engine.

In a real engine: test_engines.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from prefix_kernels.executor import PlanExecutor
from sglang_prefix.backend.extend_planner import pays
from sglang_prefix.config import PrefixConfig
from sglang_prefix.explain.record import PlanRecord
from sglang_prefix.explain.segments import explain
from sglang_prefix.packing.planner import PackPlanner
from tests.engine.bare_backend import HEAD_DIM, NUM_KV_HEADS, NUM_QO_HEADS, make_layer, make_runner
from tests.scheduling import make_forward_batch

SHARED, OWN = 200, 30  # tokens that rows of the table have in common, and further ones of each
TOLERANCE = 2e-5


class Extends:
    """Six requests over real pools, of which all KV has been written, and two layers."""

    def __init__(self, *, verify: bool = True, **settings: Any) -> None:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        from sglang_prefix.backend.backend import PrefixAttnBackend

        self.layers = [make_layer(i) for i in range(2)]
        runner = make_runner(self.layers, context_len=512)
        self.table, pool = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool
        slots = torch.randperm(1999)[: SHARED + 6 * OWN] + 1
        for row in range(6):
            own = slots[SHARED + row * OWN :][:OWN]
            self.table[row, : SHARED + OWN] = torch.cat((slots[:SHARED], own)).int()
        for layer in self.layers:
            pool.set_kv_buffer(layer, slots, *torch.randn(2, len(slots), NUM_KV_HEADS, HEAD_DIM))
        self.stock = TorchNativeAttnBackend(runner)
        config = PrefixConfig(verify=verify, **settings)
        self.backend: Any = PrefixAttnBackend(runner, self.stock, "torch_native", config)

    def batch(self, prefixes: Sequence[int], counts: Sequence[int], mode: str = "EXTEND") -> Any:
        """A pass over ``counts`` new tokens of each request behind what is cached."""
        lens = [p + n for p, n in zip(prefixes, counts, strict=True)]
        new = [self.table[row, p:n] for row, (p, n) in enumerate(zip(prefixes, lens, strict=True))]
        batch = make_forward_batch(mode, range(len(lens)), lens, torch.cat(new).tolist())
        batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu = [*prefixes], [*counts]
        batch.extend_prefix_lens = torch.tensor(prefixes)
        batch.extend_seq_lens = torch.tensor(counts)
        return batch

    def run(self, batch: Any, *, prepared: Any = None) -> bool:
        """Run a pass and compare it with stock; whether it counts as packed."""
        before = self.report["packed_steps"]
        self.backend.init_forward_metadata(batch if prepared is None else prepared)
        for layer in self.layers:
            num_tokens = len(batch.out_cache_loc)
            q = torch.randn(num_tokens, NUM_QO_HEADS * HEAD_DIM)
            k, v = torch.randn(2, num_tokens, NUM_KV_HEADS, HEAD_DIM)
            found = self.backend.forward(q, k, v, layer, batch)
            expected = self.stock.forward(q, None, None, layer, batch, False)
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        return bool(self.report["packed_steps"] > before)

    @property
    def report(self) -> Any:
        """What was counted of extends, the pass under way included, and of nothing else."""
        report = self.backend._report()
        assert report["packed_steps"] == report["stock_steps"] == report["fallback_steps"] == 0
        return report["extend"]


def test_what_is_packed() -> None:
    """What it is compared with, stock's extend, reads the KV that ours has written."""
    extends = Extends()
    assert extends.run(extends.batch([SHARED] * 6, [1, 2, 5, 9, 20, 30]))
    assert extends.run(extends.batch([SHARED + 29] * 3 + [0], [1, 1, 1, 7], "MIXED"))
    assert extends.run(extends.batch([64, 128, 192], [9, 8, 16]))  # chunks of one prompt
    assert not extends.run(extends.batch([0] * 4, [40, 20, 1, 60]))
    assert not extends.run(extends.batch([10, 20], [150, 60]))
    report = extends.report
    assert (report["packed_steps"], report["plans"]) == (3, 3)
    assert (report["stock_reasons"], report["fallback_steps"]) == ({"gate-no-gain": 2}, 0)


def test_what_the_torch_executor_packs() -> None:
    """The same, but for few tokens."""
    extends = Extends(executor="torch")
    assert extends.run(extends.batch([SHARED] * 6, [1, 2, 5, 9, 20, 30]))
    assert extends.run(extends.batch([SHARED + 29] * 3 + [0], [1, 1, 1, 7], "MIXED"))
    assert not extends.run(extends.batch([64, 128, 192], [9, 8, 16]))
    assert not extends.run(extends.batch([0] * 4, [40, 20, 1, 60]))
    report = extends.report
    assert (report["packed_steps"], report["stock_reasons"]) == (2, {"gate-no-gain": 2})


def test_what_was_read_is_counted_for_one_layer() -> None:
    """The prefix once, and what each request has behind it; of new tokens that are cached none."""
    extends = Extends(policy="node")
    assert extends.run(extends.batch([SHARED] * 3, [4, 5, 6]))
    report = extends.report
    assert (report["kv_tokens_read"], report["kv_tokens_logical"]) == (SHARED + 15, 3 * SHARED + 15)
    assert report["kv_read_ratio"] == (SHARED + 15) / (3 * SHARED + 15)
    assert (report["num_packs"], report["num_partials"]) == (4, 30)
    assert not extends.run(extends.batch([0] * 3, [4, 5, 6]))
    assert extends.report["kv_tokens_read"] == SHARED + 15


def test_the_plan_of_an_extend_is_shown_with_its_query_tokens() -> None:
    extends = Extends(keep_plan=True)
    counts = [1, 2, 5, 9, 20, 30]
    assert extends.run(extends.batch([SHARED] * 6, counts))
    record = PlanRecord.from_dict(extends.backend._report()["last_plan"])
    assert record.source == "last plan of a running server, an extend"
    assert record.query_lens == counts
    (group,) = extends.backend._planner.groups
    explanation = explain(record)
    assert explanation.plan.same_as(group.executor.plan)
    assert [segment.num_queries for segment in explanation.segments] == [sum(counts), *counts]


def test_a_pass_that_was_not_prepared_is_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    extends = Extends()
    runs: list[Any] = []
    run = PlanExecutor.run
    monkeypatch.setattr(PlanExecutor, "run", lambda *args: runs.append(run(*args)))
    first, second = (extends.batch([SHARED] * 2, counts) for counts in ([3, 4], [4, 3]))
    assert not extends.run(second, prepared=first)
    assert not runs
    assert extends.report["fallback_reasons"] == {"other-batch": 1}
    assert extends.run(first, prepared=first)
    assert len(runs) == len(extends.layers)


def test_graphs_of_all_but_attention_run_a_copy_of_the_batch() -> None:
    extends = Extends()
    batch = extends.batch([SHARED] * 2, [3, 4])
    assert extends.run(copy.copy(batch), prepared=batch)


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND_V2", "DLLM_EXTEND"])
def test_passes_of_other_kinds_are_stocks(mode: str) -> None:
    extends = Extends()
    batch = extends.batch([SHARED] * 2, [3, 4], mode)
    extends.backend.init_forward_metadata(batch)
    assert extends.report["packed_steps"] == 0
    batch = extends.batch([SHARED] * 2, [3, 4])
    batch.spec_info = object()
    extends.backend.init_forward_metadata(batch)
    assert extends.report["packed_steps"] == 0


def test_a_closed_gate_and_the_interpreter_leave_extends_to_stock() -> None:
    left: list[dict[str, Any]] = [{"gate": "never"}, {"executor": "triton"}]
    for settings in left:
        extends = Extends(**settings)
        assert not extends.run(extends.batch([SHARED] * 6, [1, 2, 5, 9, 20, 30]))


def test_more_queries_than_partials_are_a_fallback_and_more_packs_lose_their_sharing() -> None:
    extends = Extends(workspace_mib=1, policy="node")
    (group,) = extends.backend._planner.groups
    most = group.planner.max_partials
    # A partial of the shared pack and one of the tail for each query: too many by a few.
    count = most // 2 // 6 + 1
    assert extends.run(extends.batch([150] * 6, [count] * 6))
    assert group.executor.plan.refused_partials > most
    assert group.executor.plan.num_shared_packs == 0
    assert not extends.run(extends.batch([145] * 6, [most // 6 + 1] * 6))
    assert extends.report["fallback_reasons"] == {"workspace": 1}


@pytest.mark.parametrize("broken", ["PackPlanner.plan", "PlanExecutor.run"])
def test_failures_are_errors_and_no_packed_extends(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"PackPlanner": PackPlanner, "PlanExecutor": PlanExecutor}[broken.split(".")[0]]
    extends = Extends(verify=False)
    with monkeypatch.context() as patch:
        patch.setattr(owner, broken.split(".")[1], lambda *_, **__: 1 // 0)
        for _ in range(2):
            assert not extends.run(extends.batch([SHARED] * 2, [3, 4]))
    assert extends.report["fallback_reasons"] == {"error": 2}
    assert extends.run(extends.batch([SHARED] * 2, [3, 4]))


def test_calls_with_other_queries_and_models_without_layers_are_stocks() -> None:
    extends = Extends()
    batch = extends.batch([SHARED] * 2, [3, 4])
    extends.backend.init_forward_metadata(batch)
    batch.out_cache_loc = torch.cat((batch.out_cache_loc, torch.zeros(2, dtype=torch.int64)))
    k, v = torch.randn(2, 9, NUM_KV_HEADS, HEAD_DIM)
    extends.backend.forward(torch.randn(9, NUM_QO_HEADS * HEAD_DIM), k, v, extends.layers[0], batch)
    assert extends.report["fallback_reasons"] == {"other-batch": 1}
    batch = extends.batch([SHARED] * 2, [3, 4])
    extends.backend.init_forward_metadata(batch)
    for layer in extends.layers:
        extends.backend._delegate(layer, "unknown-argument", {})
    assert extends.report["fallback_reasons"] == {"other-batch": 1, "no-layer": 1}
    assert not extends.run(batch)
    assert extends.report["packed_steps"] == 0


def test_lengths_that_do_not_add_up_are_stocks() -> None:
    extends = Extends()
    for lens in (None, torch.tensor([SHARED + 3, SHARED + 5]), torch.tensor([SHARED + 3])):
        batch = extends.batch([SHARED] * 2, [3, 4])
        batch.seq_lens_cpu = lens
        assert not extends.run(batch)
    for prefixes, counts in (([SHARED] * 3, [3, 4]), ([SHARED + 3, SHARED], [0, 4])):
        batch = extends.batch([SHARED] * 2, [3, 4])
        batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu = prefixes, counts
        extends.backend.init_forward_metadata(batch)
    assert extends.report["packed_steps"] == 0
    assert extends.report["fallback_reasons"] == {"query-lengths": 5}


def test_a_backend_around_ours_runs_our_extends(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend

    extends = Extends()
    hybrid: Any = object.__new__(HybridLinearAttnBackend)
    hybrid.full_attn_backend, hybrid.full_attn_layers = extends.backend, [0, 1]
    runs: list[Any] = []
    run = PlanExecutor.run
    monkeypatch.setattr(PlanExecutor, "run", lambda *args: runs.append(run(*args)))
    batches = [extends.batch([SHARED] * 2, counts) for counts in ([3, 4], [4, 3])]
    for batch, num_runs in zip(batches, (2, 2), strict=True):
        extends.backend.init_forward_metadata(batches[0])
        for layer in extends.layers:
            q = torch.randn(7, NUM_QO_HEADS * HEAD_DIM)
            k, v = torch.randn(2, 7, NUM_KV_HEADS, HEAD_DIM)
            found = hybrid.forward(q=q, k=k, v=v, layer=layer, forward_batch=batch)
            expected = extends.stock.forward(q, None, None, layer, batch, False)
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        assert len(runs) == num_runs
    assert extends.report["packed_steps"] == 1
    assert extends.report["fallback_reasons"] == {"other-batch": 1}


def test_which_passes_pay() -> None:
    def pay(prefixes: Sequence[int], counts: Sequence[int]) -> bool:
        return pays(np.array(prefixes) + np.array(counts), np.array(counts))

    assert pay([2000] * 32, [20] * 32)
    assert pays(np.array([1000]), np.array([100]), 400_000)
    assert not pays(np.array([1000]), np.array([100]), 410_000)  # 405,450 fewer
    assert pay([1000], [1000])  # 1.33 times fewer pairs
    assert not pay([400], [1000])  # 1.09 times
    assert not pay([0, 0], [10, 1000])
