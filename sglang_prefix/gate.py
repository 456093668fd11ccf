"""The gate: whether packing a batch is predicted to be faster than the stock kernel.

Both sides are predicted with the same model, so that its errors cancel where the two do the same:
bytes over bandwidth, KV that is read again from the L2 cache at the cache's speed, the longest
program of the launch, arithmetic, and the launches. The stock side follows the split rule of
SGLang's Triton backend; other stock backends are taken to balance their work perfectly, which
favours them. A batch in which nothing is shared is never packed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_prefix.files import read_json
from sglang_prefix.forest import PrefixForest
from sglang_prefix.packing import AttentionShape
from sglang_prefix.packing.gpu import H200_BYTES_PER_S, H200_SMS, L2_SPEEDUP
from sglang_prefix.packing.layout import CostedPlan

__all__ = [
    "H200",
    "LIMITS_FILE",
    "Decision",
    "DeviceLimits",
    "Gate",
    "SharingGate",
    "limits_of",
    "load_limits",
    "make_gate",
    "pays",
    "predict_packed",
    "predict_stock",
    "triton_kv_splits",
]

IntArray = NDArray[np.int64]

logger = logging.getLogger(__name__)

# Round figures, to be replaced by measurements. L2 delivers some 2.5 times what main memory does; a
# program whose neighbours are idle draws up to twice its share of the bandwidth; attention attains
# some 40% of the matrix units' rate; a launch inside a graph costs about 2 us with its gap.
_LONE_PROGRAM_SPEEDUP = 2.0
_ATTAINED_FLOP_SHARE = 0.4
_LAUNCH_US = 2.0
_STOCK_LAUNCHES = 2  # the split attention and its merge
_PACKED_LAUNCHES = 3  # two tile classes and the merge
# Row blocks are computed whole; 16 rows are the least that the matrix units take.
_LEAST_ROWS = 16
# Packing starts when it is predicted to save this share, and stops when it saves nothing.
_ENTER_GAIN = 0.05

# Splits that SGLang's Triton backend allows at most (--triton-attention-num-kv-splits).
_TRITON_MAX_SPLITS = 8
_TRITON_HEAD_TILE = 16


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What the prediction knows of a device.

    Attributes:
        read_bytes_per_s: bandwidth of main memory.
        flop_per_s: rate of the matrix units for 16-bit values.
        l2_bytes: size of the L2 cache.
        num_sms: multiprocessors.
        launch_us: of a launch inside a graph, with its gap.
    """

    read_bytes_per_s: float
    flop_per_s: float
    l2_bytes: int
    num_sms: int
    launch_us: float = _LAUNCH_US


# From NVIDIA's data sheets: dense 16-bit FLOP/s per multiprocessor, by major compute capability, of
# A100 (312e12 / 108), H100 and H200 (990e12 / 132), and B200 (2,250e12 / 148).
_FLOP_PER_SM = {8: 2.9e12, 9: 7.5e12, 10: 15e12}
# NVIDIA's data sheet for the H200.
H200 = DeviceLimits(H200_BYTES_PER_S, 990e12, 50 << 20, H200_SMS)

# Where the driver does not say: of boards by their names in torch, from NVIDIA's data sheets for
# A100, L4, L40S, H100, H200 and DGX B200. A MIG slice has a part of it and a name of its own.
_READ_BYTES_PER_S = {
    "NVIDIA A100-PCIE-40GB": 1.555e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA L4": 0.3e12,
    "NVIDIA L40S": 0.864e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 NVL": 3.9e12,
    "NVIDIA H200": H200.read_bytes_per_s,
    "NVIDIA H200 NVL": H200.read_bytes_per_s,
    "NVIDIA B200": 8.0e12,
}

# Of devices by name, as torch names them; written by `sglang-prefix bench gpu --use`.
LIMITS_FILE = Path(__file__).with_name("device_limits.json")
# What is measured, and what is above any measurement.
_MEASURED = {"read_bytes_per_s": 1e15, "flop_per_s": 1e18, "launch_us": 1e3}


def load_limits(path: Path) -> dict[str, dict[str, float]]:
    """Read what was measured on devices, by their names.

    Raises:
        ValueError: the file is no such table; one line.
    """
    found: dict[str, dict[str, float]] = {}
    try:
        for device, row in read_json(path).items():
            found[device] = {name: row[name] for name in _MEASURED}
            for name, value in found[device].items():
                if type(value) not in (int, float) or not 0 < value <= _MEASURED[name]:
                    raise ValueError(f"{name} of {device} is {value!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of device limits: {error!r}") from error
    return found


def limits_of(device: torch.device) -> DeviceLimits:
    """Limits of a CUDA device: as they were measured on one of its name, or else from its driver
    and data sheets; those of an H200 elsewhere.

    What none of them says is taken from an H200, too, and the log says so once.
    """
    if device.type != "cuda":
        return H200
    found = torch.cuda.get_device_properties(device)
    # kHz, twice per clock, over a bus of so many bits
    bandwidth = 2e3 * getattr(found, "memory_clock_rate", 0)
    bandwidth *= getattr(found, "memory_bus_width", 0) / 8
    bandwidth = bandwidth or _READ_BYTES_PER_S.get(found.name, 0.0)
    flop_per_sm = _FLOP_PER_SM.get(found.major, 0.0)
    l2_bytes = getattr(found, "L2_cache_size", 0)
    unknown = {
        f"a bandwidth of {H200.read_bytes_per_s / 1e12:.1f} TB/s": bandwidth,
        f"{_FLOP_PER_SM[9] / 1e12:.1f} TFLOP/s per multiprocessor": flop_per_sm,
        f"{H200.l2_bytes >> 20} MiB of L2 cache": l2_bytes,
    }
    assumed = ", ".join(figure for figure, value in unknown.items() if not value)
    measured: Any = load_limits(LIMITS_FILE).get(found.name, {})
    if assumed and not measured:
        _say_assumed(found.name, assumed)
    sms = found.multi_processor_count
    said = DeviceLimits(
        bandwidth or H200.read_bytes_per_s,
        sms * (flop_per_sm or _FLOP_PER_SM[9]),
        l2_bytes or H200.l2_bytes,
        sms,
    )
    return replace(said, **measured)


@cache
def _say_assumed(name: str, assumed: str) -> None:
    logger.warning(
        "prefix attention: the gate does not know the GPU %s; it takes an H200's %s", name, assumed
    )


def make_gate(
    name: str, device: torch.device, stock_name: str, executors: Sequence[str]
) -> Gate | SharingGate | None:
    """The gate of a setting; None where every batch is packed.

    On the CPU that is what "auto" comes to with the native executor, which is faster than SGLang's
    ``torch_native`` whatever is shared. The torch executor may be slower where nothing is
    (docs/performance.md).
    """
    if name != "auto":
        return None
    if device.type == "cuda":
        return Gate(limits_of(device), stock_name)
    return SharingGate() if "torch" in executors else None


class Decision(NamedTuple):
    """What the gate decided, why (a key of `fallback.REASONS`, or None), and its predictions, zeros
    if it makes none."""

    packs: bool
    reason: str | None
    packed_us: float = 0.0
    stock_us: float = 0.0


def pays(packed_us: float, stock_us: float, *, packs: bool) -> bool:
    """Whether packing is predicted to pay, with hysteresis: ``packs`` says that it is under way."""
    return packed_us < (stock_us if packs else stock_us * (1 - _ENTER_GAIN))


class Gate:
    """Decides batch by batch, with hysteresis.

    Args:
        limits: of the device.
        stock_name: SGLang's name of the stock backend.
    """

    def __init__(self, limits: DeviceLimits, stock_name: str) -> None:
        self._limits = limits
        self._stock_name = stock_name
        self._packs = False

    def choose(self, plans: Sequence[tuple[CostedPlan, int]], forest: PrefixForest) -> Decision:
        """Decide from the plans of a batch, each with the number of layers that it serves."""
        packed = stock = 0.0
        for plan, layers in plans:
            shape = plan.costs.shape
            packed += layers * predict_packed(plan, self._limits)
            queries, lens = 1, forest.seq_lens
            if plan.query_lens is not None:  # of the request of an average token
                queries = round(int(plan.query_lens @ lens) / int(lens.sum()))
            stock += layers * predict_stock(
                forest, shape, self._limits, self._stock_name, query_tokens=queries
            )
        self._packs = pays(packed, stock, packs=self._packs)
        return Decision(self._packs, None if self._packs else "gate-no-gain", packed, stock)

    def leave(self) -> None:
        """Note a batch that goes to the stock backend without being planned."""
        self._packs = False


class SharingGate:
    """Packs every batch in which anything is shared; predicts nothing. Its caller sees to others,
    as with any gate."""

    def choose(self, plans: Sequence[tuple[CostedPlan, int]], forest: PrefixForest) -> Decision:
        """Pack."""
        return Decision(True, None)

    def leave(self) -> None:
        """Nothing to note."""


def predict_packed(plan: CostedPlan, limits: DeviceLimits) -> float:
    """Microseconds of one layer under a plan."""
    costs = plan.costs
    shape = costs.shape
    lengths = plan.pack_end - plan.pack_start
    num_queries = np.diff(plan.query_indptr)
    blocks = -(-num_queries * shape.group_size // costs.device.max_block_rows)
    tokens, rereads = int(lengths.sum()), int((lengths * (blocks - 1)).sum())
    merged = plan.num_partials if plan.num_partials > plan.num_rows else 0
    side_bytes = plan.num_partials * shape.query_bytes + merged * shape.partial_bytes
    longest = int((-(-lengths // plan.num_splits)).max(initial=0))
    rows = np.maximum(num_queries * shape.group_size, _LEAST_ROWS)
    return max(
        _predict(shape, limits, tokens, rereads, side_bytes, longest, _PACKED_LAUNCHES),
        _arithmetic(shape, limits, int((rows * lengths).sum()), _PACKED_LAUNCHES),
    )


def predict_stock(
    forest: PrefixForest,
    shape: AttentionShape,
    limits: DeviceLimits,
    stock_name: str,
    *,
    query_tokens: int = 1,
) -> float:
    """Microseconds of one layer of a stock backend.

    Requests that share KV read it one by one; what fits into the L2 cache is read from there. With
    as many query heads per KV head as multi-head latent attention has, 128 on one rank, arithmetic
    takes longer than that, and packing saves none of it. Elsewhere that raises what is predicted
    for 8-bit KV on an A100, by a quarter at most, and for 32 heads and more on one KV head.

    Several query tokens of a request read its KV together. How the Triton backend then cuts it
    differs between releases and models, so that is taken to be balanced, too.
    """
    lens = forest.seq_lens
    unique = forest.unique_tokens
    rereads = int(lens.sum()) - unique
    shared = int((forest.node_stop - forest.node_start).sum()) * shape.kv_token_bytes
    in_cache = int(rereads * min(1.0, limits.l2_bytes / max(shared, 1)))
    if stock_name == "triton" and query_tokens == 1:
        longest = int((-(-lens // triton_kv_splits(lens, shape, limits.num_sms))).max())
    else:
        longest = 0  # balanced perfectly
    side_bytes = len(lens) * query_tokens * shape.query_bytes
    from_memory = unique + rereads - in_cache
    rows = max(shape.group_size * query_tokens, _LEAST_ROWS)
    return max(
        _predict(shape, limits, from_memory, in_cache, side_bytes, longest, _STOCK_LAUNCHES),
        _arithmetic(shape, limits, rows * int(lens.sum()), _STOCK_LAUNCHES),
    )


def triton_kv_splits(lens: IntArray, shape: AttentionShape, num_sms: int) -> IntArray:
    """Splits [B] that SGLang's Triton backend cuts each request into (0.5.17 to 0.5.23).

    The larger of two rules: the longest request over the shortest, unless all are within 25% of
    each other; and as many as fill the multiprocessors, the more the longer the requests are.
    """
    longest, shortest = int(lens.max()), int(lens.min())
    if longest * 8 < shortest * 10:
        shortest = longest
    by_length = min(-(-longest // max(shortest, 1)), _TRITON_MAX_SPLITS)
    head_tile = min(_TRITON_HEAD_TILE, shape.group_size)
    programs = len(lens) * -(-shape.num_qo_heads // head_tile)
    cores = int(num_sms * max(np.log2(longest / 64), 1.0))
    by_cores = min(-(-cores // programs), _TRITON_MAX_SPLITS)
    chunks = [-(-longest // splits) for splits in (by_length, by_cores)]
    return np.maximum(-(-lens // chunks[0]), -(-lens // chunks[1]))


def _arithmetic(
    shape: AttentionShape, limits: DeviceLimits, row_tokens: int, num_launches: int
) -> float:
    """Microseconds that one layer takes by its arithmetic: ``row_tokens`` pairs per KV head."""
    flops = 2 * row_tokens * shape.num_kv_heads * (shape.head_dim + shape.v_head_dim)
    return 1e6 * flops / (limits.flop_per_s * _ATTAINED_FLOP_SHARE) + (
        num_launches * limits.launch_us
    )


def _predict(
    shape: AttentionShape,
    limits: DeviceLimits,
    tokens: int,
    cached_tokens: int,
    side_bytes: int,
    longest_tokens: int,
    num_launches: int,
) -> float:
    """Microseconds of one layer that reads ``tokens`` from memory and others from the cache."""
    speed = limits.read_bytes_per_s
    read = (tokens + cached_tokens / L2_SPEEDUP) * shape.kv_token_bytes + side_bytes
    per_head = longest_tokens * shape.kv_token_bytes / shape.num_kv_heads
    alone = per_head / (speed / limits.num_sms * _LONE_PROGRAM_SPEEDUP)
    return 1e6 * max(read / speed, alone) + num_launches * limits.launch_us
