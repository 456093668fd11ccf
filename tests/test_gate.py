"""The gate: its model of the stock kernel, its choices, and that it does not flutter."""

from __future__ import annotations

import logging
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_prefix import gate
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


def choose(gate: Gate, forest: PrefixForest) -> bool:
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


# By NVIDIA's data sheets, as the gate has them.
DEVICES = {
    "H100": DeviceLimits(3.35e12, 990e12, 50 << 20, 132),
    "H200": H200,
    "B200": DeviceLimits(8e12, 2.25e15, 126 << 20, 148),
}


@pytest.mark.parametrize("device", DEVICES)
def test_latent_attention_pays_with_few_heads_and_not_with_128(device: str) -> None:
    """The more heads read a latent, the more of stock's time is arithmetic, which stays."""
    limits = DEVICES[device]

    def gains(heads: int, batch: int, shared: int) -> float:
        shape = AttentionShape(heads, 1, 576, 512, 2, 2, v_in_k=True)
        forest = one_prefix(batch, shared, 256)
        found = Gate(limits, "fa3").choose([(planned(forest, shape), 61)], forest)
        gain = found.stock_us / found.packed_us
        assert found.packs is (gain > 1.06)
        return gain

    for batch, shared in ((64, 8192), (16, 32768), (256, 2048), (64, 65536)):
        all_gains = [gains(heads, batch, shared) for heads in (8, 16, 32, 64, 128)]
        assert all(more > fewer - 0.03 for more, fewer in pairwise(all_gains))
        assert all_gains[0] > 1.9
        assert all_gains[1] > 1.1
        assert all(0.95 < gain < 1.01 for gain in all_gains[3:])  # the same arithmetic
    # Beyond the L2 cache stock reads from memory, and 32 heads are few where that is slow.
    assert gains(16, 64, 65536) > 1.25 * gains(16, 64, 8192) or device == "B200"
    assert (gains(32, 64, 131072) > 1.05) is (device != "B200")
    if device == "H100":  # docs/compatibility.md
        assert 1 / gains(16, 64, 8192) == pytest.approx(0.64, abs=0.01)
        assert 1 / gains(16, 64, 65536) == pytest.approx(0.43, abs=0.01)
        assert 1 / gains(32, 64, 65536) == pytest.approx(0.86, abs=0.01)


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
        assert made.choose([(planned(forest), 32)], forest) == (True, None, 0.0, 0.0)


H100 = {"name": "NVIDIA H100 80GB HBM3", "major": 9, "L2_cache_size": 50 << 20}


@pytest.mark.parametrize(
    ("properties", "bandwidth", "assumed"),
    [
        (H100 | {"memory_clock_rate": 2619000, "memory_bus_width": 5120}, 3.352e12, None),
        (H100, 3.35e12, None),
        (H100 | {"name": "NVIDIA A100-SXM4-80GB", "major": 8}, 2.039e12, None),
        (H100 | {"name": "NVIDIA B200", "major": 10}, 8e12, None),
        (H100 | {"name": "NVIDIA H100 MIG 1g.10gb"}, 4.8e12, "a bandwidth of 4.8 TB/s"),
        (H100 | {"major": 12}, 3.35e12, "7.5 TFLOP/s per multiprocessor"),
        (H100 | {"name": "R1", "L2_cache_size": 0}, 4.8e12, "4.8 TB/s, 50 MiB of L2 cache"),
    ],
)
def test_limits_of_a_gpu_and_what_the_log_says_of_an_unknown_one(
    properties: dict[str, Any],
    bandwidth: float,
    assumed: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = SimpleNamespace(multi_processor_count=114, **properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    gate._say_assumed.cache_clear()
    with caplog.at_level(logging.WARNING):
        limits = [limits_of(torch.device("cuda", 0)) for _ in range(2)]
    assert limits[0] == limits[1]
    assert limits[0].read_bytes_per_s == pytest.approx(bandwidth, rel=1e-3)
    assert (limits[0].l2_bytes, limits[0].num_sms) == (50 << 20, 114)
    flops = {8: 2.9e12, 10: 15e12}.get(properties["major"], 7.5e12)
    assert limits[0].flop_per_s == 114 * flops
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (assumed is not None)  # once
    if assumed:
        assert said[0].endswith(assumed)
        assert properties["name"] in said[0]


@pytest.mark.parametrize("stock", ["triton", "fa3"])
def test_several_query_tokens_of_a_request_read_its_kv_once(stock: str) -> None:
    """On either side; they cost arithmetic, of which sharing saves nothing, and queries."""
    forest, planner = one_prefix(64, 8192, 256), PackPlanner(LLAMA_8B, GPU_PROFILE)
    plans = [planner.plan(forest, query_lens=np.full(64, n)) for n in (1, 4)]
    decode, verify = (predict_packed(plan, H200) for plan in plans)
    assert decode < verify < 4 * decode
    one, four = (
        predict_stock(forest, LLAMA_8B, H200, stock, query_tokens=count) for count in (1, 4)
    )
    assert one < four * 1.5
    assert four < 1.5 * one
    assert Gate(H200, stock).choose([(plans[1], 32)], forest).stock_us == pytest.approx(32 * four)
