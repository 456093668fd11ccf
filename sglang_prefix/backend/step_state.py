"""What the backend decided about the step under way."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXTEND", "NO_STEP", "OTHER_GRAPH", "PACKED_REPLAYS", "StepState"]


class StepState(NamedTuple):
    """Who serves the step under way. Made when a step begins, and made again if it is given up.

    Attributes:
        packed: the executors hold a plan of the batch, and run it.
        reason: why the step counts as the stock backend's; None if it counts as packed. A step of
            graphs without stock kernels may have a reason and be packed all the same, with nothing
            taken to be shared.
        in_graph: its kernels are a graph's.
        counts: it is a decode step or a verify pass, or an extend that should be packed, and not
            another prefill, a capture or another rank's.
        kind: what kind of pass it is: "decode", "verify" or "extend". Counted by it.
    """

    packed: bool = False
    reason: str | None = None
    in_graph: bool = False
    counts: bool = False
    kind: str = "decode"


NO_STEP = StepState()
OTHER_GRAPH = StepState(in_graph=True)  # that counts no step and holds no kernel of ours
EXTEND = StepState(packed=True, counts=True, kind="extend")
# Replays of graphs with our kernels, by kind of pass: made once, since most steps are one.
PACKED_REPLAYS = {
    kind: StepState(packed=True, in_graph=True, counts=True, kind=kind)
    for kind in ("decode", "verify")
}
