"""The launches of a plan beside each other: on which streams, in which order, with which priority.

The widest tile has the longest work, and a program of it needs most of a multiprocessor. So its
launch is placed first, and programs of narrower tiles fill what it leaves. CUDA prefers waiting
programs of a stream of higher priority, and takes nothing away from those that run (CUDA
programming guide, stream priorities). A graph keeps that: a kernel node has the priority of the
stream that it was captured on, and torch instantiates graphs with
``cudaGraphInstantiateFlagUseNodePriority``, which heeds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from prefix_kernels.plan_buffers import MAX_LISTS

__all__ = ["LaunchStreams", "Place", "place_launches"]


class Place(NamedTuple):
    """Where a launch goes.

    Attributes:
        launch: its number; launches are numbered by ascending rows of their tiles.
        priority: of the stream of its own that it gets, lower ones first, as torch has it; None for
            the caller's stream.
    """

    launch: int
    priority: int | None


def place_launches(num_launches: int, *, wide_first: bool) -> list[Place]:
    """Places of all launches, in the order in which they are made.

    The narrowest is made last, on the caller's stream, and keeps the priority of that; each of the
    others has a stream of its own beside it.

    Args:
        num_launches: how many, at least one.
        wide_first: whether the wider a tile is, the higher its priority; without it, all of our
            streams have the usual one, and launches are made by ascending rows.
    """
    beside = [Place(i, -i if wide_first else 0) for i in range(1, num_launches)]
    return [*(beside[::-1] if wide_first else beside), Place(0, None)]


class LaunchStreams:
    """Streams and events of one executor, made once. On the CPU launches follow each other.

    Args:
        device: of the launches.
        wide_first: as in :func:`place_launches`.
    """

    def __init__(self, device: torch.device, *, wide_first: bool) -> None:
        self._device = device
        self._wide_first = wide_first
        if device.type != "cuda":
            return
        self._fork = torch.cuda.Event()
        self._joins = [torch.cuda.Event() for _ in range(1, MAX_LISTS)]
        # Two for each launch: torch hands out the streams of a priority from a pool of 32 in turn,
        # so one of ours can be the caller's.
        self._streams = {
            place.launch: [torch.cuda.Stream(device, priority=place.priority) for _ in range(2)]
            for place in place_launches(MAX_LISTS, wide_first=wide_first)
            if place.priority is not None
        }

    def run(self, launches: list[Callable[[], None]]) -> None:
        """Make launches that may run at the same time; the caller's stream waits for all of them.

        Args:
            launches: by ascending rows of their tiles, at most one per work list.
        """
        places = place_launches(len(launches), wide_first=self._wide_first)
        if len(places) == 1 or self._device.type != "cuda":
            for place in places:
                launches[place.launch]()
            return
        current = torch.cuda.current_stream(self._device)
        self._fork.record(current)
        for number, priority in places:
            if priority is None:
                launches[number]()
                continue
            first, other = self._streams[number]
            stream = other if first.cuda_stream == current.cuda_stream else first
            stream.wait_event(self._fork)
            with torch.cuda.stream(stream):
                launches[number]()
            self._joins[number - 1].record(stream)
        for number, priority in places:
            if priority is not None:
                current.wait_event(self._joins[number - 1])
