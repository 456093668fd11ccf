"""How work is timed: on a GPU by events around graph replays that find cold KV, on the CPU by the
host's clock; always interleaved, in random order.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from sglang_prefix.bench.graphs import capture
from sglang_prefix.bench.run import NotRunError

__all__ = [
    "Clock",
    "GpuClock",
    "clock_for",
    "host_seconds",
    "interleaved",
    "prepare_each",
    "undisturbed",
]

Work = Callable[[], object]
T = TypeVar("T")

# A read of this many times the L2 leaves nothing of the caches in it. A read, not a write: dirty
# lines would be written back inside the timed region.
_FLUSH_FACTOR = 4
# Larger than any cache, so that a read of it comes from memory.
_STREAM_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
_EMPTY_LAUNCHES = 64
# (floats per iteration of a program, warps, programs per SM); the fastest counts.
_STREAM_CONFIGS = ((4096, 4, 8), (8192, 8, 4), (16384, 8, 4))
_LIMIT_TRIES = 5
# Where a type has no products of its own, a small matrix shows it in no time.
_SMALL_MATRIX = 256
# A sample counts if its threads waited for a core for no more than this share of it.
_WAITED_SHARE = 0.01
_LEAST_SAMPLES = 3
_TASKS = Path("/proc/self/task")
_LONGEST_REASON = 300


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
    works: Mapping[str, Callable[[], T]],
    rounds: int | Callable[[float], int],
    *,
    warmups: int = 1,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, list[T]]:
    """What every work measured in every round; each round runs all of them, in random order.

    What runs after one that touches much memory finds cold caches, so that must not always be the
    same.

    Args:
        works: by name; each times itself.
        rounds: how many; or says it, given the seconds of the first one.
        warmups: rounds before them whose results are thrown away.
        progress: is told which round it is.
    """

    def one_round(number: int) -> dict[str, T]:
        return {
            name: works[name]() for name in random.Random(number).sample(list(works), len(works))
        }

    for number in range(warmups):
        progress("warming up")
        one_round(number)
    began = time.perf_counter()
    found = [one_round(warmups)]
    if not isinstance(rounds, int):
        rounds = rounds(time.perf_counter() - began)
    for number in range(1, rounds):
        progress(f"round {number + 1} of {rounds}")
        found.append(one_round(warmups + number))
    return {name: [results[name] for results in found] for name in works}


def prepare_each(
    makers: Mapping[str, Callable[[], T]],
    clock: Clock,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[dict[str, T], dict[str, str], dict[str, str]]:
    """Make what is to be timed; one that cannot be made leaves the others their time.

    Args:
        makers: by name. One may raise NotRunError where it does not apply, and any other error
            where it fails.
        clock: of the device.
        progress: is told which one it is.

    Returns:
        What was made; why others do not apply; why others failed.

    Raises:
        RuntimeError: the device itself is lost.
    """
    ready: dict[str, T] = {}
    absent: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        progress(f"checking {name}")
        try:
            ready[name] = make()
        except NotRunError as error:
            absent[name] = str(error)
        except Exception as error:  # of anyone's kernel
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            failed[name] = reason[:_LONGEST_REASON]
        clock.synchronize()
    return ready, absent, failed


def undisturbed(waited: Sequence[float], took: Sequence[float]) -> list[int]:
    """Which samples count: those whose threads had their cores, or else all.

    Where fewer than three are like that, all of them count: what is left would be luck.

    Args:
        waited: of each sample, how long its threads waited for a core, all threads together.
        took: how long the sample took, in the same unit.
    """
    pairs = enumerate(zip(waited, took, strict=True))
    quiet = [number for number, (wait, time) in pairs if wait <= _WAITED_SHARE * time]
    return quiet if len(quiet) >= _LEAST_SAMPLES else list(range(len(took)))


def host_seconds(work: Work) -> float:
    """Seconds of a work by the host's clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Clock:
    """The host's clock around direct calls; the base of the others.

    Args:
        device: where work runs.
        dry: nothing is a measurement: one round of everything.

    Attributes:
        repeats: how often a very short work is put into one replay.
        rounds: least and most of one case.
        seconds: for the rounds of one case, if their number is not given.
        planned_rounds: rounds in which what is done once per step is done anew.
    """

    repeats = 1
    rounds = (3, 15)
    seconds = 8.0
    planned_rounds = 1 << 30

    def __init__(self, device: torch.device, *, dry: bool = False) -> None:
        self.device, self.dry = device, dry
        self._products: dict[tuple[torch.dtype, int], list[Work]] = {}
        self._multiplies: dict[torch.dtype, bool] = {}
        if dry:
            self.rounds = (1, 1)

    def replayable(self, work: Work) -> Work:
        """``work`` in the form that is timed; its launches only, where it is captured."""
        return work

    def seconds_of(self, replay: Work) -> float:
        """Run a replay on a device whose caches hold nothing of use to it."""
        return host_seconds(replay)

    def host_seconds_of(self, work: Work) -> float:
        """Run work of the host; the device's share of it included."""
        self.synchronize()

        def to_its_end() -> None:
            work()
            self.synchronize()

        return host_seconds(to_its_end)

    def synchronize(self) -> None:
        """Wait for the device; raises where it is lost."""

    def waited_seconds(self) -> float:
        """How long threads of this process have waited for a core that another had, until now.

        What the host's clock says of a work in which they did is partly another's time. Linux
        counts it, for each thread; 0 where it does not.
        """
        nanoseconds = 0
        for task in os.listdir(_TASKS) if _TASKS.exists() else ():
            with suppress(OSError, ValueError):  # it has ended
                nanoseconds += int((_TASKS / task / "schedstat").read_text().split()[1])
        return nanoseconds / 1e9

    def bandwidth(self) -> float:
        """Bytes per second of a read of a buffer that is larger than any cache."""
        return self._stream.nbytes / host_seconds(self._stream.sum)

    def peak(self, dtype: torch.dtype) -> float:
        """Operations per second of the fastest product of matrices that torch has, measured now.

        On a CPU without products of a 16-bit type that is what float32's reach, since a kernel is
        free to widen its numbers.
        """
        most = self._rate(torch.float32)
        if dtype not in self._multiplies:
            self._multiplies[dtype] = self._rate(dtype, _SMALL_MATRIX) > most / 4
        return max(most, self._rate(dtype)) if self._multiplies[dtype] else most

    def limits(self, *dtypes: torch.dtype) -> dict[str, float]:
        """The fastest of some tries: "limits" of a result.

        Args:
            dtypes: of q and the caches, each with its own :meth:`peak`.
        """
        if self.dry:
            self._try_kernels()
        tries = range(_LIMIT_TRIES)
        return {
            "read_bytes_per_s": max(self.bandwidth() for _ in tries),
            "empty_launch_us": 0.0,
            **_by_dtype({dtype: max(self.peak(dtype) for _ in tries) for dtype in dtypes}),
        }

    def _rate(self, dtype: torch.dtype, size: int = 0) -> float:
        size = size or (64 if self.dry else _MATRIX_SIZE["cpu"])
        key = (dtype, size)
        if key not in self._products:
            self._products[key] = _products(dtype, size)
        return float(2 * size**3 / min(map(host_seconds, self._products[key])))

    def rounds_within(self, seconds: float | None = None) -> Callable[[float], int]:
        """Of one round's seconds, how many fit into ``seconds``, those of the clock if None."""
        seconds = self.seconds if seconds is None else seconds
        least, most = self.rounds
        return lambda one: min(max(int(seconds / max(one, 1e-9)), least), most)

    @cached_property
    def _stream(self) -> torch.Tensor:
        return torch.ones(4096 if self.dry else _STREAM_BYTES["cpu"] // 4)

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
        self._bandwidth = 0.0
        self._peaks: dict[torch.dtype, float] = {}

    def replayable(self, work: Work) -> Work:
        return capture(work, self.device)

    def seconds_of(self, replay: Work) -> float:
        self._read(self._flush_buffer, *_STREAM_CONFIGS[0])
        return self._events(replay)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def waited_seconds(self) -> float:
        return 0.0  # the device's clock does not see it

    def bandwidth(self) -> float:
        return self._bandwidth  # as in `limits`: steady, unlike a CPU's

    def peak(self, dtype: torch.dtype) -> float:
        return self._peaks[dtype]  # likewise

    def limits(self, *dtypes: torch.dtype) -> dict[str, float]:
        free, _ = torch.cuda.mem_get_info(self.device)
        num_floats = min(_STREAM_BYTES["cuda"], free // 4) // 4 >> 20 << 20
        data = torch.ones(num_floats, device=self.device)
        reads = [partial(self._read, data, *config) for config in _STREAM_CONFIGS]
        self._bandwidth = data.nbytes / min(map(self._fastest, reads))
        for dtype in dtypes:
            size = _MATRIX_SIZE["cuda"]
            # Not ones, with which the chip draws less power and clocks higher.
            matrices = torch.randn(2, size, size, device=self.device, dtype=dtype)
            self._peaks[dtype] = 2 * size**3 / self._fastest(partial(torch.matmul, *matrices))
        empty = self._fastest(self.replayable(self._empty_launches))
        return {
            "read_bytes_per_s": self._bandwidth,
            "empty_launch_us": empty / _EMPTY_LAUNCHES * 1e6,
            **_by_dtype(self._peaks),
        }

    def _empty_launches(self) -> None:
        for _ in range(_EMPTY_LAUNCHES):
            _empty_kernel[(1,)](self._sums)

    def _read(self, data: torch.Tensor, block: int, num_warps: int, per_sm: int) -> None:
        grid = (self._num_sms * per_sm,)
        _read_kernel[grid](data, self._sums, data.numel() // block, block, num_warps=num_warps)

    def _fastest(self, work: Work) -> float:
        work()
        return min(self._events(work) for _ in range(2 * _LIMIT_TRIES))

    def _events(self, work: Work) -> float:
        began, ended = _event(), _event()
        began.record()
        work()
        ended.record()
        self.synchronize()
        return float(began.elapsed_time(ended)) / 1e3


def _products(dtype: torch.dtype, size: int) -> list[Work]:
    """Ways to multiply two matrices with torch on the CPU."""
    a, b = torch.randn(2, size, size).to(dtype)
    products: list[Work] = [partial(torch.matmul, a, b)]
    if dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # torch multiplies 16-bit matrices with oneDNN, and these with MKL, which knows some CPUs
        # less well.
        by_onednn = torch.ops.mkldnn._linear_pointwise
        products.append(partial(by_onednn, a, b, None, "none", [], ""))
    return products


def _by_dtype(peaks: Mapping[torch.dtype, float]) -> dict[str, float]:
    """As the result has them: one by one, and the highest."""
    names = {f"flop_per_s_{dtype}".replace("torch.", ""): rate for dtype, rate in peaks.items()}
    return {"flop_per_s": max(peaks.values()), **names}


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_for(device: torch.device, *, dry: bool = False) -> Clock:
    """The clock of a device."""
    return GpuClock(device) if device.type == "cuda" else Clock(device, dry=dry)
