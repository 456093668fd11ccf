"""SGLang's own decode graph runner on the CPU, with graphs that freeze what a CUDA graph freezes.

A graph here is the forward function that the runner gave to be captured, run again over its static
buffers. Each launch of ours is replaced by the one that was recorded at capture: the same kernel
and grid, and its arguments by raw address. Only q and the output, which the model allocates anew in
each run, are taken from the run. So a launch that depends on the plan shows, as it would on a GPU.

More modes: "packed" packs every batch that shares anything; without a mode the gate packs every
second one, so that the graphs of both kinds are replayed. In mode "alone" ranks that should agree
choose each for itself, the first to pack and others not to, which on a GPU would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import
from sglang_prefix.bench.hooks.cpu_graphs import GraphBackend, run_graphs_on_cpu
from tests.engine.hooks.controls import mode, say

BATCH_SIZES = (2, 4, 10)
# What the model allocates anew in each run.
_OF_THE_RUN = ("q_ptr", "out_ptr")


# Launches of the replay under way that are still to come; none outside of replays.
_replayed: list[Any] | None = None


def freeze_launches(module: ModuleType) -> None:
    """Where kernels are launched: in a replay, launch what was recorded."""
    launch = vars(module)["launch"]

    def frozen(kernel: Any, grid: Any, **arguments: Any) -> None:
        from tests.replay import thaw

        if _replayed is not None:
            recorded_kernel, grid, recorded = _replayed.pop(0)
            assert kernel is recorded_kernel
            fresh = {name: arguments[name] for name in _OF_THE_RUN if name in arguments}
            arguments = thaw(recorded) | fresh
        launch(kernel, grid, **arguments)

    vars(module)["launch"] = frozen


class FrozenGraphs(GraphBackend):
    """Graphs that run the forward function again, under the launches of the capture."""

    def capture(self, shape_key: Any, forward_fn: Callable[[], Any]) -> Any:
        """The function, and its launches."""
        from tests.replay import record

        launches = record(forward_fn)
        say(f"captured {shape_key} with {len(launches)} launches")
        return forward_fn, launches

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        """Run what was captured over what stands in the static buffers."""
        global _replayed
        import torch

        forward_fn, launches = self.captured[shape_key]
        rank = torch.distributed.get_rank()
        label, size = shape_key.variant_label, shape_key.size
        say(f"replay {label} {size} on rank {rank} in mode {mode()}")
        _replayed = list(launches)
        try:
            out = forward_fn()
            assert not _replayed, f"{len(_replayed)} recorded launches were not replayed"
        finally:
            _replayed = None
        return out


class FlippingGate:
    """Packs every second batch that shares anything, but see the modes."""

    def __init__(self) -> None:
        self._packs = False

    def choose(self, plans: Any, forest: Any) -> Any:
        """The other way than the last time."""
        import torch

        from sglang_prefix.gate import Decision

        now, flipped = mode(), not self._packs
        alone = now == "alone" and torch.distributed.get_rank() == 0
        self._packs = alone or now == "packed" or (now != "alone" and flipped)
        packed_us, stock_us = (1.0, 2.0) if self._packs else (2.0, 1.0)
        return Decision(self._packs, None if self._packs else "gate-no-gain", packed_us, stock_us)

    def leave(self) -> None:
        """See the real gate."""


def let_each_rank_choose(module: ModuleType) -> None:
    """Mode "alone": a rank hears its own vote and no other."""
    agreement = module.RankAgreement
    vote, agree = agreement.vote, agreement.agree
    own: list[Any] = []

    def note(self: Any, scheduled: Any) -> Any:
        own[:] = [vote(self, scheduled)]
        return own[0]

    def hear(self: Any, votes: Any) -> bool:
        found: bool = agree(self, own if mode() == "alone" else votes)
        return found

    agreement.vote, agreement.agree = note, hear


def flip_the_gate(module: ModuleType) -> None:
    """In place of the gate that setting "auto" gets on a GPU."""
    vars(module)["make_gate"] = lambda name, *args: FlippingGate() if name == "auto" else None


run_graphs_on_cpu(FrozenGraphs, BATCH_SIZES)
patch_after_import(
    {
        "prefix_kernels.launch": freeze_launches,
        "sglang_prefix.backend.rank_agreement": let_each_rank_choose,
        "sglang_prefix.gate": flip_the_gate,
    }
)
