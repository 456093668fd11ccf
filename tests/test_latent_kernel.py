"""The Triton kernels where V is the first elements of K: in Triton's interpreter.

What the compiler makes of them is in test_compile_report.py and test_kernel_figures.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefix_kernels.plan import AttentionShape
from prefix_kernels.triton_executor import TritonExecutor
from sglang_prefix.packing import POLICIES, DeviceProfile
from tests.attention import (
    SPLITS,
    TRITON,
    WHOLE,
    AttentionCase,
    assert_close,
    build_executor,
    load,
    make_case,
    tolerances_of,
)
from tests.forests import Batch, Fork, batches, build_batch
from tests.pack_reference import splitting

pytestmark = pytest.mark.usefixtures("nan_memory")

WAY, ONE_LAUNCH = "triton-streams-launch", "triton-fused-in_kernel"
DEEPSEEK = (576, 512)
# The rest of k is no power of two; v is none; nothing is left of k; v is less than half a block.
SMALL_DIMS = ((40, 32), (44, 32), (56, 40), (32, 32), (16, 5))


# As SPLITS, but few.
FEW_SPLITS = splitting(DeviceProfile("few", 16, 0.4, 100, 8), num_workers=4)


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.option.hypothesis_seed) & 0xFFFF  # printed by each run


def latent_case(batch: Batch, group: int, dims: tuple[int, int], **options: Any) -> AttentionCase:
    """A case whose V is a view of K, as SGLang's ``get_value_buffer`` returns it."""
    head_dim, v_head_dim = dims
    return make_case(
        batch, num_kv_heads=1, group=group, head_dim=head_dim, v_head_dim=v_head_dim, v_in_k=True,
        **options,
    )  # fmt: skip


def family(tokens: int, tails: tuple[int, ...]) -> Batch:
    """Requests that share tokens and have tails of their own; a last one is alone."""
    forks = [Fork(0, 0, tokens), *(Fork(0, tokens, own) for own in tails), Fork(0, 0, 3)]
    return build_batch(forks, growth=1)


@pytest.mark.parametrize(
    ("group", "way", "dtype"),
    [
        # Tiles of 16, 32 and 64 rows, the last in blocks that end amid a request's heads or not.
        (16, WAY, torch.float16),
        (16, ONE_LAUNCH, torch.float16),
        (32, WAY, torch.float32),
        (128, WAY, torch.float16),
        pytest.param(128, ONE_LAUNCH, torch.float32, marks=pytest.mark.extended),
    ],
    ids=str,
)
def test_dims_of_deepseek(group: int, way: str, dtype: torch.dtype, seed: int) -> None:
    """Whole packs, then splits; requests with one partial and with many; grown tails."""
    tails = (2, 0) if group < 128 else (2,)  # the interpreter takes long
    case = latent_case(family(70, tails), group, DEEPSEEK, dtype=dtype, seed=seed)
    loaded = load(case, way, "node", FEW_SPLITS)
    partials = loaded.plan.request_indptr[1:] - loaded.plan.request_indptr[:-1]
    assert partials.max() > 2
    loaded.check()
    loaded = load(case, way, "node", WHOLE, executor=loaded.executor)
    assert 1 in loaded.plan.request_indptr[1:] - loaded.plan.request_indptr[:-1]
    loaded.executor.append(*case.grow())
    loaded.check()


@pytest.mark.parametrize("way", TRITON)
@given(data=st.data(), batch=batches(max_requests=6, max_tokens=70), seed=st.integers(0, 1 << 16))
def test_generated_batches(way: str, data: st.DataObject, batch: Batch, seed: int) -> None:
    dims = data.draw(st.sampled_from(SMALL_DIMS))
    group = data.draw(st.sampled_from((1, 3, 16, 32, 128)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16)))
    case = latent_case(batch, group, dims, dtype=dtype, seed=seed)
    policy, profile = (
        data.draw(st.sampled_from([*POLICIES])),
        data.draw(st.sampled_from([WHOLE, SPLITS])),
    )
    load(case, way, policy, profile).check()


@pytest.mark.parametrize(
    "options",
    [
        {"logit_cap": 1.5},
        {"k_scale": torch.tensor([-1.5]), "v_scale": torch.tensor([-0.5])},
        {"k_scale": 0.25, "v_scale": 3.0, "logit_cap": 0.5},
    ],
    ids=["cap", "negative", "both"],
)
def test_numbers_of_a_layer(options: dict[str, Any], seed: int) -> None:
    case = latent_case(family(40, (9, 1, 0)), 16, (44, 32), options=options, seed=seed)
    load(case, WAY, "node", SPLITS).check()


def test_several_kv_heads_and_strided_rows(seed: int) -> None:
    """K with NaN behind every row, and heads that come one after the other."""
    batch = family(40, (9, 1, 0))
    case = make_case(
        batch, num_kv_heads=2, group=3, head_dim=40, v_head_dim=32, v_in_k=True, seed=seed
    )
    room = torch.full((2, batch.num_slots, 48), torch.nan)
    room[..., :40] = case.k_cache.transpose(0, 1)
    case.k_cache = room[..., :40].transpose(0, 1)
    case.v_cache = case.k_cache[..., :32]
    load(case, WAY, "node", SPLITS).check()


def test_v_is_not_read(seed: int) -> None:
    """What is passed for it may be anything: the kernel has K alone."""
    case = latent_case(family(40, (9, 1, 0)), 16, (40, 32), seed=seed)
    expected, loaded = case.oracle(), load(case, WAY, "node", SPLITS)
    case.v_cache = torch.full_like(case.v_cache, torch.nan)
    assert_close(loaded.run(), expected, tolerances_of(loaded.executor))


def rest_of_k_lost(case: AttentionCase) -> None:
    case.k_cache[..., 32:] = 0


def high_half_of_v_swapped(case: AttentionCase) -> None:
    case.k_cache[..., :32] = case.k_cache[..., :32].roll(16, -1)
    case.q[..., :32] = case.q[..., :32].roll(16, -1)


@pytest.mark.parametrize("change", [rest_of_k_lost, high_half_of_v_swapped])
def test_control_a_change_is_seen(change: Callable[[AttentionCase], None], seed: int) -> None:
    """The scores are the same in the second: only what is written differs."""
    case = latent_case(family(40, (9, 1, 0)), 16, (40, 32), seed=seed)
    expected, loaded = case.oracle(), load(case, WAY, "node", SPLITS)
    change(case)
    found = loaded.run()
    if change is high_half_of_v_swapped:
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(found, expected, tolerances_of(loaded.executor))


def test_modes_and_rows_follow_the_accumulator() -> None:
    """A batch of more rows than the narrow tile has is launched as a large one."""
    shape = AttentionShape(16, 1, *DEEPSEEK, 2, 2, v_in_k=True)
    executor = TritonExecutor(shape, torch.device("cpu"))
    assert executor.max_block_rows == 64
    assert executor.modes == ("fused", "in_kernel")
    assert TritonExecutor(replace(shape, num_qo_heads=32), torch.device("cpu")).modes == (
        "streams",
        "launch",
    )
    assert TritonExecutor(replace(shape, v_in_k=False), torch.device("cpu")).max_block_rows == 32


@pytest.mark.parametrize(
    ("capability", "shared", "fits"),
    [((9, 0), 227, True), ((8, 0), 163, True), ((8, 9), 99, False), ((12, 0), 99, False)],
)
def test_gpus_with_less_shared_memory_have_no_tile(
    capability: tuple[int, int], shared: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    shape = AttentionShape(16, 1, *DEEPSEEK, 2, 2, v_in_k=True)
    why_not = TritonExecutor.why_not_shape(shape, torch.device("cuda"))
    assert fits == (why_not is None)
    if why_not:
        legal = f"legal: up to {shared * 1024} on this GPU, or the executor 'torch'"
        assert why_not.endswith(f"bytes of shared memory; {legal}")


def test_a_cache_of_another_dtype_than_q(seed: int) -> None:
    case = latent_case(family(40, (9, 1, 0)), 16, (40, 32), kv_dtype=torch.float16, seed=seed)
    load(case, WAY, "node", SPLITS).check()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kv_itemsize": 1}, r"^kv_itemsize=1 with v_in_k has no tile .*; legal: 2 or 4, or .*$"),
        ({"head_dim": 2048, "v_head_dim": 2048}, r"^v_head_dim=2048 has no tile .*; legal: less"),
    ],
)
def test_shapes_without_a_tile(changes: dict[str, Any], complaint: str) -> None:
    shape = replace(AttentionShape(16, 1, *DEEPSEEK, 2, 2, v_in_k=True), **changes)
    with pytest.raises(ValueError, match=complaint):
        build_executor(shape, WAY)
