"""Breaks things on purpose in every process of an engine; Python imports this file at start-up.

``SGLANG_PREFIX_TEST_MODE_FILE`` names a file that holds the mode of the moment, so one engine
serves several controls. Everything is patched right after the module that defines it is imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# An engine's processes know nothing of the source tree.
sys.path.append(str(Path(__file__).parents[3]))

from benchmarks.import_patches import patch_after_import

PAGE_TOKENS = 16


def mode() -> str:
    """What to break now; nothing while the engine starts."""
    file = Path(os.environ["SGLANG_PREFIX_TEST_MODE_FILE"])
    return file.read_text() if file.exists() else "none"


def patch_runner(module: ModuleType) -> None:
    """Break the attention of ``PlanRunner.run``: modes zeros, newest, page, run-error."""
    run = module.PlanRunner.run

    def broken(
        self: Any, q: Any, k_cache: Any, v_cache: Any, out: Any, *args: Any, **kwargs: Any
    ) -> None:
        now = mode()
        if now == "run-error":
            raise RuntimeError("raised on purpose by a test")
        if now == "newest":
            tails = self.seq_lens - self._tail_start
            self._executor.set_lengths(tails - 1)
            run(self, q, k_cache, v_cache, out, *args, **kwargs)
            self._executor.set_lengths(tails)
            return
        if now == "page" and self.plan.num_shared_packs:
            replaced, by = widest_pages(self)
            saved = k_cache[replaced].clone(), v_cache[replaced].clone()
            k_cache[replaced], v_cache[replaced] = k_cache[by], v_cache[by]
            run(self, q, k_cache, v_cache, out, *args, **kwargs)
            k_cache[replaced], v_cache[replaced] = saved
            return
        run(self, q, k_cache, v_cache, out, *args, **kwargs)
        if now == "zeros":
            out.zero_()

    module.PlanRunner.run = broken


def widest_pages(runner: Any) -> tuple[Any, Any]:
    """Slots of the last page of the shared pack with the most requests, and of the one before."""
    plan = runner.plan
    long_enough = [
        p
        for p in range(plan.num_shared_packs)
        if plan.pack_end[p] - plan.pack_start[p] >= 2 * PAGE_TOKENS
    ]
    widest = max(long_enough, key=lambda p: len(plan.pack_queries(p)))
    end = int(plan.slot_offset[widest] + plan.pack_end[widest] - plan.pack_start[widest])
    slots = runner._executor.kv_slots
    return slots[end - PAGE_TOKENS : end], slots[end - 2 * PAGE_TOKENS : end - PAGE_TOKENS]


def patch_batch_planner(module: ModuleType) -> None:
    """Let planning raise, or tell of batches with padding: modes plan-error, tell-padding."""
    prepare = module.DecodePlanner.prepare

    def broken(self: Any, batch: Any) -> Any:
        now = mode()
        if now == "plan-error":
            raise RuntimeError("raised on purpose by a test")
        if now == "tell-padding" and len(batch.reqs) < batch.padded_batch_size:
            print("test hook: padded batch", flush=True)
        if now == "compare-plans":
            return compared(prepare, self, batch)
        return prepare(self, batch)

    module.DecodePlanner.prepare = broken


def patch_handover(module: ModuleType) -> None:
    """Tell of passes that prefill and decode at once: mode tell-mixed."""
    push = module.ScheduleContext.push

    def telling(self: Any, forward_batch: Any) -> Any:
        if mode() == "tell-mixed" and forward_batch.forward_mode.is_mixed():
            print("test hook: mixed pass", flush=True)
        return push(self, forward_batch)

    module.ScheduleContext.push = telling


def compared(prepare: Any, planner: Any, batch: Any) -> Any:
    """Let the wrapper plan every batch as well: mode compare-plans."""
    forests: list[Any] = []
    planner.on_plan = lambda forest, *_: forests.append(forest)
    reason = prepare(planner, batch)
    planner.on_plan = None
    # Otherwise the plan is for a first decode step, which only the scheduler knows.
    if forests and planner.is_reusable:
        pack_planner, executor = planner.groups[0][:2]
        given = wrapper_plan(planner, pack_planner, batch, forests[-1])
        found = wrapper_plan(planner, pack_planner, batch, None)
        equal = given.same_as(executor.plan) and found.same_as(executor.plan)
        print(f"test hook: {'equal plans' if equal else 'plans differ'}", flush=True)
    return reason


def wrapper_plan(decode: Any, planner: Any, batch: Any, forest: Any) -> Any:
    """The plan that ``PrefixDecodeWrapper`` makes for a batch, from a forest or from the rows."""
    import torch

    from sglang_prefix import PrefixDecodeWrapper

    shape = planner.costs.shape
    wrapper = PrefixDecodeWrapper(
        shape.num_qo_heads,
        shape.num_kv_heads,
        shape.head_dim,
        v_head_dim=shape.v_head_dim,
        page_size=decode.page_size,
        policy=planner.policy_name,
        dtype=torch.float32,
    )
    lens = batch.host_lengths(batch.num_requests)
    wrapper.plan(decode.req_to_token, batch.req_pool_indices, torch.from_numpy(lens), forest=forest)
    return wrapper.current_plan


def apply_scales(module: ModuleType) -> None:
    """Use KV scales although the cache holds unscaled values: mode scales."""
    applies = vars(module)["applies_kv_scales"]
    vars(module)["applies_kv_scales"] = lambda pool: mode() == "scales" or applies(pool)


def allow_float32_scheme(module: ModuleType) -> None:
    """Let SGLang load KV scales into a float32 model, so that answers can be compared exactly."""
    import torch

    legal = [torch.float16, torch.bfloat16, torch.float32]
    module.CompressedTensorsConfig.get_supported_act_dtypes = classmethod(lambda cls: legal)


def pad_on_cpu(module: ModuleType) -> None:
    """Give ``torch_native`` the length of padding rows that AMX has, so that it can be padded."""
    module.TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1


def hold_decode(module: ModuleType) -> None:
    """Wait before a decode pass, the scheduler with it.

    The file that ``SGLANG_PREFIX_TEST_HOLD_FILE`` names holds the number of that pass, counted from
    the file's appearance. A file of that name with ``.reached`` appended tells; the pass goes on
    when the first file is gone.
    """
    forward = module.ModelRunner.forward
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


def do_without_cuda(module: ModuleType) -> None:
    """Keep SGLang's CPU engine from calls that need CUDA: pinned memory, and its synchronisation.

    Adapters pin host memory, and releasing memory synchronises the device, whichever that is.
    """
    import torch

    def unpinned(create: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(create)
        def call(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            return create(*args, **kwargs)

        return call

    changed: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch, name, unpinned(getattr(torch, name))) for name in ("tensor", "empty", "zeros")
    ]
    changed.append((torch.Tensor, "pin_memory", lambda self: self))
    changed.append((torch, "get_device_module", lambda device=None: torch.cpu))
    for owner, name, function in changed:
        setattr(owner, name, function)


def remove_init_new(module: ModuleType) -> None:
    """Rename a symbol that our patches need."""
    module.ForwardBatch.renamed_upstream = module.ForwardBatch.init_new
    del module.ForwardBatch.init_new


def both(
    first: Callable[[ModuleType], None], second: Callable[[ModuleType], None]
) -> Callable[[ModuleType], None]:
    """Apply two patches to a module."""

    def patch(module: ModuleType) -> None:
        first(module)
        second(module)

    return patch


def tell_of_compilations(module: ModuleType) -> None:
    """Tell of launches that Triton would have to compile for, in a module that launches."""
    launch = vars(module)["launch"]

    def telling(kernel: Any, grid: Any, **arguments: Any) -> None:
        from tests.launch_keys import launch_key

        key = launch_key(kernel, arguments)
        if key not in COMPILED:
            COMPILED.add(key)
            when = (
                "serving" if Path(os.environ["SGLANG_PREFIX_TEST_MODE_FILE"]).exists() else "start"
            )
            print(f"test hook: compiled at {when}: {key}", flush=True)
        launch(kernel, grid, **arguments)

    vars(module)["launch"] = telling


COMPILED: set[Any] = set()

PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "prefix_patches.schedule_context": patch_handover,
    "sglang_prefix.runner": patch_runner,
    "sglang_prefix.backend.decode_planner": patch_batch_planner,
    "sglang_prefix.backend.backend": apply_scales,
    "sglang.srt.model_executor.model_runner": hold_decode,
}


if "SGLANG_PREFIX_TEST_WITHOUT_INIT_NEW" in os.environ:
    PATCHES["sglang.srt.model_executor.forward_batch_info"] = remove_init_new

if os.environ.get("SGLANG_PREFIX_EXECUTOR") == "triton":
    PATCHES["prefix_kernels.triton_executor"] = tell_of_compilations
    PATCHES["prefix_kernels.plan_buffers"] = tell_of_compilations

if "SGLANG_PREFIX_TEST_FLOAT32_SCHEME" in os.environ:
    PATCHES["sglang.srt.layers.quantization.compressed_tensors.compressed_tensors"] = (
        allow_float32_scheme
    )

if "SGLANG_PREFIX_TEST_WITHOUT_CUDA" in os.environ:
    PATCHES["sglang.srt.managers.scheduler"] = do_without_cuda

if "SGLANG_PREFIX_TEST_PAD_ON_CPU" in os.environ:
    PATCHES["sglang.srt.layers.attention.torch_native_backend"] = pad_on_cpu

if "SGLANG_PREFIX_TEST_GRAPHS" in os.environ:
    for name, graph_patch in importlib.import_module("frozen_graphs").GRAPH_PATCHES:
        PATCHES[name] = both(PATCHES[name], graph_patch) if name in PATCHES else graph_patch

if "SGLANG_PREFIX_TEST_VERSION" in os.environ:
    real_version = importlib.metadata.version

    def fake_version(distribution_name: str) -> str:
        """The version that a test wants for SGLang, the true one for everything else."""
        fake = os.environ["SGLANG_PREFIX_TEST_VERSION"]
        return fake if distribution_name == "sglang" else real_version(distribution_name)

    importlib.metadata.version = fake_version

patch_after_import(PATCHES)
