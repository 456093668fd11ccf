"""How work is timed: on a GPU by events around graph replays that find cold KV, on the CPU by the
host's clock; always interleaved, in random order.
"""

from __future__ import annotations

import random
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_prefix.bench.graphs import capture

__all__ = [
    "Clock",
    "CpuClock",
    "GpuClock",
    "clock_for",
    "host_seconds",
    "interleaved",
    "unpreempted_seconds",
]

Work = Callable[[], object]

# A read of this many times the L2 leaves nothing of the caches in it. A read, not a write: dirty
# lines would be written back inside the timed region.
_FLUSH_FACTOR = 4
# Larger than any cache, so that a read of it comes from memory.
_STREAM_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_MATRIX_SIZE = {"cpu": 1536, "cuda": 8192}
_EMPTY_LAUNCHES = 64
# (floats per iteration of a program, warps, programs per SM); the fastest counts.
_STREAM_CONFIGS = ((4096, 4, 8), (8192, 8, 4), (16384, 8, 4))
_TRIES = 3


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


def interleaved(
    works: Mapping[str, Work],
    rounds: int,
    measure: Callable[[Work], float],
    warmups: int = 2,
) -> dict[str, list[float]]:
    """Seconds of every work in every round; each round runs all of them, in random order.

    What runs after one that touches much memory finds cold caches, so that must not always be the
    same.

    Args:
        works: by name.
        rounds, warmups: timed, and thrown away before them.
        measure: runs a work and returns its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warmups + rounds):
        for name in random.Random(number).sample(list(works), len(works)):
            took = measure(works[name])
            if number >= warmups:
                seconds[name].append(took)
    return seconds


def host_seconds(work: Work) -> float:
    """Seconds of a work by the host's clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def unpreempted_seconds(work: Work) -> float:
    """Seconds of a short work on the host; run again if the system took the core away meanwhile."""
    for _ in range(_TRIES):
        preemptions = _preemptions()
        took = host_seconds(work)
        if _preemptions() == preemptions:
            break
    return took


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


class Clock(ABC):
    """What the benchmarks ask of a clock.

    Args:
        device: where work runs.

    Attributes:
        dry: nothing is a measurement: one round of everything.
        repeats: how often a very short work is put into one replay.
        rounds: least and most of one case.
        seconds: for the rounds of one case, if their number is not given.
        planned_rounds: rounds in which what is done once per step is done anew.
    """

    dry = False
    repeats = 1
    rounds = (3, 15)
    seconds = 8.0
    planned_rounds = 1 << 30

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def replayable(self, work: Work) -> Work:
        """``work`` in the form that is timed; its launches only, where it is captured."""

    @abstractmethod
    def seconds_of(self, replay: Work) -> float:
        """Run a replay on a device whose caches hold nothing of use to it."""

    @abstractmethod
    def host_seconds_of(self, work: Work) -> float:
        """Run work of the host; the device's share of it included."""

    @abstractmethod
    def read_seconds(self) -> tuple[int, float]:
        """Bytes of a buffer larger than any cache, and the seconds that a read of it takes."""

    @abstractmethod
    def limits(self, dtype: torch.dtype) -> dict[str, float]:
        """Measured here and now: what `schema.Limits` has.

        Args:
            dtype: of the matrices on a GPU. On the CPU our executor computes in float32 whatever
                the caches hold.
        """

    def synchronize(self) -> None:
        """Wait for the device; raises where it is lost."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rounds_within(self, round_seconds: float, seconds: float | None = None) -> int:
        """Rounds that fit into ``seconds``, those of the clock if None."""
        least, most = self.rounds
        fit = int((self.seconds if seconds is None else seconds) / max(round_seconds, 1e-9))
        return min(max(fit, least), most)


class CpuClock(Clock):
    """The host's clock around direct calls."""

    def __init__(self, device: torch.device, *, dry: bool = False) -> None:
        super().__init__(device)
        self.dry = dry
        if dry:
            self.rounds, self.seconds = (1, 1), 0.0
        self._stream = torch.ones(4096 if dry else _STREAM_BYTES["cpu"] // 4)

    def replayable(self, work: Work) -> Work:
        return work

    def seconds_of(self, replay: Work) -> float:
        return host_seconds(replay)

    def host_seconds_of(self, work: Work) -> float:
        return host_seconds(work)

    def read_seconds(self) -> tuple[int, float]:
        return self._stream.nbytes, self.seconds_of(self._stream.sum)

    def limits(self, dtype: torch.dtype) -> dict[str, float]:
        if self.dry:
            self._try_kernels()
        size = 64 if self.dry else _MATRIX_SIZE["cpu"]
        a, b = torch.ones(size, size), torch.ones(size, size)
        best = min(self.seconds_of(partial(torch.matmul, a, b)) for _ in range(5))
        num_bytes, _ = self.read_seconds()
        return {
            "read_bytes_per_s": num_bytes / min(self.read_seconds()[1] for _ in range(3)),
            "flop_per_s": 2 * size**3 / best,
            "empty_launch_us": 0.0,
        }

    def _try_kernels(self) -> None:
        """Show in the interpreter that the kernels of the GPU's limits run."""
        sums = torch.empty(2)
        _read_kernel[(2,)](self._stream, sums, 4, 1024)
        assert sums.tolist() == [2048.0, 2048.0]
        _empty_kernel[(1,)](sums)


class GpuClock(Clock):
    """CUDA events around graph replays after an L2 flush."""

    repeats = 32
    rounds = (5, 50)
    seconds = 1.2
    planned_rounds = 5

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        properties = torch.cuda.get_device_properties(device)
        self._num_sms = properties.multi_processor_count
        flush = _FLUSH_FACTOR * properties.L2_cache_size
        self._flush_buffer = torch.ones(flush // 4, device=device)
        self._sums = torch.empty(self._num_sms * 8, device=device)
        self._stream_read = (0, 0.0)

    def replayable(self, work: Work) -> Work:
        return capture(work, self.device)

    def seconds_of(self, replay: Work) -> float:
        self._read(self._flush_buffer, *_STREAM_CONFIGS[0])
        return self._events(replay)

    def host_seconds_of(self, work: Work) -> float:
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def read_seconds(self) -> tuple[int, float]:
        return self._stream_read  # as in `limits`: steady, unlike a CPU's

    def limits(self, dtype: torch.dtype) -> dict[str, float]:
        free, _ = torch.cuda.mem_get_info(self.device)
        num_floats = min(_STREAM_BYTES["cuda"], free // 4) // 4 >> 20 << 20
        data = torch.ones(num_floats, device=self.device)
        reads = [
            self._median_events(partial(self._read, data, *config), 10)
            for config in _STREAM_CONFIGS
        ]
        self._stream_read = data.nbytes, min(reads)
        size = _MATRIX_SIZE["cuda"]
        # Not ones, with which the chip draws less power and clocks higher.
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        product = self._median_events(partial(torch.matmul, a, b), 10)
        empty = self._median_events(self.replayable(self._empty_launches), 20)
        return {
            "read_bytes_per_s": data.nbytes / min(reads),
            "flop_per_s": 2 * size**3 / product,
            "empty_launch_us": empty / _EMPTY_LAUNCHES * 1e6,
        }

    def _empty_launches(self) -> None:
        for _ in range(_EMPTY_LAUNCHES):
            _empty_kernel[(1,)](self._sums)

    def _read(self, data: torch.Tensor, block: int, num_warps: int, per_sm: int) -> None:
        grid = (self._num_sms * per_sm,)
        _read_kernel[grid](data, self._sums, data.numel() // block, block, num_warps=num_warps)

    def _median_events(self, work: Work, rounds: int) -> float:
        work()
        return median(self._events(work) for _ in range(rounds))

    def _events(self, work: Work) -> float:
        began, ended = _event(), _event()
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize(self.device)
        return float(began.elapsed_time(ended)) / 1e3


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_for(device: torch.device, *, dry: bool = False) -> Clock:
    """The clock of a device."""
    return GpuClock(device) if device.type == "cuda" else CpuClock(device, dry=dry)
