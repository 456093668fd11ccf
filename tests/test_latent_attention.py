"""Executors of the CPU where V is the first elements of K: absorbed multi-head latent attention.

DeepSeek's dims are 512 for the latent and 64 with RoPE; a rank has 16 to 128 query heads, all of
which read the one KV head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefix_kernels.plan import AttentionShape
from sglang_prefix import PrefixDecodeWrapper
from tests.attention import (
    AttentionCase,
    Loaded,
    assert_close,
    load,
    make_case,
    tolerances_of,
)
from tests.forests import Batch, Fork, batches, build_batch
from tests.test_native_executor import AS_AVX512, ON_X86, TILE, use_library_of

pytestmark = pytest.mark.usefixtures("nan_memory")

CPU_WAYS = ("torch", "native")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KV_DTYPES = (None, torch.float8_e4m3fn, torch.float8_e5m2)
# Four requests share a whole tile and more, two of them a part of another; one is alone.
FOREST = [
    Fork(0, 0, TILE + 70),
    Fork(0, TILE + 60, 30),
    Fork(0, TILE + 60, 1),
    Fork(1, TILE + 80, 40),
    Fork(9, 0, 3),
]


def latent_case(
    batch: Batch,
    group: int,
    dims: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> AttentionCase:
    """A case whose V is a view of K, as SGLang's ``get_value_buffer`` returns it."""
    heads = {"num_kv_heads": 1, "group": group, "head_dim": dims[0], "v_head_dim": dims[1]}
    case = make_case(batch, **heads, v_in_k=True, dtype=dtype, kv_dtype=kv_dtype, seed=seed)  # type: ignore[arg-type]
    assert case.shape.v_in_k
    assert case.shape.kv_row_size == dims[0]
    return case


def check_while_tails_grow(case: AttentionCase, way: str, policy: str) -> Loaded:
    loaded = load(case, way, policy)
    loaded.check()
    loaded.executor.append(*case.grow())
    loaded.check()
    return loaded


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Whose buffers are those of the run before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", CPU_WAYS)
@pytest.mark.parametrize(
    ("group", "order", "dtype"),
    [
        (16, "scattered", torch.bfloat16),
        (32, "mixed", torch.float32),
        (128, "contiguous", torch.float16),
    ],
    ids=str,
)
def test_dims_of_deepseek(way: str, group: int, order: str, dtype: torch.dtype) -> None:
    batch = build_batch(FOREST, order=order, growth=1)
    loaded = check_while_tails_grow(latent_case(batch, group, (576, 512), dtype), way, "node")
    assert loaded.plan.num_shared_packs >= 2


@pytest.mark.parametrize("way", CPU_WAYS)
@given(data=st.data(), batch=batches(max_requests=8, max_tokens=80), seed=st.integers(0, 1 << 16))
def test_generated_batches(way: str, data: st.DataObject, batch: Batch, seed: int) -> None:
    dims = data.draw(st.sampled_from(((40, 32), (33, 5), (16, 16), (24, 8))))
    group = data.draw(st.sampled_from((1, 3, 8, 16, 128)))
    dtype, kv_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(KV_DTYPES))
    load(latent_case(batch, group, dims, dtype, kv_dtype, seed), way).check()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("flags", [None, pytest.param(AS_AVX512, marks=ON_X86)], ids=["", "pairs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_past_the_last_are_zero(
    dtype: torch.dtype,
    flags: tuple[str, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tile of infinities was in the place of a copied K whose last rows are not there."""
    if flags is not None:
        use_library_of(flags, monkeypatch)
    whole = latent_case(build_batch([Fork(0, 0, TILE)], order="scattered"), 16, (40, 32), dtype)
    whole.k_cache.fill_(torch.inf)
    load(whole, "native").run()
    for order in ("scattered", "contiguous"):
        for tokens in (1, 65, TILE, TILE + 33):
            batch = build_batch([Fork(0, 0, tokens), Fork(0, tokens, 1)], order=order)
            load(latent_case(batch, 16, (40, 32), dtype), "native", "node").check()


@pytest.mark.parametrize("way", CPU_WAYS)
def test_one_tensor_gives_what_two_give(way: str) -> None:
    """Bit for bit: only where V is read from is different."""
    one = latent_case(build_batch(FOREST, order="mixed"), 16, (40, 32))
    two = replace(one, v_cache=one.v_cache.clone())
    assert not two.shape.v_in_k
    for found, expected in zip(load(one, way).run(), load(two, way).run(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("executor", CPU_WAYS)
def test_the_wrapper(executor: str) -> None:
    case = latent_case(build_batch(FOREST), 16, (40, 32))
    heads: Any = {"v_head_dim": 32, "v_in_k": True, "dtype": torch.float32}
    wrapper = PrefixDecodeWrapper(16, 1, 40, **heads, executor=executor, policy="node")
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    found = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    assert isinstance(found, tuple)
    assert_close(found, case.oracle())
    assert wrapper.stats.kv_tokens_read < wrapper.stats.kv_tokens_logical
    with pytest.raises(ValueError, match=r"legal with v_in_k: k_cache\[\.\.\., :32\]"):
        wrapper.run(case.q, case.k_cache, case.v_cache.clone())
    with pytest.raises(ValueError, match="v_head_dim=41; legal with v_in_k: up to head_dim=40"):
        PrefixDecodeWrapper(16, 1, 40, **heads | {"v_head_dim": 41}, executor=executor)
    with pytest.raises(ValueError, match="v_in_k=1; legal: True or False"):
        PrefixDecodeWrapper(16, 1, 40, **heads | {"v_in_k": 1}, executor=executor)


def test_bytes_of_the_latent_count_once() -> None:
    latent = AttentionShape(16, 1, 576, 512, 2, 2, v_in_k=True)
    assert latent.kv_token_bytes == 2 * 576 + 4
    assert replace(latent, v_in_k=False).kv_token_bytes == 2 * (576 + 512) + 4
    with pytest.raises(ValueError, match="v_head_dim=577; legal with v_in_k: up to head_dim=576"):
        replace(latent, v_head_dim=577)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_v_that_begins_where_k_does_and_is_longer(dtype: torch.dtype) -> None:
    """Two views of one tensor, which nobody has called latents."""
    case = make_case(build_batch(FOREST), group=8, head_dim=64, v_head_dim=128, dtype=dtype)
    case.k_cache = case.v_cache[..., :64]
    wrapper = PrefixDecodeWrapper(
        16, 2, 64, v_head_dim=128, dtype=dtype, policy="node", executor="native"
    )
    wrapper.plan(case.req_to_token, case.req_pool_indices, case.seq_lens)
    out, lse = wrapper.run(case.q, case.k_cache, case.v_cache, return_lse=True)
    assert_close((out, lse), case.oracle(), tolerances_of(wrapper._executor))
