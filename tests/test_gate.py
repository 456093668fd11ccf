"""The gate: its model of the stock kernel, its choices, and that it does not flutter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_prefix.forest import PrefixForest
from sglang_prefix.gate import (
    DeviceLimits,
    Gate,
    SharingGate,
    limits_of,
    make_gate,
    predict_packed,
    predict_stock,
    triton_kv_splits,
)
from sglang_prefix.packing import GPU_PROFILE, AttentionShape
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.planner import PackPlanner

LLAMA_8B = AttentionShape(32, 8, 128, 128, 2, 2)
H200 = limits_of(torch.device("cpu"))


def one_prefix(batch: int, shared: int, private: int) -> PrefixForest:
    """``batch`` requests with a common prefix and a tail each."""
    lens = np.full(batch, shared + private, dtype=np.int64)
    return PrefixForest.from_neighbours(np.arange(batch), np.full(batch - 1, shared), lens)


def planned(forest: PrefixForest, shape: AttentionShape = LLAMA_8B) -> CostedPlan:
    return PackPlanner(shape, GPU_PROFILE).plan(forest)


def choose(gate: Gate | SharingGate, forest: PrefixForest) -> bool:
    return gate.choose([(planned(forest), 32)], forest).packs


@pytest.mark.parametrize("stock", ["triton", "fa3"])
@pytest.mark.parametrize(
    ("batch", "shared", "private", "packs"),
    [
        (64, 8192, 256, True),  # rollouts
        (256, 2048, 128, True),
        (16, 32768, 512, True),
        (8, 0, 4096, False),
        (4, 16, 8192, False),  # a few shared tokens under long tails
        (2, 64, 64, False),  # fixed costs decide
    ],
)
def test_it_packs_what_saves_much_and_nothing_else(
    stock: str, batch: int, shared: int, private: int, packs: bool
) -> None:
    assert choose(Gate(H200, stock), one_prefix(batch, shared, private)) is packs


def test_a_prefix_that_fits_the_l2_cache_is_cheap_for_stock_too() -> None:
    forest = one_prefix(32, 2048, 64)
    without = DeviceLimits(H200.read_bytes_per_s, H200.flop_per_s, 1, H200.num_sms)
    for stock in ("triton", "fa3"):
        cheap = predict_stock(forest, LLAMA_8B, H200, stock)
        dear = predict_stock(forest, LLAMA_8B, without, stock)
        assert cheap < dear
    assert predict_packed(planned(forest), H200) == predict_packed(planned(forest), without)


def test_it_does_not_flutter_around_the_point_where_both_are_equal() -> None:
    lengths = range(0, 4000, 20)
    rising, falling = Gate(H200, "fa3"), Gate(H200, "fa3")
    up = [choose(rising, one_prefix(12, shared, 600)) for shared in lengths]
    down = [choose(falling, one_prefix(12, shared, 600)) for shared in reversed(lengths)][::-1]
    assert up == sorted(up)
    assert down == sorted(down)
    # Going back takes less than coming had to bring: in between, what was decided stays.
    assert len(lengths) > sum(down) > sum(up) > 0


def test_all_shapes_of_a_model_decide_together_by_their_layers() -> None:
    many, few = one_prefix(64, 8192, 64), one_prefix(64, 8192, 64)
    tiny = AttentionShape(1, 1, 64, 64, 2, 2)
    both = [(planned(many), 30), (planned(few, tiny), 2)]
    decision = Gate(H200, "fa3").choose(both, many)
    assert decision.packs
    assert decision.reason is None
    alone = Gate(H200, "fa3").choose(both[:1], many)
    assert decision.packed_us > alone.packed_us
    assert decision.stock_us > alone.stock_us


@pytest.mark.parametrize("seed", range(4))
def test_splits_are_those_of_sglangs_kernel(seed: int) -> None:
    """Compared with the kernel itself, in the interpreter."""
    from sglang.srt.layers.attention import triton_backend

    kernel = triton_backend.get_num_kv_splits_triton
    rng = np.random.default_rng(seed)
    for heads, kv_heads in ((32, 8), (32, 32), (8, 1), (64, 4)):
        shape = AttentionShape(heads, kv_heads, 128, 128, 2, 2)
        lens = rng.integers(1, int(rng.choice([40, 700, 30000])), int(rng.integers(1, 60)))
        found = torch.zeros(len(lens), dtype=torch.int32)
        arguments = (len(lens), 1, heads, kv_heads, 8, H200.num_sms)
        kernel[(1,)](found, torch.from_numpy(lens), *arguments, MAX_NUM_SEQ=64)
        assert (triton_kv_splits(lens, shape, H200.num_sms) == found.numpy()).all()


@pytest.mark.parametrize(
    ("name", "executor", "gate"),
    [
        ("auto", "torch", SharingGate),
        ("auto", "native", None),
        ("auto", "triton", None),
        ("always", "torch", None),
    ],
)
def test_the_gate_of_a_cpu(name: str, executor: str, gate: type | None) -> None:
    made = make_gate(name, torch.device("cpu"), "torch_native", [executor])
    assert type(made) is (gate or type(None))
    if made is not None:
        forest = one_prefix(2, 1, 1)
        assert choose(made, forest)
