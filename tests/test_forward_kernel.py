"""What the forward kernel does to save instructions changes no result: in Triton's interpreter.

Strides that are constants, 64-bit addresses, signs of scales, float16 products for 8-bit caches,
items that are carried ahead, and where an item's rows go. What all executors share is in
test_executors.py.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime import interpreter

from prefix_kernels.launches import LAUNCH_MODES
from prefix_kernels.triton_executor import TritonExecutor
from prefix_kernels.work_list import ITEM_FIELDS, TO_OUT, TO_PARTIALS, build_work_list
from sglang_prefix.packing import POLICIES
from tests.attention import (
    SPLITS,
    WHOLE,
    AttentionCase,
    Loaded,
    assert_close,
    build_executor,
    load,
    make_case,
    tolerances_of,
)
from tests.forests import Batch, Fork, batches, build_batch, random_batch

pytestmark = pytest.mark.usefixtures("nan_memory")

WAY = "triton-streams-launch"


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.option.hypothesis_seed) & 0xFFFF  # printed by each run


def crowd(requests: int, *, tokens: int = 20, tail: int = 3) -> Batch:
    """Requests that share tokens; every fourth has none of its own, the last is alone."""
    tails = [(b % 4) and tail + b % 5 for b in range(requests)]
    forks = [Fork(0, 0, tokens), *(Fork(0, tokens, own) for own in tails), Fork(0, 0, 5)]
    return build_batch(forks, growth=4)


def loaded_with(case: AttentionCase, way: str = WAY, **changes: Any) -> Loaded:
    """A case in use by an executor with other tiles, in packs and splits of all kinds."""
    executor = build_executor(case.shape, way, tile_changes=changes)
    return load(case, way, "node", SPLITS, executor=executor)


@pytest.mark.parametrize("mode", LAUNCH_MODES)
def test_switches_change_no_bit(mode: str, seed: int) -> None:
    """Programs take several items each, of all tile classes, and some of them splits."""
    batch = crowd(22, tokens=40)
    case = make_case(batch, group=3, head_dim=16, dtype=torch.float16, seed=seed)
    found = []
    for carries, branches in product((True, False), repeat=2):
        way = f"triton-{mode}-in_kernel"
        loaded = loaded_with(case, way, carries_item=carries, branches_for_tail=branches)
        out, lse = loaded.run()
        assert_close((out, lse), case.oracle(), tolerances_of(loaded.executor))
        found.append((out, lse))
    assert all(
        torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1]) for out, lse in found
    )


@pytest.mark.parametrize(("mode", "group"), [("streams", 3), ("fused", 5), ("fused", 8)])
def test_row_blocks_that_end_amid_a_group(mode: str, group: int, seed: int) -> None:
    """One pack of 300 rows, in blocks of 64 or 128; few of its requests have more."""
    forks = [Fork(0, 0, 20), *(Fork(0, 20, 3 * (b % 25 == 0)) for b in range(300 // group))]
    case = make_case(build_batch(forks), num_kv_heads=1, group=group, head_dim=16, seed=seed)
    loaded_with(case, f"triton-{mode}-in_kernel").check()


def test_tile_changes_that_are_refused() -> None:
    case = make_case(random_batch(1, num_requests=2, max_tokens=9), head_dim=16)
    with pytest.raises(ValueError, match=r"^tile_changes='no_such_field'; legal: block_m,.*$"):
        build_executor(case.shape, WAY, tile_changes={"no_such_field": 1})


def padded(cache: torch.Tensor, pad: int) -> torch.Tensor:
    """The same values, with NaN behind every slot."""
    slots, heads, dim = cache.shape
    room = torch.full((slots, heads * dim + pad), torch.nan)
    room[:, : heads * dim] = cache.flatten(1)
    return room[:, : heads * dim].view(slots, heads, dim)


def heads_outside(cache: torch.Tensor) -> torch.Tensor:
    """The same values, one KV head after the other."""
    return cache.transpose(0, 1).contiguous().transpose(0, 1)


def test_k_and_v_of_different_strides(seed: int) -> None:
    case = make_case(crowd(4), group=4, head_dim=16, seed=seed)
    expected = case.oracle()
    k, v = case.k_cache, case.v_cache
    for case.k_cache, case.v_cache in (
        (padded(k, 7), v),
        (heads_outside(k), padded(v, 24)),
        (k, heads_outside(v)),
    ):
        assert case.k_cache.stride() != case.v_cache.stride()
        assert_close(loaded_with(case).run(), expected)


def test_slots_that_32_bits_of_elements_do_not_reach(seed: int) -> None:
    """Slots of the largest stride; wrapped around they would be in the other half, of zeros."""
    batch = random_batch(seed, num_requests=5, max_tokens=12)
    case = make_case(batch, num_kv_heads=1, head_dim=16, kv_dtype=torch.float8_e5m2, seed=seed)
    stride = (1 << 32) // batch.num_slots // 2
    assert stride * (batch.num_slots - 1) > 1 << 30
    # Memory that nothing touches takes no room.
    room = torch.from_numpy(np.zeros((2, 1 << 32), dtype=np.uint8))
    for name, half in (("k_cache", room[0]), ("v_cache", room[1])):
        cache = getattr(case, name)
        shape = (batch.num_slots, 1, 16)
        far = half[1 << 31 :].as_strided(shape, (stride, 16, 1)).view(torch.float8_e5m2)
        used = torch.from_numpy(np.unique(np.concatenate([*batch.rows])))
        far.view(torch.uint8)[used] = cache.view(torch.uint8)[used]
        setattr(case, name, far)
    loaded_with(case).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sm_scale", "k_scale"),
    [
        (-0.3, 1.0),
        (0.0, 1.0),
        (0.3, torch.tensor([-1.5, 0.0])),
        (-0.3, torch.tensor([-1.5, 2.0])),
        (2.0**-32, 2.0**-32),
    ],
)
def test_scales_that_are_not_above_zero(
    sm_scale: float, k_scale: float | torch.Tensor, dtype: torch.dtype, seed: int
) -> None:
    """The wrapper refuses such numbers, but tensors on a device are not looked at."""
    batch = random_batch(seed, num_requests=3, max_tokens=60)
    fp8 = torch.float8_e4m3fn
    case = make_case(batch, head_dim=16, dtype=dtype, kv_dtype=fp8, seed=seed)
    loaded, case.sm_scale = loaded_with(case), sm_scale
    for cap in (0.0, 0.5):
        case.options = {"k_scale": k_scale, "logit_cap": cap}
        loaded.check()


# The interpreter's bfloat16 products are wrong, but with 8-bit caches there are none.
@pytest.mark.parametrize("exponent", [-112, -24, 0, 16, 17, 100])
def test_half_products_of_queries_beyond_float16(exponent: int, seed: int) -> None:
    """From numbers that float16 has not to some that it cannot hold; 65504 is its largest."""
    kv_dtype = torch.float8_e5m2 if exponent % 2 else torch.float8_e4m3fn
    batch = crowd(3, tokens=40)
    case = make_case(
        batch, group=4, head_dim=16, dtype=torch.bfloat16, kv_dtype=kv_dtype, seed=seed
    )
    # Rows of one tile differ, too.
    powers = torch.arange(case.q.shape[1]) % 5 - 2.0
    case.q = (case.q.float() * torch.exp2(powers + exponent)[None, :, None]).bfloat16()
    case.sm_scale = 2.0**-exponent
    loaded = loaded_with(case)
    for options in ({}, {"logit_cap": 5.0}, {"k_scale": torch.tensor([0.3, 4.0])}):
        case.options = options
        loaded.check()


def test_half_products_of_a_row_with_a_wide_range(seed: int) -> None:
    """A value 2**31 times the others, that meets zeros alone, takes none of their bits."""
    case = make_case(
        crowd(5, tokens=40), head_dim=16, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn,
        seed=seed,
    )  # fmt: skip
    case.q = case.q.sign() * (1 + torch.randint(0, 128, case.q.shape) / 128).bfloat16()
    case.q[..., 5] = 2.0**31
    case.k_cache.view(torch.uint8)[..., 5] = 0
    loaded_with(case).check()


def test_light_weights_of_float16_add_up(seed: int) -> None:
    """A token of weight 1 and value 0, and hundreds of 2**-26: float16 alone would drop these."""
    tokens = 300
    case = make_case(build_batch([Fork(0, 0, tokens)]), head_dim=16, dtype=torch.float16)
    slots = case.req_to_token[case.req_pool_indices[0], :tokens].long()
    case.q = torch.zeros_like(case.q)
    case.q[..., 0] = 1
    case.k_cache[slots] = 0
    case.k_cache[slots[0], :, 0] = 26 * 0.6931
    case.v_cache[slots] = 1000
    case.v_cache[slots[0]] = 0
    case.sm_scale = 1.0
    expected, _ = case.oracle()
    assert expected.min() > 4e-3
    out, _ = loaded_with(case).run()
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=0)


# Memory.


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Ranges of addresses; once there are some, kernels must read and write nothing else."""
    allowed: list[tuple[int, int]] = []
    real = interpreter._interpreter

    class Checked:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def load(self, addresses: Any, mask: Any, *rest: Any) -> Any:
            self.check(addresses[mask])
            return real.load(addresses, mask, *rest)

        def store(self, addresses: Any, values: Any, mask: Any) -> Any:
            self.check(addresses[mask])
            return real.store(addresses, values, mask)

        def check(self, addresses: Any) -> None:
            inside = np.zeros(addresses.shape, dtype=bool)
            for begin, end in allowed:
                inside |= (addresses >= begin) & (addresses < end)
            assert inside.all() or not allowed, "a kernel leaves its tensors"

    monkeypatch.setattr(interpreter, "_interpreter", Checked())
    return allowed


def range_of(tensor: torch.Tensor, size: int | None = None) -> tuple[int, int]:
    begin, size = tensor.data_ptr(), tensor.numel() if size is None else size
    return begin, begin + size * tensor.element_size()


@pytest.mark.parametrize("carries", [True, False])
def test_kernels_stay_within_the_plan(
    carries: bool, ranges: list[tuple[int, int]], seed: int
) -> None:
    """No item past the last of a list is read, no slot past the last of a plan."""
    case = make_case(crowd(12), group=3, head_dim=16, seed=seed)
    loaded = loaded_with(case, WAY, carries_item=carries)
    executor, plan = loaded.executor, loaded.plan
    assert isinstance(executor, TritonExecutor)
    buffers = executor.buffers
    header = buffers.plan[:16].tolist()
    size = max(header[5 + i] + ITEM_FIELDS * header[1 + i] for i in range(4))
    outputs = case.poisoned_outputs()
    ranges += [
        range_of(buffers.plan, size),
        range_of(buffers.kv_slots, plan.num_slots),
        range_of(buffers.tail_lengths, plan.batch_size),
        range_of(buffers.partial_out),
        range_of(buffers.partial_lse),
        *map(range_of, (case.q, case.k_cache, case.v_cache, *outputs)),
    ]
    assert_close(loaded.run(outputs), case.oracle())
    ranges[0] = range_of(buffers.plan, size - ITEM_FIELDS)
    with pytest.raises(Exception, match="a kernel leaves its tensors"):
        loaded.run(outputs)


@given(batch=batches(max_requests=8, max_tokens=60), data=st.data())
def test_items_say_where_their_rows_go(batch: Batch, data: st.DataObject) -> None:
    """Compared with the partials of each row, one by one."""
    group = data.draw(st.sampled_from([1, 3, 5, 16]))
    policy = data.draw(st.sampled_from([*POLICIES]))
    case = make_case(batch, group=group, head_dim=16)
    plan = load(case, "torch", policy, data.draw(st.sampled_from([WHOLE, SPLITS]))).plan
    block_rows = data.draw(st.sampled_from([[16], [16, 64], [32, 128]]))
    items, partials = build_work_list(plan, group, block_rows)
    seen = np.zeros(len(partials) * group, dtype=int)
    for item in items.tolist():
        first_query, first_partial, first_head, rows_left = item[:4]
        rows = np.arange(first_head, min(first_head + block_rows[item[8]], rows_left))
        mine = first_partial + rows // group
        to_out = partials[mine] < 0
        assert item[9] == TO_OUT * to_out.any() + TO_PARTIALS * (~to_out).any()
        seen[mine * group + rows % group] += 1
        requests = plan.queries[first_query + rows // group]
        alone = np.diff(plan.request_indptr)[requests] == 1
        assert (alone == to_out).all()
    assert (seen == 1).all()


def test_control_an_item_with_the_wrong_target_is_seen(seed: int) -> None:
    case = make_case(crowd(9), head_dim=16, seed=seed)
    for target in (TO_OUT, TO_PARTIALS):
        loaded = loaded_with(case)
        assert isinstance(loaded.executor, TritonExecutor)
        plan = loaded.executor.buffers.plan
        items = plan[plan[5] : plan[5] + ITEM_FIELDS * plan[1]].view(-1, ITEM_FIELDS)
        assert (items[:, 9] & ~target).any()
        items[:, 9] &= target
        with pytest.raises(AssertionError, match="not close"):
            loaded.check()
