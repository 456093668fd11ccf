"""What is checked on a GPU: one variant per property of the kernels, the most telling first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from prefix_kernels.launches import LAUNCH_MODES, MERGE_MODES
from sglang_prefix.bench.workloads.inputs import AttentionInputs
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import Tree, random_tree, shared_then_private
from sglang_prefix.packing import GPU_PROFILE, POLICIES, DeviceProfile, TileCost

__all__ = [
    "ALL_MODES",
    "CPU_EXECUTORS",
    "EAGER",
    "GRAPHS",
    "MORE_GRAPHS",
    "Modes",
    "Variant",
    "small_variants",
    "variants",
]

Modes = tuple[str, str]

ALL_MODES: tuple[Modes, ...] = tuple(
    (mode, merge) for mode in LAUNCH_MODES for merge in MERGE_MODES
)
# Graphs: launch and merge mode, and further options of `GraphServer`. Two are switches that change
# nothing in the interpreter, or little.
GRAPHS: dict[str, tuple[Modes, dict[str, Any]]] = {
    f"graph/{'/'.join(modes)}": (modes, {}) for modes in ALL_MODES
}
MORE_GRAPHS: dict[str, tuple[Modes, dict[str, Any]]] = {
    "graph/overlap": (("fused", "launch"), {"overlap_merge": True}),
    "graph/two-classes": (("streams", "launch"), {"graph_rows": (16,), "wide_first": False}),
    "graph/verify": (("streams", "launch"), {"query_tokens": 4}),
    "graph/verify-in-kernel": (("fused", "in_kernel"), {"query_tokens": 4}),
}
# In place of a launch and a merge mode: the executors without.
CPU_EXECUTORS: tuple[Modes, ...] = (("torch", ""), ("native", ""))
# Each mode once: what the other pairs add is checked where nothing else varies.
_TWO_MODES: tuple[Modes, ...] = (ALL_MODES[0], ALL_MODES[-1])
# Packs are nearly free and splits short, so that small batches have both.
EAGER = DeviceProfile(
    "eager",
    max_block_rows=128,
    reread_cost=0.4,
    pack_bytes=100,
    min_split_tokens=32,
    num_sms=264,
    read_bytes_per_us=1e9,
    tiles=(TileCost(128, 4, sm_share=1.0, item_us=0, token_us=1, lone_bytes_per_us=1e9),),
)
_DIMS = (
    *((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256)),
    *((192, 128), (64, 96), (128, 64)),
)
_GROUPS = (*range(1, 9), 16)
_INT32 = 1 << 31


def _uneven(seed: int, requests: int, tokens: int, page_size: int) -> Tree:
    return random_tree(seed, num_requests=requests, max_tokens=tokens, page_size=page_size)


@dataclass(frozen=True, slots=True)
class Variant:
    """Inputs, and what is done with them.

    Attributes:
        name: unique.
        group, kv, dim, v_dim: query heads per KV head, KV heads, elements per head.
        v_in_k: as of `AttentionShape`.
        dtype, kv_dtype: of q, and of the caches where it differs.
        options: logit_cap, k_scale, v_scale; lists stand for one value per KV head, tensors for
            one that the device holds.
        sinks: dtype of attention sinks; None for none.
        make_tree: from a seed, requests, tokens and page size.
        requests, tokens: size, for ``make_tree``.
        page_size: tokens per page.
        query_tokens: of each request.
        policies, modes: what is run on these inputs; launch and merge mode.
        profile: what the planner believes of the device.
        padding: rows past the batch.
        steps: tokens that every request grows by.
        repeats: runs that must give the same bits.
        first_slot: of the pool.
    """

    name: str
    group: int = 4
    kv: int = 2
    dim: int = 128
    v_dim: int = 128
    v_in_k: bool = False
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sinks: torch.dtype | None = None
    make_tree: Callable[[int, int, int, int], Tree] = _uneven
    requests: int = 24
    tokens: int = 600
    page_size: int = 1
    query_tokens: int = 1
    policies: tuple[str, ...] = ("node",)
    modes: tuple[Modes, ...] = _TWO_MODES
    profile: DeviceProfile = EAGER
    padding: int = 0
    steps: int = 0
    repeats: int = 0
    first_slot: int = 0

    def inputs(self, device: torch.device, seed: int) -> AttentionInputs:
        """Fresh inputs; all memory that a kernel must not read is poison."""
        options = {
            name: value if isinstance(value, float) else torch.as_tensor(value, device=device)
            for name, value in self.options.items()
        }
        if self.sinks is not None:
            generator = torch.Generator().manual_seed(seed)
            drawn = 4 + 2 * torch.randn(self.kv * self.group, generator=generator)
            drawn[0] = -torch.inf  # none; padding rows must stay zeros with it, too
            options["sinks"] = drawn.to(device, self.sinks)
        return AttentionInputs.lay_out(
            self.make_tree(seed, self.requests, self.tokens, self.page_size),
            Heads(self.kv * self.group, self.kv, self.dim, self.v_dim, self.v_in_k),
            device,
            seed,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            page_size=self.page_size,
            growth=self.steps,
            first_slot=self.first_slot,
            query_tokens=self.query_tokens,
            padded_batch_size=(
                self.requests * self.query_tokens + self.padding if self.padding else None
            ),
            poison=True,
            options=options,
        )

    def runs(self, *, few: bool) -> list[tuple[str, Modes, bool]]:
        """Policy, modes, and whether launches are fixed, of the runs on these inputs.

        Every launch shape is compiled, in seconds each: all only where that is the question.
        """
        if self.modes == ALL_MODES:
            every = list(product(self.policies, self.modes, (False, True)))
            return every[::3] if few else every
        pairs = product(self.policies, enumerate(self.modes))
        return [(policy, modes, index == 0) for policy, (index, modes) in pairs]


def variants(*, dry: bool = False) -> list[Variant]:
    """All of them, in the order in which they are run; without what a dry run would repeat."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    fp8 = torch.float8_e4m3fn
    per_head = {"k_scale": [0.4, 1.7], "v_scale": [3.0, 0.2]}
    cap = {"logit_cap": 30.0}
    capped = cap | per_head
    on_device = {"k_scale": torch.tensor(0.6), "v_scale": 1.5}
    found = [
        Variant("policies-and-modes", policies=tuple(POLICIES), modes=ALL_MODES),
        Variant("real-profile", profile=GPU_PROFILE, tokens=4000, kv=8, policies=("pat",)),
        Variant("same-bits", modes=ALL_MODES, repeats=100),
        Variant("pages-of-16", page_size=16, policies=("pat", "node")),
        Variant("padding-rows", padding=5, modes=ALL_MODES),
        Variant("growing-tails", steps=5, modes=ALL_MODES),
        Variant("one-token-tails", make_tree=lambda s, n, t, p: shared_then_private(n, t, 1)),
        Variant("empty-tails", make_tree=_empty_tails, policies=("node", "pat")),
        Variant("dtype/float16", dtype=fp16),
        Variant("dtype/float32", dtype=fp32),
        Variant("fp8/e4m3-one-scale", kv_dtype=fp8, options={"k_scale": 0.37, "v_scale": 2.5}),
        Variant("fp8/e4m3-scale-per-head", kv_dtype=fp8, options=per_head),
        Variant("fp8/e4m3-float16", dtype=fp16, kv_dtype=fp8, options=per_head),
        Variant("fp8/e5m2", kv_dtype=torch.float8_e5m2, options=on_device),
        Variant("logit-cap/30", options=cap),
        Variant("logit-cap/0.5-scales", options={"logit_cap": 0.5, **per_head}),
        Variant("sinks", group=8, dim=64, v_dim=64, sinks=bf16, padding=5, modes=ALL_MODES),
        Variant("sinks/float32-cap-e4m3", kv_dtype=fp8, sinks=fp32, options=capped, steps=3),
        # Drafts that are verified, one of several accepted; their rows fill tiles of 64 and 128.
        Variant("verify/4", query_tokens=4, padding=5, steps=3, modes=ALL_MODES),
        Variant("verify/3-cap-e4m3", 3, query_tokens=3, kv_dtype=fp8, sinks=bf16, options=capped),
        Variant("extend/70", query_tokens=70, requests=9, policies=("pat", "node")),
        Variant("latent/verify-2", 16, 1, 576, 512, v_in_k=True, requests=9, query_tokens=2),
        Variant("1024-requests", requests=1024, tokens=200, dim=64, v_dim=64, modes=ALL_MODES),
        # The first slot that a 32-bit offset in elements cannot reach.
        Variant("far-slots", kv=8, first_slot=_INT32 // (8 * 128), modes=ALL_MODES),
    ]
    found += [
        Variant(
            f"dims/{dim}x{v_dim}/{str(dtype).removeprefix('torch.')}",
            dim=dim,
            v_dim=v_dim,
            dtype=dtype,
        )
        for dtype in ((bf16,) if dry else (bf16, fp16))
        for dim, v_dim in _DIMS
    ]
    found += [
        Variant(f"group/{group}", group, dim=64, v_dim=64)
        for group in (_GROUPS[::2] if dry else _GROUPS)
    ]
    found += [
        *(
            Variant(f"latent/{group}", group, 1, 576, 512, v_in_k=True, requests=9, modes=modes)
            for group, modes in ((16, ALL_MODES), (32, _TWO_MODES), (128, _TWO_MODES))
        ),
        Variant("latent/16-growing-cap", 16, 1, 576, 512, v_in_k=True, steps=3, options=cap),
        Variant("group/128", 128, kv=1, dim=64, v_dim=64, requests=9),
        Variant("dims/256x256/float32", dtype=fp32, dim=256, v_dim=256),
        Variant("dims/256x256/e4m3", kv_dtype=fp8, dim=256, v_dim=256),
    ]
    return [_tiny(variant) for variant in found] if dry else found


def small_variants(*, dry: bool = False) -> list[Variant]:
    """Every kernel once, which the sanitizers watch; on an fp8 cache in two of the modes."""
    small = Variant("small", dim=64, v_dim=64, modes=ALL_MODES, requests=20, tokens=200, steps=1)
    if dry:
        small = replace(small, dim=16, v_dim=16, dtype=torch.float16, requests=3, tokens=8)
    return [small, replace(small, kv_dtype=torch.float8_e4m3fn, modes=_TWO_MODES)]


def _tiny(variant: Variant) -> Variant:
    """For the interpreter: few and small, and no bfloat16, whose products are wrong there."""
    per_head = any(isinstance(value, list) for value in variant.options.values())
    if variant.v_in_k:
        variant = replace(variant, dim=40, v_dim=32)
    return replace(
        variant,
        kv=2 if per_head else 1,
        query_tokens=min(variant.query_tokens, 7),
        dtype=torch.float16 if variant.dtype == torch.bfloat16 else variant.dtype,
        requests=3 if variant.requests < 100 else 9,
        tokens=10,
        steps=min(variant.steps, 2),
        repeats=min(variant.repeats, 2),
        first_slot=min(variant.first_slot, 1000),
        # Splits as short as these inputs, so that there are some all the same.
        profile=replace(variant.profile, min_split_tokens=4),
    )


def _empty_tails(seed: int, requests: int, tokens: int, page_size: int) -> Tree:
    """Requests that are equal, two and two, so that nothing of theirs is private."""
    tree = shared_then_private(max(2, requests // 2), tokens, page_size)
    twice = [part.repeat(2) for part in (tree.leaf, tree.cut)]
    return Tree(tree.parent, tree.length, *twice)
