"""How a batch's CPU-side facts reach the attention backend.

SGLang hands the backend a rebuilt batch object that lacks the requests and the tree. So
``forward_batch_init_new`` notes the schedule batch on the object that ``init_new`` returns, and
``model_runner_forward``, which sees that very object, publishes it here for as long as the forward
pass runs. One :class:`ScheduleContext` hangs on each model runner that uses our backend.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

__all__ = [
    "BATCH_ATTRIBUTE",
    "ScheduleContext",
    "ensure_schedule_context",
    "note_retraction",
    "schedule_context_of",
]

# Name under which a schedule batch hangs on a forward batch, and a schedule on a model runner.
BATCH_ATTRIBUTE = "_sglang_prefix_schedule_batch"
# Name under which a request has its number of retractions when it last decoded.
_SETTLED_ATTRIBUTE = "_sglang_prefix_settled"
_CONTEXT_ATTRIBUTE = "_sglang_prefix_schedule_context"


_CONTEXTS: WeakSet[ScheduleContext] = WeakSet()


class ScheduleContext:
    """What the forward pass under way was scheduled from.

    Attributes:
        batch: SGLang's ``ScheduleBatch`` of the pass under way; None outside a pass, and in
            passes that no schedule batch stands behind (warm-up, capture).
        epoch: grows with every pass that is not plain decode, and whenever a request is retracted.
            Rows and tree may have changed then.
        graph_labels: the labels under which each decode graph is captured, see
            `decode_graph_runner`; none where graphs hold nothing of ours.
        graph_label: the label being captured, or chosen for the step under way.
        seconds: host time that publishing a batch took, for each of the newest passes.

    A request is settled once it has decoded since it was last prefilled or retracted. Only then is
    its row known to hold the tree's slots: under overlap scheduling the tree insert of a prefill is
    processed after the next decode step has been launched.
    """

    def __init__(self) -> None:
        _CONTEXTS.add(self)
        self.batch: Any = None
        self.epoch = 0
        self.graph_labels: tuple[str, ...] = ()
        self.graph_label = ""
        self.seconds: deque[float] = deque(maxlen=500)

    def push(self, forward_batch: Any) -> Any:
        """Publish the batch behind ``forward_batch``; return what was published before."""
        began = time.perf_counter()
        previous = self.batch
        self.batch = getattr(forward_batch, BATCH_ATTRIBUTE, None)
        if not forward_batch.forward_mode.is_decode():
            self.epoch += 1
            # In a mixed batch the requests that decode are not inserted into the tree again.
            decoding = {id(req) for req in getattr(self.batch, "decoding_reqs", None) or ()}
            for req in getattr(self.batch, "reqs", None) or ():
                if id(req) not in decoding:
                    vars(req).pop(_SETTLED_ATTRIBUTE, None)
        self.seconds.append(time.perf_counter() - began)
        return previous

    def settled(self, reqs: Sequence[Any]) -> list[bool]:
        """Of each request, whether its row is known to hold the tree's slots."""
        try:  # twice as fast as asking with a default, and the usual case
            return [req._sglang_prefix_settled == req.retraction_count for req in reqs]
        except AttributeError:
            return [getattr(req, _SETTLED_ATTRIBUTE, -1) == req.retraction_count for req in reqs]

    def settle(self, reqs: Iterable[Any]) -> None:
        """Note that these requests have been launched in a decode step."""
        for req in reqs:
            setattr(req, _SETTLED_ATTRIBUTE, req.retraction_count)

    def pop(self, previous: Any) -> None:
        """Undo :meth:`push`; passes may nest."""
        self.batch = previous


def note_retraction() -> None:
    """Note, for all model runners of this process, that a request gives up its slots."""
    for schedule in _CONTEXTS:
        schedule.epoch += 1


def schedule_context_of(model_runner: Any) -> ScheduleContext | None:
    """The schedule of a model runner; None for one that does not use our backend."""
    found: ScheduleContext | None = vars(model_runner).get(_CONTEXT_ATTRIBUTE)
    return found


def ensure_schedule_context(model_runner: Any) -> ScheduleContext:
    """The schedule of a model runner, a new one where there is none."""
    found = schedule_context_of(model_runner) or ScheduleContext()
    setattr(model_runner, _CONTEXT_ATTRIBUTE, found)
    return found
