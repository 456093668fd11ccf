"""Launches captured once and replayed: a CUDA graph, or its stand-in for the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from prefix_kernels.launch import launch, recorded

__all__ = ["capture", "launches_of"]


def capture(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture what ``work`` launches, to be replayed without running its Python again.

    ``work`` is run before, so that all kernels are compiled. On the CPU the launches of our own
    kernels are recorded and repeated with the arguments of the capture, as a graph repeats them:
    what reads host state at a replay is found there too.

    Args:
        work: launches only; must not synchronise.
        device: where.

    Returns:
        The replay.
    """
    if device.type != "cuda":
        launches = launches_of(work)
        return lambda: [again() for again in launches]
    used: set[int] = set()
    with recorded(lambda *_: used.add(torch.cuda.current_stream(device).cuda_stream)):
        work()
    # torch hands out 32 streams in turn. If a side stream were the captured one, launches would
    # stand in a row that are meant to run side by side.
    while (stream := _new_stream(device)).cuda_stream in used:
        pass
    graph = torch.cuda.CUDAGraph()
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


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def launches_of(work: Callable[[], object]) -> list[partial[None]]:
    """Every launch of ours that ``work`` makes: ``launch`` with kernel and grid, and keywords."""
    launches: list[partial[None]] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        launches.append(partial(launch, kernel, grid, **arguments))

    with recorded(record):
        work()
    return launches
