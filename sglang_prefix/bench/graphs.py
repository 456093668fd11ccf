"""Launches captured once and replayed: a CUDA graph, or its stand-in for the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from prefix_kernels.launch import recorded

__all__ = ["capture", "launches_of"]


def capture(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture what ``work`` launches, to be replayed without running its Python again.

    ``work`` is run once before, so that all kernels are compiled. On the CPU the launches of our
    own kernels are recorded and repeated with the arguments of the capture, as a graph repeats
    them: whatever reads host state at a replay is found there too.

    Args:
        work: launches only; must not synchronise.
        device: where.

    Returns:
        The replay.
    """
    if device.type != "cuda":
        launches = launches_of(work)

        def replay() -> None:
            for kernel, grid, arguments in launches:
                kernel[grid](**arguments)

        return replay
    graph = torch.cuda.CUDAGraph()
    stream = _stream_of_its_own(work, device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
        torch.cuda.synchronize(device)
        # Not torch.cuda.graph(...), which collects garbage first: 0.1 s, a thousand times over.
        graph.capture_begin()
        try:
            work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


def _stream_of_its_own(work: Callable[[], object], device: torch.device) -> torch.cuda.Stream:
    """A stream that ``work`` does not use beside the current one.

    torch hands out 32 streams in turn. A side stream that is the captured one would put launches
    in a row that are meant to run side by side.
    """
    used: set[int] = set()

    def look(*_: Any) -> None:
        used.add(torch.cuda.current_stream(device).cuda_stream)

    with recorded(look):
        work()
    while True:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if stream.cuda_stream not in used:
            return stream


def launches_of(work: Callable[[], object]) -> list[tuple[Any, tuple[int, ...], dict[str, Any]]]:
    """Kernel, grid and arguments of every launch of ours that ``work`` makes."""
    launches: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
    with recorded(lambda kernel, grid, arguments: launches.append((kernel, grid, arguments))):
        work()
    return launches
