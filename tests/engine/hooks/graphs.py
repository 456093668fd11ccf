"""SGLang's own decode graph runner on the CPU, with graphs that freeze what a CUDA graph freezes.

A graph here is the forward function that the runner gave to be captured, run again over its static
buffers. Each launch of ours is replaced by the one that was recorded at capture: the same kernel
and grid, and its arguments by raw address. Only q and the output, which the model allocates anew in
each run, are taken from the run. So a launch that depends on the plan shows, as it would on a GPU.

Two more modes: "packed" packs every batch that shares anything; without a mode the gate packs every
second one, so that the graphs of both kinds are replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import
from sglang_prefix.bench.hooks.cpu_graphs import GraphBackend, run_graphs_on_cpu
from tests.engine.hooks.controls import mode, say

BATCH_SIZES = (2, 4, 10)
# What the model allocates anew in each run.
_OF_THE_RUN = ("q_ptr", "out_ptr")


class FrozenLaunches:
    """Records the launches of a capture, and puts them in the place of those of a replay."""

    def __init__(self) -> None:
        self._recording: list[Any] | None = None
        self._replaying: Iterator[Any] | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Any]]:
        """Keep every launch."""
        self._recording = []
        try:
            yield self._recording
        finally:
            self._recording = None

    @contextlib.contextmanager
    def replaying(self, recorded: list[Any]) -> Iterator[None]:
        """Replace every launch by the recorded one; there must be as many."""
        self._replaying = iter(recorded)
        try:
            yield
            left = list(self._replaying)
        finally:
            self._replaying = None
        assert not left, f"{len(left)} recorded launches were not replayed"

    def wrap(self, launch: Callable[..., None]) -> Callable[..., None]:
        """A launch function under our control."""

        def frozen(kernel: Any, grid: Any, **arguments: Any) -> None:
            if self._recording is not None:
                self._recording.append((kernel, grid, freeze(arguments)))
            if self._replaying is not None:
                recorded_kernel, grid, recorded = next(self._replaying)
                assert kernel is recorded_kernel
                fresh = {name: arguments[name] for name in _OF_THE_RUN if name in arguments}
                arguments = thaw(recorded) | fresh
            launch(kernel, grid, **arguments)

        return frozen


def freeze(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with tensors reduced to their addresses."""
    import torch

    from tests.replay import Address

    return {
        name: Address.of(value) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def thaw(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the memory at the recorded addresses."""
    from tests.replay import Address

    return {
        name: value.tensor() if isinstance(value, Address) else value
        for name, value in arguments.items()
    }


LAUNCHES = FrozenLaunches()


def wrap_launch(module: ModuleType) -> None:
    """Where kernels are launched."""
    vars(module)["launch"] = LAUNCHES.wrap(vars(module)["launch"])


class FrozenGraphs(GraphBackend):
    """Graphs that run the forward function again, under the launches of the capture."""

    def capture(self, shape_key: Any, forward_fn: Callable[[], Any]) -> Any:
        """The function, and its launches."""
        with LAUNCHES.recording() as launches:
            forward_fn()
        say(f"captured {shape_key} with {len(launches)} launches")
        return forward_fn, launches

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        """Run what was captured over what stands in the static buffers."""
        forward_fn, launches = self.captured[shape_key]
        say(f"replay {shape_key.variant_label} {shape_key.size}")
        with LAUNCHES.replaying(launches):
            return forward_fn()


class FlippingGate:
    """Packs every second batch that shares anything, or, in mode "packed", all of them."""

    def __init__(self) -> None:
        self._packs = False

    def choose(self, plans: Any, forest: Any) -> Any:
        """The other way than the last time."""
        from sglang_prefix.gate import Decision

        self._packs = mode() == "packed" or not self._packs
        return Decision(self._packs, None if self._packs else "gate-no-gain", 1.0, 2.0)

    def leave(self) -> None:
        """See the real gate."""


def flip_the_gate(module: ModuleType) -> None:
    """In place of the gate that setting "auto" gets on a GPU."""
    vars(module)["make_gate"] = lambda name, *args: FlippingGate() if name == "auto" else None


run_graphs_on_cpu(FrozenGraphs, BATCH_SIZES)
patch_after_import({"prefix_kernels.launch": wrap_launch, "sglang_prefix.gate": flip_the_gate})
