"""Triton's cache, filled ahead of time and without a GPU, so that a server compiles nothing.

A kernel in the cache is found by a hash of its source and of what it calls, its constants, the
types of its arguments, the architecture, and Triton's own files. What the types are is not written
down here a second time: the real launches are recorded (`launch.recorded`), on tensors of the CPU,
and each is handed to Triton's own compiler as a GPU would ask for it. Neither paths of our sources
nor the release of torch are part of the hash.

Compiled in processes of their own: one kernel takes seconds, and a process in which Triton
interprets its kernels cannot compile them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Self, TypeVar

from prefix_kernels.triton_identity import TritonIdentity

__all__ = [
    "CacheCounts",
    "CachedKernel",
    "KernelLaunch",
    "collect_launches",
    "compile_launches",
    "counted",
    "find_launches",
    "recorded_launches",
]

T = TypeVar("T")

_WARP_SIZE = 32
# An integer is 1, or a multiple of this one, or neither: Triton compiles for each of the three.
_DIVISOR = 16
_INT32 = 1 << 31


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor, as far as the compiler sees it: its dtype, and whether it begins at 16 bytes."""

    dtype: str
    is_aligned: bool


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """What of a launch decides which code it needs. Equal ones need the same.

    Attributes:
        module, name: where the kernel is defined.
        arguments: its parameters, and compile options such as ``num_warps``, by name. A tensor is a
            :class:`Pointer`, and a number stands for all numbers that need the same code.
    """

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Any, arguments: dict[str, Any]) -> Self:
        """Of what `launch` was called with."""
        parameters = {parameter.name: parameter for parameter in kernel.params}
        seen = (
            (name, _as_compiled(value, parameters.get(name))) for name, value in arguments.items()
        )
        return cls(kernel.fn.__module__, kernel.fn.__name__, tuple(seen))


@dataclass(frozen=True, slots=True)
class CachedKernel:
    """A kernel that stands in a cache.

    Attributes:
        launch: what needs it.
        key: its folder in the cache.
        num_bytes: of the files in it.
        was_there: whether it was there before.
    """

    launch: KernelLaunch
    key: str
    num_bytes: int
    was_there: bool


@contextmanager
def recorded_launches() -> Iterator[dict[KernelLaunch, None]]:
    """For a ``with`` block, record what is launched, each kernel once, and launch nothing.

    The kernels must not be those of Triton's interpreter; see :func:`collect_launches`.
    """
    from prefix_kernels.launch import recorded

    launches: dict[KernelLaunch, None] = {}

    def record(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        launches[KernelLaunch.of(kernel, arguments)] = None

    with recorded(record, run=False):
        yield launches


def collect_launches(work: Callable[[], object]) -> list[KernelLaunch]:
    """Everything that ``work`` launches on tensors of the CPU, each kernel once.

    Args:
        work: a function of a module, perhaps a partial one; called in a process of its own.
    """
    with _pool(1) as pool:
        return pool.submit(_collect, work).result()


def compile_launches(
    launches: Iterable[KernelLaunch],
    folder: str | os.PathLike[str],
    arch: str,
    *,
    triton: TritonIdentity | None = None,
    jobs: int | None = None,
) -> Iterator[CachedKernel]:
    """Compile what launches need into a cache, several at a time, and report in their order.

    Args:
        launches: of :func:`collect_launches`.
        folder: the cache, as `TRITON_CACHE_DIR` names it; made where there is none.
        arch: such as "sm_90".
        triton: whose cache it is, if that of another Python: the same release as ours.
        jobs: processes at work; None for one per CPU.
    """
    yield from _map(_compile, launches, folder, arch, triton, jobs)


def find_launches(
    launches: Iterable[KernelLaunch],
    folder: str | os.PathLike[str],
    arch: str,
    *,
    triton: TritonIdentity | None = None,
) -> list[bool]:
    """Whether a cache has what each of some launches needs. Compiles and writes nothing.

    Args:
        launches, folder, arch, triton: as of :func:`compile_launches`.
    """
    return list(_map(_find, launches, folder, arch, triton, 1))


@dataclass(slots=True)
class CacheCounts:
    """Kernels that this process found in Triton's cache, and those that it had to compile."""

    found: int = 0
    compiled: int = 0


@contextmanager
def counted() -> Iterator[CacheCounts]:
    """For a ``with`` block, count the kernels that Triton finds or compiles on a first launch.

    Another listener of Triton's that is there is told as well.
    """
    from triton import knobs

    counts, before = CacheCounts(), knobs.compilation.listener

    def listen(*, cache_hit: bool, **what: Any) -> None:
        counts.found += cache_hit
        counts.compiled += not cache_hit
        if before is not None:
            before(cache_hit=cache_hit, **what)

    knobs.compilation.listener = listen
    try:
        yield counts
    finally:
        knobs.compilation.listener = before


def _as_compiled(value: Any, parameter: Any) -> Any:
    """An argument without what makes no difference to the compiler.

    Args:
        value: the argument.
        parameter: Triton's description of it; None for a compile option.
    """
    if parameter is None or parameter.is_constexpr:
        return value
    looks_at_alignment = not parameter.do_not_specialize_on_alignment
    if hasattr(value, "data_ptr"):
        dtype = str(value.dtype).removeprefix("torch.")
        is_aligned = looks_at_alignment and value.data_ptr() % _DIVISOR == 0
        return Pointer(dtype, is_aligned)
    if isinstance(value, float):
        return 0.5
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    looks_at_value = not parameter.do_not_specialize
    if value == 1 and looks_at_value:
        return 1
    is_multiple = looks_at_value and looks_at_alignment and value % _DIVISOR == 0
    least = 0 if -_INT32 <= value < _INT32 else _INT32
    return least + (_DIVISOR if is_multiple else 2)


# In the processes that compile.


def _pool(jobs: int, *prepared_for: Any) -> ProcessPoolExecutor:
    # Spawned, so that the workers' Triton reads the environment afresh.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, _prepare, prepared_for)


def _map(
    work: Callable[[KernelLaunch], T],
    launches: Iterable[KernelLaunch],
    folder: str | os.PathLike[str],
    arch: str,
    triton: TritonIdentity | None,
    jobs: int | None,
) -> Iterator[T]:
    launches = list(launches)
    jobs = max(1, min(jobs or len(os.sched_getaffinity(0)), len(launches)))
    key = triton.key if triton else None
    pool = _pool(jobs, os.path.abspath(folder), arch, key)
    try:
        yield from pool.map(work, launches)
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(folder: str = "", arch: str = "", triton_key: str | None = None) -> None:
    """Make this process one that compiles for ``arch`` into ``folder``, or only collects."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which then ends us
    os.environ.pop("TRITON_INTERPRET", None)
    if not folder:
        return
    os.environ["TRITON_CACHE_DIR"] = folder
    # The steps in between are most of the bytes, and no launch reads them.
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    from triton.runtime import cache
    from triton.runtime.driver import driver

    driver.set_active(_NoDevice(arch))
    if triton_key is not None:
        cache.triton_key = lambda: triton_key


class _NoDevice:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", int(arch.removeprefix("sm_")), _WARP_SIZE)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _collect(work: Callable[[], object]) -> list[KernelLaunch]:
    with recorded_launches() as launches:
        work()
    return list(launches)


def _compile(launch: KernelLaunch) -> CachedKernel:
    from triton import knobs

    was_there = _find(launch)
    knobs.compilation.always_compile = not was_there  # also over a damaged entry
    compiled = _ask_for(launch)
    files = [Path(path) for path in compiled.metadata_group.values()]
    if not was_there:
        files = _without_source(files, compiled.hash)
    num_bytes = sum(file.stat().st_size for file in files)
    return CachedKernel(launch, files[0].parent.name, num_bytes, was_there)


def _without_source(files: list[Path], key: str) -> list[Path]:
    """Take the first step of compiling out of an entry: half of it, which no launch reads."""
    from triton.runtime.cache import get_cache_manager

    kept = [file for file in files if file.suffix != ".source"]
    (metadata,) = (file.name for file in kept if file.suffix == ".json")
    get_cache_manager(key).put_group(metadata, {file.name: str(file) for file in kept})
    for file in set(files) - set(kept):
        file.unlink()
    return kept


def _find(launch: KernelLaunch) -> bool:
    """Whether the cache has what a launch needs, and Triton can read it."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    class Lookup(FileCacheManager):
        """The cache, in which nothing is made."""

        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            self.cache_dir = os.path.join(knobs.cache.dir, key)

        def get_group(self, filename: str) -> dict[str, str]:
            try:
                group: dict[str, str] = super().get_group(filename) or {}
                json.loads(Path(group[filename]).read_bytes())
            except (OSError, ValueError, KeyError):  # missing or damaged
                raise _NotThereError from None
            return group

        def put(self, *_: object, **__: object) -> str:
            raise _NotThereError  # an entry that is half there: Triton has compiled it anew

    with knobs.cache.scope():
        knobs.cache.manager_class = Lookup
        try:
            _ask_for(launch)
        except _NotThereError:
            return False
    return True


class _NotThereError(Exception):
    """Triton would compile now."""


def _ask_for(launch: KernelLaunch) -> Any:
    """Have Triton find or compile what a launch needs; launches nothing."""
    from prefix_kernels.launch import fix_key

    kernel = getattr(import_module(launch.module), launch.name)
    fix_key(kernel)
    arguments = {name: _as_argument(value) for name, value in launch.arguments}
    return kernel.warmup(grid=(1,), **arguments)


def _as_argument(value: Any) -> Any:
    if not isinstance(value, Pointer):
        return value
    from triton.runtime.jit import MockTensor

    tensor = MockTensor(value.dtype)
    tensor.data_ptr = partial(int, 0 if value.is_aligned else 1)
    return tensor
