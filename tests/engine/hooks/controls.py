"""Modes: what a test breaks, or decides, in the processes of an engine that runs.

``SGLANG_PREFIX_TEST_MODE_FILE`` names a file that holds the mode of the moment, so that one engine
serves all controls. Replaced are, among others, ``PlanExecutor.run``, ``DecodePlanner.prepare`` and
``decide_ahead``, ``PackPlanner.plan``, ``ScheduleContext.push`` and ``launch``; all are public but
``Client._ready``, which comes before each workload of ``bench serving``.

===================  =========================================================================
zeros                packed decode gives zeros
newest               packed decode sees zeros in place of the newest token's KV
sinkless             packed decode knows no attention sinks
page                 packed decode sees a wrong page in the widest shared pack
causal               packed drafts see those behind them, too
run-error            packed decode raises
plan-error           planning raises
stock                every step is stock's
query, chunk, node   this packing policy
scales               KV scales are applied to a cache that holds unscaled values
compare-plans        the wrapper plans every batch, too, and the log says whether the plans differ
===================  =========================================================================
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import
from sglang_prefix.files import write_file

__all__ = ["mode", "say"]

PAGE_TOKENS = 16
POLICIES = ("query", "chunk", "node")
MODE_FILE = Path(os.environ["SGLANG_PREFIX_TEST_MODE_FILE"])


def mode() -> str:
    """What to do now; nothing while the engine starts."""
    return MODE_FILE.read_text() if MODE_FILE.exists() else "none"


def say(what: str) -> None:
    """Tell the test, by way of the log: in one write, since other processes write there, too."""
    os.write(1, f"test hook: {what}\n".encode())


@dataclass
class Step:
    """The step under way, as far as one hook needs to know of another."""

    schedule: Any = None
    verifies: bool = False
    newest_slots: Any = None
    plans: list[tuple[Any, Any, Any]] = field(default_factory=list)  # planner, forest, plan


STEP = Step()


def break_run(module: ModuleType) -> None:
    """Modes zeros, newest, page, causal, sinkless, run-error."""
    run = module.PlanExecutor.run

    def broken(
        self: Any, q: Any, k_cache: Any, v_cache: Any, out: Any, lse: Any, params: Any
    ) -> None:
        now = mode()
        if now == "sinkless":
            params = replace(params, sinks=None)
        if now == "run-error":
            raise RuntimeError("raised on purpose by a test")
        if now == "causal" and STEP.verifies:
            run_without_bound(self, run, q, k_cache, v_cache, out, lse, params)
            return
        if now == "newest":
            target, k, v = STEP.newest_slots, 0.0, 0.0
        elif now == "page" and self.plan.num_shared_packs:
            target, source = widest_pages(self)
            k, v = k_cache[source], v_cache[source]
        else:
            run(self, q, k_cache, v_cache, out, lse, params)
            if now == "zeros":
                out.zero_()
            return
        saved = k_cache[target].clone(), v_cache[target].clone()
        k_cache[target], v_cache[target] = k, v
        run(self, q, k_cache, v_cache, out, lse, params)
        k_cache[target], v_cache[target] = saved

    module.PlanExecutor.run = broken


def run_without_bound(executor: Any, run: Any, q: Any, *others: Any) -> None:
    """Run every draft as the last one of its request, which sees all of them."""
    k_cache, v_cache, out, lse, params = others
    drafts = int(executor.plan.query_lens[0])
    found = out.clone()
    for j in range(drafts):
        each = q.view(-1, drafts, *q.shape[1:])[:, j].repeat_interleave(drafts, 0)
        run(executor, each, k_cache, v_cache, out, lse, params)
        found[j::drafts] = out[drafts - 1 :: drafts]
    out.copy_(found)


def widest_pages(executor: Any) -> tuple[Any, Any]:
    """Slots of the last page of the shared pack with the most requests, and of the one before."""
    plan = executor.plan
    long_enough = [
        p
        for p in range(plan.num_shared_packs)
        if plan.pack_end[p] - plan.pack_start[p] >= 2 * PAGE_TOKENS
    ]
    widest = max(long_enough, key=lambda p: len(plan.pack_queries(p)))
    end = int(plan.slot_offset[widest] + plan.pack_end[widest] - plan.pack_start[widest])
    slots = executor.kv_slots.long()
    return slots[end - PAGE_TOKENS : end], slots[end - 2 * PAGE_TOKENS : end - PAGE_TOKENS]


def watch_prepare(module: ModuleType) -> None:
    """Modes plan-error, stock and compare-plans; tells of batches with padding."""
    prepare, decide_ahead = module.DecodePlanner.prepare, module.DecodePlanner.decide_ahead

    def watched(self: Any, batch: Any, **options: Any) -> Any:
        now = mode()
        if now == "plan-error":
            raise RuntimeError("raised on purpose by a test")
        if now == "stock":
            return "gate-no-gain"
        if len(batch.reqs) < batch.padded_batch_size:
            say("padded batch")
        # Only the scheduler knows that what fresh requests share is not in their rows yet.
        complete = len(batch.reqs) == batch.padded_batch_size
        settled = complete and all(STEP.schedule.settled(batch.reqs))
        STEP.newest_slots, STEP.plans = batch.new_slots, []
        reason = prepare(self, batch, **options)
        if now == "compare-plans" and settled and reason is None:
            for planner, forest, plan in tuple(STEP.plans):
                compare_plans(planner, forest, plan, batch)
        return reason

    def ahead(self: Any, batch: Any) -> Any:
        return None if mode() == "stock" else decide_ahead(self, batch)

    module.DecodePlanner.prepare, module.DecodePlanner.decide_ahead = watched, ahead


def watch_extends(module: ModuleType) -> None:
    """Mode stock, of extends."""
    prepare = module.ExtendPlanner.prepare
    module.ExtendPlanner.prepare = lambda self, batch: mode() != "stock" and prepare(self, batch)


def compare_plans(planner: Any, forest: Any, plan: Any, batch: Any) -> None:
    """Let the wrapper plan a batch: from the forest, and from the slot rows."""
    import torch

    from sglang_prefix import PrefixDecodeWrapper

    shape = planner.costs.shape
    heads = shape.num_qo_heads, shape.num_kv_heads, shape.head_dim
    table = STEP.schedule.batch.req_to_token_pool.req_to_token
    wrapper = PrefixDecodeWrapper(
        *heads, v_head_dim=shape.v_head_dim, policy=planner.policy_name, dtype=torch.float32
    )
    for given in (forest, None):
        lens = torch.from_numpy(forest.seq_lens.copy())
        wrapper.plan(table, batch.req_pool_indices, lens, forest=given)
        same = wrapper.current_plan is not None and wrapper.current_plan.same_as(plan)
        say("equal plans" if same else "plans differ")


def watch_plan(module: ModuleType) -> None:
    """Plan with the policy that the mode names; note every plan."""
    planner_class = module.PackPlanner
    plan = planner_class.plan

    def watched(
        self: Any, forest: Any, padded_batch_size: int | None = None, **options: Any
    ) -> Any:
        now, planner = mode(), self
        if now in POLICIES:
            planner = planner_class(
                self.costs.shape,
                self.costs.device,
                policy=now,
                max_partials=self.max_partials,
                reserved_tail_slots=self.reserved_tail_slots,
            )
        made = plan(planner, forest, padded_batch_size, **options)
        STEP.plans.append((planner, forest, made))
        return made

    planner_class.plan = watched


def watch_push(module: ModuleType) -> None:
    """Keep the schedule of the pass; tell of passes that prefill and decode at once."""
    push = module.ScheduleContext.push

    def watched(self: Any, forward_batch: Any) -> Any:
        STEP.schedule, STEP.plans = self, []
        STEP.verifies = forward_batch.forward_mode.is_target_verify()
        if forward_batch.forward_mode.is_mixed():
            say("mixed pass")
        return push(self, forward_batch)

    module.ScheduleContext.push = watched


def watch_launch(module: ModuleType) -> None:
    """Tell of launches that Triton would have to compile for, each once."""
    launch = vars(module)["launch"]
    compiled: set[Any] = set()

    def watched(kernel: Any, grid: Any, **arguments: Any) -> None:
        from tests.replay import launch_key

        key = launch_key(kernel, arguments)
        if key not in compiled:
            compiled.add(key)
            say(f"compiled at {'serving' if MODE_FILE.exists() else 'start'}: {key}")
        launch(kernel, grid, **arguments)

    vars(module)["launch"] = watched


def apply_scales(module: ModuleType) -> None:
    """Mode scales: where our backend reads the cache, not where it writes it."""
    applies = vars(module)["applies_kv_scales"]
    vars(module)["applies_kv_scales"] = lambda pool: mode() == "scales" or applies(pool)


def hold_decode(module: ModuleType) -> None:
    """Wait before a decode pass, the scheduler with it.

    The file that ``SGLANG_PREFIX_TEST_HOLD_FILE`` names holds the number of that pass, counted from
    the file's appearance. A file of that name with ``.reached`` appended tells; the pass goes on
    when the first file is gone.
    """
    forward: Callable[..., Any] = module.ModelRunner.forward
    file = Path(os.environ["SGLANG_PREFIX_TEST_HOLD_FILE"])
    reached = file.with_suffix(".reached")
    passes = 0

    @functools.wraps(forward)
    def holding(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        if not file.exists():
            passes = 0
        elif forward_batch.forward_mode.is_decode():
            passes += 1
            if passes == int(file.read_text()):
                reached.touch()
                while file.exists():
                    time.sleep(0.01)
                reached.unlink()
        return forward(self, forward_batch, *args, **kwargs)

    module.ModelRunner.forward = holding


def name_modes(module: ModuleType) -> None:
    """A workload of ``bench serving`` that is named ``zeros`` runs in that mode, others in none."""
    ready = module.Client._ready

    def told(self: Any, name: str, url: str) -> Any:
        write_file(MODE_FILE, name if name == "zeros" else "none")
        return ready(self, name, url)

    module.Client._ready = told


patch_after_import(
    {
        "prefix_kernels.executor": break_run,
        "prefix_kernels.launch": watch_launch,
        "prefix_patches.schedule_context": watch_push,
        "sglang.srt.model_executor.model_runner": hold_decode,
        "sglang_prefix.backend.decode_planner": watch_prepare,
        "sglang_prefix.backend.extend_planner": watch_extends,
        "sglang_prefix.backend.layers": apply_scales,
        "sglang_prefix.bench.serving.drivers": name_modes,
        "sglang_prefix.packing.planner": watch_plan,
    }
)
