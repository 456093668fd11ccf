"""What the native executor alone has: tiles, work cut for threads, 16-bit products, other CPUs.

Tests ask for more threads than there are cores: OpenMP threads that wait then sleep, and do not
spin on cores that other tests need.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from prefix_kernels import native_executor, native_library
from prefix_kernels.native_executor import NativeExecutor
from prefix_kernels.native_library import CPU_FLAGS
from tests.attention import (
    KERNEL_TOLERANCES,
    SPLITS,
    WHOLE,
    AttentionCase,
    assert_close,
    load,
    make_case,
)
from tests.forests import Fork, build_batch, random_batch

pytestmark = pytest.mark.usefixtures("nan_memory")

TILE = 256  # of native/work.h
# Seventy requests that share two tiles and a bit, by 4 heads: more rows than an item takes.
MANY = [Fork(0, 0, 2 * TILE + 45), *(Fork(0, 2 * TILE + 40, b % 5) for b in range(69))]
LONG = [
    Fork(0, 0, 3 * TILE + 5),
    Fork(0, 2 * TILE, TILE + 40),
    Fork(0, TILE + 7, 30),
    Fork(9, 0, 1),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# As on processors with AVX-512, which multiply 16-bit values and have layouts of operands for that.
AS_AVX512 = (*CPU_FLAGS, "-DPREFIX_PLAIN_PRODUCTS", "-DPREFIX_LANES=16", "-Wno-psabi")
ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="options of x86 compilers")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads as asked for, while a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def with_threads(*counts: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("threads", counts, indirect=True)


def use_library_of(flags: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors that are built from now on run what these options compile."""
    library = native_library.obtain(cpu_flags=flags)
    monkeypatch.setattr(native_library, "library", lambda: library)


@pytest.mark.parametrize("order", ["contiguous", "scattered", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@with_threads(1, 3)
def test_tiles(order: str, dtype: torch.dtype, threads: int) -> None:
    """Whole tiles in place and gathered, a last one, several blocks of rows, several items."""
    for forks, policy in itertools.product((MANY, LONG), ("node", "query")):
        batch = build_batch(forks, order=order)
        case = make_case(batch, group=4, head_dim=32, v_head_dim=16, dtype=dtype)
        load(case, "native", policy).check()


@pytest.mark.parametrize("dims", [(1, 1), (5, 33), (33, 5), (80, 48), (130, 20)], ids=str)
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_head_dims_that_fill_no_vector(dims: tuple[int, int], kv_dtype: torch.dtype | None) -> None:
    batch = random_batch(21, num_requests=9, max_tokens=90)
    for dtype, group in itertools.product(DTYPES, (1, 5)):
        shape = {"head_dim": dims[0], "v_head_dim": dims[1], "group": group}
        case = make_case(batch, dtype=dtype, kv_dtype=kv_dtype, **shape)  # type: ignore[arg-type]
        load(case, "native", "node").check()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_8_bit_value(dtype: torch.dtype) -> None:
    """One token each: the output is the value, and NaN and infinity are what they are."""
    case = make_case(build_batch([Fork(b, 0, 1) for b in range(4)]), head_dim=64, kv_dtype=dtype)
    bits = torch.arange(256, dtype=torch.uint8).view(4, 1, 64).expand(4, 2, 64)
    case.k_cache[:] = 0.0
    case.v_cache[case.newest_slots.long()] = bits.contiguous().view(dtype)
    out, _ = load(case, "native").run()
    expected = bits.contiguous().view(dtype).float().repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def cases_for_threads() -> Iterator[tuple[str, AttentionCase]]:
    for name, forks in (
        ("one long request", [Fork(0, 0, 9 * TILE + 3)]),
        ("one long prefix", [Fork(0, 0, 9 * TILE), *(Fork(0, 9 * TILE, 3) for _ in range(20))]),
        ("groups", [Fork(b // 4 * 4, 70 * (b % 4 > 0), 40 + b % 4) for b in range(64)]),
        (
            "many requests",
            [Fork(0, 0, 40), *(Fork(b % 7, 20 + b % 13, b % 5) for b in range(1023))],
        ),
    ):
        yield name, make_case(build_batch(forks, growth=4), head_dim=16)


@with_threads(3, 5)
def test_work_is_cut_for_threads(threads: int) -> None:
    """What would keep one thread busy is cut, more than the plan did; and while tails grow, too."""
    for name, case in cases_for_threads():
        loaded = load(case, "native", "node")
        loaded.check()
        executor = loaded.executor
        assert isinstance(executor, NativeExecutor)
        is_cut = executor.num_parts > loaded.plan.num_partials
        assert is_cut == name.startswith("one long"), name
        if name == "one long request":
            assert executor.num_parts >= threads
        for _ in range(2):
            executor.append(*case.grow())
            loaded.check()


@pytest.mark.parametrize("max_grown", [2, 128])
def test_items_grow_with_tails_until_they_are_cut_anew(
    max_grown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits that are empty at first, others that are not; cut anew in time, and not before."""
    monkeypatch.setattr(native_executor, "_MAX_GROWN", max_grown)
    forks = [Fork(0, 0, 40), Fork(0, 38, 1), Fork(0, 30, 9), Fork(9, 0, 1), Fork(9, 0, 3)]
    case = make_case(build_batch(forks, growth=5))
    loaded = load(case, "native", "node", SPLITS)
    executor = loaded.executor
    assert isinstance(executor, NativeExecutor)
    loaded.check()
    cuts: list[None] = []
    cut = executor.cut
    monkeypatch.setattr(executor, "cut", lambda: cuts.append(cut()))
    for _ in range(5):
        executor.append(*case.grow())
        loaded.check()
    assert len(cuts) == 5 // max_grown


def test_a_tail_grows_no_further_than_into_its_reserved_slots() -> None:
    case = make_case(build_batch([Fork(0, 0, 3), Fork(0, 2, 2)], growth=16))
    loaded = load(case, "native")
    for _ in range(16):
        loaded.executor.append(*case.grow())
    before = loaded.executor.kv_slots.clone()
    with pytest.raises(ValueError, match="new_slots has 1 elements; legal: 2 or more"):
        loaded.executor.append(case.seq_lens, case.newest_slots[:1])
    with pytest.raises(RuntimeError, match="used up its reserved slots"):
        loaded.executor.append(case.seq_lens, case.newest_slots)
    assert torch.equal(loaded.executor.kv_slots, before)
    loaded.check()


@with_threads(2, 7)
def test_threads_end_together(threads: int) -> None:
    """Each takes the next item when it is done: the last is done soon after all could have been."""
    groups = [Fork(b // 8 * 8, 300 * (b % 8 > 0), 40 + b % 8) for b in range(512)]
    for forks in (
        [Fork(0, 0, 1 << 17)],
        [Fork(b, 0, 30 + b % 50) for b in range(1024)],
        groups,
        [Fork(0, 0, 20 * TILE), *(Fork(b, 0, 100) for b in range(1, 9))],
    ):
        loaded = load(make_case(build_batch(forks), head_dim=16), "native", "node")
        loaded.run()
        assert isinstance(loaded.executor, NativeExecutor)
        costs = loaded.executor.item_costs
        assert (np.diff(costs) <= 0).all()
        ends = np.zeros(threads, dtype=np.int64)
        for cost in costs:
            ends[ends.argmin()] += cost
        assert ends.max() <= 1.1 * costs.sum() / threads


@pytest.mark.parametrize("num_requests", [86, 193, 256, 257, 300])
def test_rows_of_a_pack_are_cut_evenly(num_requests: int) -> None:
    """No item reads the pack for a few rows that others could have taken, and each costs what its
    own rows do."""
    forks = [Fork(0, 0, TILE + 1), *[Fork(0, TILE, 1)] * (num_requests - 1)]
    case = make_case(build_batch(forks), group=3, head_dim=16)
    loaded = load(case, "native", "node")
    loaded.check()
    assert isinstance(loaded.executor, NativeExecutor)
    of_pack = [cost for cost in loaded.executor.item_costs if cost >= TILE]
    assert sum(of_pack) == TILE * (24 * len(of_pack) + 2 * 3 * num_requests)
    assert min(of_pack) >= 0.5 * max(of_pack)


@with_threads(5)
@pytest.mark.parametrize("spare", [0, 1, 2, 7, 40])
def test_parts_are_bounded(spare: int, threads: int) -> None:
    """Whatever the threads would want, the memory is what it may be; a plan runs in any case."""
    for name, case in cases_for_threads():
        planned = load(case, "native", "node").plan.num_partials
        executor = NativeExecutor(case.shape, torch.device("cpu"), max_parts=planned + spare)
        loaded = load(case, "native", "node", executor=executor)
        loaded.check()
        assert planned <= executor.num_parts <= planned + spare, name
        if spare > 1 and name == "one long request":
            assert executor.num_parts > planned


def test_work_is_not_cut_for_one_thread() -> None:
    for name, case in cases_for_threads():
        loaded = load(case, "native", "node")
        loaded.check()
        assert isinstance(loaded.executor, NativeExecutor)
        assert loaded.executor.num_parts == loaded.plan.num_partials, name


def test_another_number_of_threads_cuts_anew() -> None:
    case = make_case(build_batch([Fork(0, 0, 9 * TILE)]), head_dim=16)
    loaded = load(case, "native")
    loaded.check()
    torch.set_num_threads(4)
    try:
        loaded.check()
        assert isinstance(loaded.executor, NativeExecutor)
        assert loaded.executor.num_parts >= 4
    finally:
        torch.set_num_threads(1)


@with_threads(3)
def test_the_threads_are_those_of_torch(threads: int) -> None:
    """A second OpenMP library in the process would bring threads of its own."""
    torch.randn(1 << 22).exp_()
    before = len(os.listdir("/proc/self/task"))
    for _, case in cases_for_threads():
        load(case, "native").run()
    assert len(os.listdir("/proc/self/task")) == before


@with_threads(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_again(dtype: torch.dtype, threads: int) -> None:
    loaded = load(make_case(build_batch(MANY), group=3, head_dim=32, dtype=dtype), "native", "node")
    first = loaded.run()
    for _ in range(20):
        assert all(map(torch.equal, first, loaded.run()))


@pytest.mark.parametrize("forks", [MANY, LONG], ids=["many", "long"])
@pytest.mark.parametrize(
    ("scale", "cap"), [(0.0, 0.0), (-0.3, 0.0), (0.2, 2.0), (-0.2, 30.0), (5.0, 1.0)]
)
def test_scores_that_are_transformed(forks: list[Fork], scale: float, cap: float) -> None:
    case = make_case(build_batch(forks), head_dim=32, options={"logit_cap": cap})
    case.sm_scale = scale
    load(case, "native", "node").check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_with_its_request(dtype: torch.dtype) -> None:
    """A NaN in a query or in a request's own K or V: no other row of the pack sees it."""
    case = make_case(build_batch(MANY), head_dim=32, dtype=dtype)
    expected_out, expected_lse = case.oracle()
    case.q[5, 1, 7] = torch.nan
    case.v_cache[case.newest_slots[8].long(), :, 3] = torch.nan
    case.k_cache[case.newest_slots[13].long(), :, 3] = torch.nan
    out, lse = load(case, "native", "node").run()
    assert out[5, 1].isnan().all()
    assert out[8, :, 3].isnan().all()
    assert out[13].isnan().all()
    assert lse[5, 1].isnan()
    assert lse[13].isnan().all()
    clean = [b for b in range(len(out)) if b not in (5, 8, 13)]
    expected = expected_out[clean], expected_lse[clean]
    assert_close((out[clean], lse[clean]), expected, KERNEL_TOLERANCES)


def test_nan_stays_with_its_head() -> None:
    """Rows that fill no vector are copied; what lies behind K's may not be left from V's."""
    case = make_case(build_batch([Fork(0, 0, 100)]), group=4, head_dim=12, v_head_dim=20)
    expected_out, expected_lse = case.oracle()
    case.v_cache[:, 1] = torch.nan
    out, lse = load(case, "native", "node").run()
    assert out[:, 4:].isnan().all()
    assert_close((out[:, :4], lse), (expected_out[:, :4], expected_lse), KERNEL_TOLERANCES)


def check_compiled(flags: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of items in all dtypes, by what these options compile."""
    use_library_of(flags, monkeypatch)
    kv_dtypes = (None, torch.float8_e4m3fn, torch.float8_e5m2)
    for dtype, kv_dtype in itertools.product(DTYPES, kv_dtypes):
        for forks, dims in ((LONG, (64, 64)), (MANY[:20], (33, 5))):
            case = make_case(
                build_batch(forks), head_dim=dims[0], v_head_dim=dims[1], dtype=dtype,
                kv_dtype=kv_dtype, group=3, options={"logit_cap": 20.0},
            )  # fmt: skip
            for policy, profile in itertools.product(("node", "query"), (WHOLE, SPLITS)):
                load(case, "native", policy, profile).check()
        counts = [TILE + 9, TILE + 30, 3, 1]  # of query tokens
        case = make_case(build_batch(LONG), dtype=dtype, kv_dtype=kv_dtype, query_lens=counts)
        load(case, "native", "node", SPLITS).check()


def test_sixteen_lanes_and_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What AVX-512 runs, on any processor; oneDNN's operands are multiplied by a plain loop."""
    check_compiled(AS_AVX512, monkeypatch)
    assert native_library.library().prefix_products() == 3
    case = make_case(build_batch(MANY), head_dim=32, dtype=torch.bfloat16)
    rounded, _ = load(case, "native", "node").run()
    monkeypatch.undo()
    if not native_library.library().prefix_products() & 1:  # here they are widened
        widened, _ = load(case, "native", "node").run()
        assert not torch.equal(rounded, widened)


@ON_X86
@pytest.mark.extended
@pytest.mark.parametrize("extra", [(), ("-DPREFIX_PLAIN_PRODUCTS",)], ids=["", "plain"])
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64"])  # AVX2; four lanes, as on Arm
def test_other_cpus(level: str, extra: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiled((f"-march={level}", *extra), monkeypatch)


@ON_X86
@pytest.mark.extended
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])
def test_it_compiles_without_warnings(tmp_path: Path, level: str) -> None:
    flags = [f"-march={level}", "-Werror", "-Wall", "-Wextra"]
    if level == "x86-64-v4":  # of GCC's own header, before release 13; the other level has them
        flags += ["-mavx512bf16", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    assert native_library._compile(tmp_path / "native.so", flags) == ""


def test_a_failure_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for a head of this size: the process lives, and says so."""
    loaded = load(make_case(random_batch(3, num_requests=3, max_tokens=30)), "native")
    assert isinstance(loaded.executor, NativeExecutor)
    loaded.executor._plan.v_head_dim = np.iinfo(np.int64).max // 1024
    with pytest.raises(RuntimeError, match=r"the native executor failed: .*alloc"):
        loaded.run()
