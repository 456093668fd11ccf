"""Which launch goes on which stream, in which order and with which priority, without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from prefix_kernels.plan_buffers import MAX_LISTS
from prefix_kernels.streams import LaunchStreams, Place, place_launches

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("num_launches", "wide_first", "places"),
    [
        (1, True, [(0, None)]),
        (2, True, [(1, -1), (0, None)]),
        (3, True, [(2, -2), (1, -1), (0, None)]),
        (1, False, [(0, None)]),
        (3, False, [(1, 0), (2, 0), (0, None)]),
    ],
)
def test_places(num_launches: int, wide_first: bool, places: list[tuple[int, int | None]]) -> None:
    assert place_launches(num_launches, wide_first=wide_first) == [Place(*p) for p in places]


@dataclass
class FakeCuda:
    """What is done with streams and events, in order. Streams of a priority come in turn."""

    current: str = "caller"
    log: list[tuple[str, ...]] = field(default_factory=list)
    made: list[int] = field(default_factory=list)

    def stream(self, device: torch.device, priority: int) -> Any:
        assert device == GPU
        self.made.append(priority)
        return _FakeStream(self, f"p{priority}/{self.made.count(priority)}")

    @contextlib.contextmanager
    def entered(self, stream: _FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.cuda_stream
        yield
        self.current = before


@dataclass
class _FakeStream:
    cuda: FakeCuda
    cuda_stream: str

    def wait_event(self, event: _FakeEvent) -> None:
        self.cuda.log.append((self.cuda_stream, "waits for", event.at))


@dataclass
class _FakeEvent:
    at: str = ""

    def record(self, stream: _FakeStream) -> None:
        self.at = stream.cuda_stream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """In the place of torch's."""
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "Event", _FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", fake.entered)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: _FakeStream(fake, fake.current)
    )
    return fake


def run(streams: LaunchStreams, count: int, cuda: FakeCuda) -> list[tuple[str, ...]]:
    """Launch numbered kernels; what happened, in order."""
    cuda.log.clear()

    def launched(number: int) -> None:
        cuda.log.append((cuda.current, "launches", str(number)))

    streams.run([lambda number=number: launched(number) for number in range(count)])  # type: ignore[misc]
    return list(cuda.log)


def test_wide_tiles_go_first_on_streams_of_higher_priority(cuda: FakeCuda) -> None:
    """Every side stream is forked from the caller's, which waits for all of them."""
    streams = LaunchStreams(GPU, wide_first=True)
    assert run(streams, 3, cuda) == [
        ("p-2/1", "waits for", "caller"),
        ("p-2/1", "launches", "2"),
        ("p-1/1", "waits for", "caller"),
        ("p-1/1", "launches", "1"),
        ("caller", "launches", "0"),
        ("caller", "waits for", "p-2/1"),
        ("caller", "waits for", "p-1/1"),
    ]
    made = list(cuda.made)
    assert run(streams, 1, cuda) == [("caller", "launches", "0")]
    assert cuda.made == made  # nothing is made per layer


@pytest.mark.parametrize("wide_first", [True, False])
def test_no_launch_shares_a_stream(wide_first: bool, cuda: FakeCuda) -> None:
    """Also where the caller's stream is one of ours: torch hands out its pool in turn."""
    streams = LaunchStreams(GPU, wide_first=wide_first)
    callers = {entry[0] for entry in run(streams, MAX_LISTS, cuda)}
    for caller in sorted(callers):
        cuda.current = caller
        log = run(streams, MAX_LISTS, cuda)
        on = [entry[0] for entry in log if entry[1] == "launches"]
        assert len(set(on)) == MAX_LISTS
        assert on[-1] == caller
        joined = {entry[2] for entry in log if entry[:2] == (caller, "waits for")}
        assert joined == set(on[:-1])


def test_on_a_cpu_launches_follow_each_other(cuda: FakeCuda) -> None:
    streams = LaunchStreams(torch.device("cpu"), wide_first=True)
    numbers = [entry[2] for entry in run(streams, 3, cuda)]
    assert numbers == ["2", "1", "0"]
    assert cuda.made == []
