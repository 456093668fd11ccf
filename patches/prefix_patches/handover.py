"""How a batch's CPU-side facts reach the attention backend.

SGLang hands the backend a rebuilt batch object that lacks the requests and the tree. So
``forward_batch_init_new`` notes the schedule batch on the object that ``init_new`` returns, and
``model_runner_forward``, which sees that very object, publishes it here for as long as the forward
pass runs. One :class:`Handover` hangs on each model runner that uses our backend.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

__all__ = ["BATCH_ATTRIBUTE", "Handover", "handover_of"]

# Name under which a schedule batch hangs on a forward batch, and a handover on a model runner.
BATCH_ATTRIBUTE = "_sglang_prefix_schedule_batch"
_HANDOVER_ATTRIBUTE = "_sglang_prefix_handover"


class Handover:
    """What the forward pass under way was scheduled from.

    Attributes:
        batch: SGLang's ``ScheduleBatch`` of the pass under way; None outside a pass, and in
            passes that no schedule batch stands behind (warm-up, capture).
        epoch: grows with every pass that is not plain decode. Rows and tree may have changed then.
        settled: requests that have decoded since they were last prefilled. Only their rows are
            known to hold the tree's slots: under overlap scheduling the tree insert of a prefill
            is processed after the next decode step has been launched.
    """

    def __init__(self) -> None:
        self.batch: Any = None
        self.epoch = 0
        self.settled: WeakSet[Any] = WeakSet()

    def enter(self, forward_batch: Any) -> Any:
        """Publish the batch behind ``forward_batch``; return what was published before."""
        previous = self.batch
        self.batch = getattr(forward_batch, BATCH_ATTRIBUTE, None)
        if not forward_batch.forward_mode.is_decode():
            self.epoch += 1
            for req in self.batch.reqs or () if self.batch is not None else ():
                self.settled.discard(req)
        return previous

    def leave(self, previous: Any) -> None:
        """Undo :meth:`enter`; passes may nest."""
        self.batch = previous


def handover_of(model_runner: Any, *, create: bool = False) -> Handover | None:
    """The handover of a model runner; with ``create`` a new one where there is none."""
    found: Handover | None = vars(model_runner).get(_HANDOVER_ATTRIBUTE)
    if found is None and create:
        found = Handover()
        setattr(model_runner, _HANDOVER_ATTRIBUTE, found)
    return found
