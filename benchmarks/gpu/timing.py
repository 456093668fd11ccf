"""Timing on a GPU: graph replays after an L2 flush, interleaved, medians; and the device's limits.

`DryMeter` has the same methods for the CPU. What it returns is no measurement, and says so.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.timing import interleaved
from sglang_prefix.bench.graphs import capture

__all__ = ["CudaMeter", "DryMeter", "Meter", "meter_for", "wall_us"]

Work = Callable[[], object]

# A read of this many times the L2 leaves nothing of the caches in it. A read, not a write: dirty
# lines would be written back inside the timed region.
_FLUSH_FACTOR = 4
_STREAM_BYTES = 4 << 30
_MATRIX_SIZE = 8192
_LAUNCHES = 64
# (floats per iteration of a program, warps, programs per SM); the fastest counts.
_STREAM_CONFIGS = ((4096, 4, 8), (8192, 8, 4), (16384, 8, 4))


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(x_ptr, out_ptr, num_blocks, BLOCK: tl.constexpr):  # type: ignore  # noqa: N803
    """Read ``num_blocks * BLOCK`` floats and write one sum per program."""
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        total += tl.load(x_ptr + tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _empty_kernel(x_ptr):  # type: ignore
    """Do nothing."""


class Meter(ABC):
    """What the benchmarks ask of a clock."""

    dry = False

    @abstractmethod
    def replayable(self, work: Work) -> Work:
        """``work`` in the form that is timed."""

    @abstractmethod
    def interleaved(self, replays: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
        """Seconds of every replay in every round; each round runs all of them, in turn."""

    @abstractmethod
    def limits(self) -> dict[str, Any]:
        """Measured here and now: bytes per second read, FLOP per second, us per empty launch."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the device."""

    def rounds_for(self, replays: Mapping[str, Work], seconds: float, most: int) -> int:
        """Rounds that fit into ``seconds``, at least 5, by one round that is thrown away."""
        once = sum(times[0] for times in self.interleaved(replays, 1).values())
        return max(5, min(most, int(seconds / max(once, 1e-6))))


class CudaMeter(Meter):
    """CUDA events around graph replays.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        self._num_sms = properties.multi_processor_count
        flush = _FLUSH_FACTOR * properties.L2_cache_size
        self._flush_buffer = torch.ones(flush // 4, device=device)
        self._sums = torch.empty(self._num_sms * 8, device=device)

    def replayable(self, work: Work) -> Work:
        return capture(work, self._device)

    def interleaved(self, replays: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in replays}
        for _ in range(rounds):
            events = {}
            for name, replay in replays.items():
                began, ended = _event(), _event()
                self._read(self._flush_buffer, *_STREAM_CONFIGS[0])
                began.record()
                replay()
                ended.record()
                events[name] = (began, ended)
            torch.cuda.synchronize(self._device)
            for name, (began, ended) in events.items():
                seconds[name].append(began.elapsed_time(ended) / 1e3)
        return seconds

    def limits(self) -> dict[str, Any]:
        read_bytes, reads = self._read_seconds()
        a, b = (
            torch.randn(_MATRIX_SIZE, _MATRIX_SIZE, device=self._device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        products = self._events(lambda: torch.matmul(a, b), 10)
        empty = self.replayable(self._empty_launches)
        launches = self._events(empty, 20)
        return {
            "read_bytes_per_s": read_bytes / min(median(times) for times in reads.values()),
            "read_bytes": read_bytes,
            "read_seconds": reads,
            "bf16_flop_per_s": 2 * _MATRIX_SIZE**3 / median(products),
            "matmul_size": _MATRIX_SIZE,
            "matmul_seconds": products,
            "empty_launch_us": median(launches) / _LAUNCHES * 1e6,
            "empty_launches_seconds": launches,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def _read_seconds(self) -> tuple[int, dict[str, list[float]]]:
        """Bytes of a buffer far larger than the L2, and times to read it, by configuration."""
        free, _ = torch.cuda.mem_get_info(self._device)
        num_floats = min(_STREAM_BYTES, free // 4) // 4 >> 20 << 20
        data = torch.ones(num_floats, device=self._device)
        seconds = {}
        for config in _STREAM_CONFIGS:
            read = partial(self._read, data, *config)
            seconds["block {}, {} warps, {} per SM".format(*config)] = self._events(read, 10)
        return 4 * num_floats, seconds

    def _empty_launches(self) -> None:
        for _ in range(_LAUNCHES):
            _empty_kernel[(1,)](self._sums)

    def _read(self, data: torch.Tensor, block: int, num_warps: int, per_sm: int) -> None:
        grid = (self._num_sms * per_sm,)
        _read_kernel[grid](data, self._sums, data.numel() // block, block, num_warps=num_warps)

    def _events(self, work: Work, rounds: int) -> list[float]:
        work()
        pairs = []
        for _ in range(rounds):
            began, ended = _event(), _event()
            began.record()
            work()
            ended.record()
            pairs.append((began, ended))
        torch.cuda.synchronize(self._device)
        return [began.elapsed_time(ended) / 1e3 for began, ended in pairs]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class DryMeter(Meter):
    """The host's clock around direct calls in the interpreter: shows that the logic runs."""

    dry = True

    def replayable(self, work: Work) -> Work:
        return work

    def interleaved(self, replays: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
        return interleaved(replays, 1, warmups=0)

    def limits(self) -> dict[str, Any]:
        data, sums = torch.ones(4096), torch.empty(2)
        began = time.perf_counter()
        _read_kernel[(2,)](data, sums, 4, 1024)
        seconds = time.perf_counter() - began
        assert sums.tolist() == [2048.0, 2048.0]
        _empty_kernel[(1,)](sums)
        return {
            "read_bytes_per_s": data.numel() * 4 / seconds,
            "bf16_flop_per_s": 1e9,
            "empty_launch_us": 1.0,
        }

    def synchronize(self) -> None:
        pass

    def rounds_for(self, replays: Mapping[str, Work], seconds: float, most: int) -> int:
        return 1


def meter_for(device: torch.device) -> Meter:
    """The meter of a device."""
    return CudaMeter(device) if device.type == "cuda" else DryMeter()


def wall_us(work: Work, meter: Meter, rounds: int = 3) -> list[float]:
    """Host time of ``work`` with the device's share of it, in us, one per round."""
    times = []
    for _ in range(1 if meter.dry else rounds):
        meter.synchronize()
        began = time.perf_counter()
        work()
        meter.synchronize()
        times.append((time.perf_counter() - began) * 1e6)
    return times
