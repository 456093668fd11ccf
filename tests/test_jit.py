"""Planning by compiled loops: nothing compiles while serving, and Python gives the same plans."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefix_kernels.plan import PackPlan
from sglang_prefix.bench.workloads.trees import TreeBatch, random_tree
from sglang_prefix.forest import PrefixForest
from sglang_prefix.jit import jit
from sglang_prefix.packing import CPU_PROFILE, GPU_PROFILE, POLICIES, AttentionShape
from sglang_prefix.packing.planner import PackPlanner

SHAPE = AttentionShape(8, 2, 64, 64, 2, 2)

# Prints a digest of a few plans, and how many loops are compiled; run with and without numba.
PROGRAM = """
import hashlib, sys
{before}
from dataclasses import fields
from tests.test_jit import loops, plans_of
digest = hashlib.sha256()
for plan in plans_of(6):
    for field in fields(plan):
        digest.update(repr(getattr(plan, field.name)).encode())
print(digest.hexdigest(), len(loops()))
"""


def plans_of(num_seeds: int) -> Iterator[PackPlan]:
    """Plans of uneven forests, from paths and from rows, under every policy."""
    for seed in range(num_seeds):
        page_size = 1 + seed % 4
        requests = 2 + seed * 5
        tree = random_tree(seed, num_requests=requests, max_tokens=90, page_size=page_size)
        batch = TreeBatch.lay_out(tree, page_size=page_size, seed=seed)
        rows = PrefixForest.from_rows(batch.table, batch.seq_lens, page_size=page_size)
        for forest in (batch.forest(), rows):
            for policy in POLICIES:
                for device in (CPU_PROFILE, GPU_PROFILE):
                    yield PackPlanner(SHAPE, device, policy=policy).plan(forest)


def loops() -> dict[str, Any]:
    """The compiled loops of all our modules that are imported."""
    return {
        f"{module}.{name}": value
        for module, members in list(sys.modules.items())
        if module.startswith(("sglang_prefix.", "prefix_kernels."))
        for name, value in vars(members).items()
        if hasattr(value, "py_func") and value.__module__ == module
    }


def test_a_planner_has_every_loop_compiled_and_no_plan_compiles_another() -> None:
    PackPlanner(SHAPE, CPU_PROFILE)
    before = {name: list(loop.signatures) for name, loop in loops().items()}
    # Those that others call are compiled into them.
    assert sum(len(signatures) == 1 for signatures in before.values()) >= 8
    assert len(list(plans_of(6))) == 6 * 2 * 4 * 2
    assert {name: list(loop.signatures) for name, loop in loops().items()} == before


def test_python_makes_the_same_plans_where_numba_is_missing() -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM.format(before=before)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for before in ("", "sys.modules['numba'] = None")
    ]
    assert printed[0][0] == printed[1][0]
    assert [int(count) > 0 for _, count in printed] == [True, False]


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
