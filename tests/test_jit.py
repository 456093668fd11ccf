"""Planning by compiled loops: nothing compiles while serving, and Python gives the same plans."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from sglang_prefix import forest_jit
from sglang_prefix.forest import PrefixForest
from sglang_prefix.jit import jit
from sglang_prefix.packing import (
    CPU_PROFILE,
    GPU_PROFILE,
    POLICIES,
    AttentionShape,
    layout,
    pat_jit,
    splits,
)
from sglang_prefix.packing.planner import PackPlanner
from tests.forests import radix_paths, random_batch

SHAPE = AttentionShape(8, 2, 64, 64, 2, 2)

# Prints a digest of a few plans; run with and without numba.
DIGEST = """
import hashlib, sys
{before}
from tests.test_jit import plans_of
digest = hashlib.sha256()
for plan in plans_of(range(6)):
    for name in ("pack_start", "pack_end", "query_indptr", "queries", "num_splits",
                 "slot_offset", "partial_indptr", "partial_index", "request_indptr"):
        digest.update(getattr(plan, name).tobytes())
from sglang_prefix.packing.layout import number_partials
print(digest.hexdigest(), hasattr(number_partials, "signatures"))
"""


def plans_of(seeds: range) -> list[layout.CostedPlan]:
    """Plans of uneven forests, from paths and from rows, under every policy."""
    plans = []
    for seed in seeds:
        batch = random_batch(seed, num_requests=2 + seed * 5, max_tokens=90, page_size=1 + seed % 4)
        paths = radix_paths(batch, seed)
        limits = [path.ends[-1] if path.ends else 0 for path in paths]
        forests = (
            PrefixForest.from_paths(paths, limits, batch.seq_lens, page_size=batch.page_size),
            batch.forest(),
        )
        for forest in forests:
            for policy in POLICIES:
                for device in (CPU_PROFILE, GPU_PROFILE):
                    plans.append(PackPlanner(SHAPE, device, policy=policy).plan(forest))
    return plans


def loops_of(*modules: ModuleType) -> dict[str, Any]:
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if hasattr(value, "signatures")
    }


def test_a_planner_has_every_loop_compiled_and_no_plan_compiles_another() -> None:
    PackPlanner(SHAPE, CPU_PROFILE)
    loops = loops_of(forest_jit, pat_jit, layout, splits)
    packing = set(pat_jit.__all__) - {"candidate_from"}  # called by `explain` alone
    public = [*forest_jit.__all__, *packing, "lay_out", "tokens_read", "count_pieces"]
    before = {name: list(loops[name].signatures) for name in public}
    assert all(len(signatures) == 1 for signatures in before.values())
    plans_of(range(6))
    assert {name: list(loops[name].signatures) for name in public} == before


def test_python_makes_the_same_plans_where_numba_is_missing() -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", DIGEST.format(before=before)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for before in ("", "sys.modules['numba'] = None")
    ]
    assert printed[0][0] == printed[1][0]
    assert [is_compiled for _, is_compiled in printed] == ["True", "False"]


def test_without_a_place_for_machine_code_loops_are_compiled_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import numba  # here, because the program of the test above imports this module without it

    njit: Callable[..., Any] = numba.njit

    def refuse_caches(function: Any, *, cache: bool = False) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(function)

    monkeypatch.setattr(numba, "njit", refuse_caches)

    @jit
    def double(number: int) -> int:
        return 2 * number

    assert double(4) == 8
    assert hasattr(double, "signatures")
