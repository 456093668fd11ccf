"""What the backend decided about the step under way."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NO_STEP", "OTHER_GRAPH", "PACKED", "PACKED_REPLAY", "StepState"]


class StepState(NamedTuple):
    """Who serves the step under way. Made when a step begins, and made again if it is given up.

    Attributes:
        packed: the executors hold a plan of the batch, and run it.
        reason: why the step counts as the stock backend's; None if it counts as packed. A step of
            graphs without stock kernels may have a reason and be packed all the same, with nothing
            taken to be shared.
        in_graph: its kernels are a graph's.
        counts: it is a decode step, and not a prefill, a capture or another rank's.
    """

    packed: bool = False
    reason: str | None = None
    in_graph: bool = False
    counts: bool = False


NO_STEP = StepState()
OTHER_GRAPH = StepState(in_graph=True)  # that counts no step and holds no kernel of ours
PACKED = StepState(packed=True, counts=True)
PACKED_REPLAY = StepState(packed=True, in_graph=True, counts=True)
