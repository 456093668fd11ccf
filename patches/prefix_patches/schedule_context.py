"""How a batch's CPU-side facts reach the attention backend.

SGLang hands the backend a rebuilt batch object that lacks the requests and the tree. So the
schedule batch is noted on the object that ``ForwardBatch.init_new`` returns, and
``ModelRunner.forward``, which sees that very object, publishes it here for as long as the forward
pass runs. One :class:`ScheduleContext` hangs on each model runner that uses our backend.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakSet

from prefix_patches.attributes import ModelRunner, Request, ScheduleBatch
from prefix_patches.patch import RELEASES, Touch

__all__ = [
    "BATCH_ATTRIBUTE",
    "PASSED_BY",
    "TOUCHED",
    "ScheduleContext",
    "ensure_schedule_context",
    "schedule_context_of",
]

# Of a forward batch: its schedule batch.
BATCH_ATTRIBUTE = "_sglang_prefix_schedule_batch"
# Passes that generate tokens and are no decode, by SGLang's name of their mode: under the decode
# flag alone they never reach our backend.
PASSED_BY = {"TARGET_VERIFY": "speculative-verify", "DLLM_EXTEND": "diffusion"}
# Of a request: its number of retractions when it last decoded.
_SETTLED_ATTRIBUTE = "_sglang_prefix_settled"
# Of a schedule batch: the label that ranks agreed on for its step.
_LABEL_ATTRIBUTE = "_sglang_prefix_label"
# Of a model runner: its schedule context.
_CONTEXT_ATTRIBUTE = "_sglang_prefix_schedule_context"

_CONTEXTS: WeakSet[ScheduleContext] = WeakSet()


class ScheduleContext:
    """What the forward pass under way was scheduled from.

    Attributes:
        batch: SGLang's ``ScheduleBatch`` of the pass under way; None outside a pass, and in
            passes that no schedule batch stands behind (warm-up, capture).
        epoch: grows with every pass that neither decodes nor verifies drafts, and whenever a
            request is retracted. Rows and tree may have changed then.
        graph_labels: the labels under which each decode graph is captured, see
            `graph_labels.py`; none where graphs hold nothing of ours.
        graph_modes: SGLang's names of the modes whose graphs are.
        graph_label: the label being captured, or chosen for the step under way.
        vote, agree: where ranks with batches of their own must replay the same label, see
            `rank_agreement.py`, else None. The first gives the numbers of this rank before a step,
            from its batch or None; the second the label, from those of all ranks.
        on_passed_by: called with the reason, a value of :data:`PASSED_BY`, for every pass that
            generates tokens and is no decode.
        seconds: host time that publishing a batch took, for each of the newest passes.

    A request is settled once it has decoded since it was last prefilled or retracted. Only then is
    its row known to hold the tree's slots: under overlap scheduling the tree insert of a prefill is
    processed after the next decode step has been launched.
    """

    def __init__(self) -> None:
        _CONTEXTS.add(self)
        self.batch: ScheduleBatch | None = None
        self.epoch = 0
        self.graph_labels: tuple[str, ...] = ()
        self.graph_modes: tuple[str, ...] = ("DECODE",)
        self.graph_label = ""
        self.vote: Callable[[ScheduleBatch | None], tuple[int, ...]] | None = None
        self.agree: Callable[[Sequence[Sequence[int]]], str] | None = None
        self.on_passed_by: Callable[[str], None] | None = None
        self.seconds: deque[float] = deque(maxlen=500)

    @property
    def agreed_label(self) -> str | None:
        """What ranks agreed on for the pass under way; None in passes that no exchange preceded."""
        return None if self.batch is None else vars(self.batch).get(_LABEL_ATTRIBUTE)

    def note_label(self, batch: ScheduleBatch, label: str) -> None:
        """Note what ranks agreed on for the next pass of a batch."""
        setattr(batch, _LABEL_ATTRIBUTE, label)

    def push(self, forward_batch: Any) -> Any:
        """Publish the batch behind ``forward_batch``; return what was published before."""
        began = time.perf_counter()
        previous = self.publish(forward_batch)
        mode = forward_batch.forward_mode
        if not mode.is_decode():
            if self.on_passed_by is not None and mode.name in PASSED_BY:
                self.on_passed_by(PASSED_BY[mode.name])
            # A verify pass decodes: requests keep their rows and what the tree has of them.
            if not mode.is_target_verify():
                self.epoch += 1
                if self.batch is not None:
                    _unsettle(self.batch)
        self.seconds.append(time.perf_counter() - began)
        return previous

    def publish(self, forward_batch: Any) -> Any:
        """As :meth:`push`, for a pass that is prepared before it begins."""
        previous = self.batch
        self.batch = vars(forward_batch).get(BATCH_ATTRIBUTE)
        return previous

    def settled(self, reqs: Sequence[Request]) -> list[bool]:
        """Of each request, whether its row is known to hold the tree's slots."""
        try:  # twice as fast as asking with a default, and the usual case
            return [
                req._sglang_prefix_settled == req.retraction_count  # type: ignore[attr-defined]
                for req in reqs
            ]
        except AttributeError:
            return [vars(req).get(_SETTLED_ATTRIBUTE, -1) == req.retraction_count for req in reqs]

    def settle(self, reqs: Iterable[Request]) -> None:
        """Note that these requests have been launched in a decode step."""
        for req in reqs:
            setattr(req, _SETTLED_ATTRIBUTE, req.retraction_count)

    def pop(self, previous: Any) -> None:
        """Undo :meth:`push`; passes may nest."""
        self.batch = previous


def _unsettle(batch: ScheduleBatch) -> None:
    """Forget what is known of the rows of requests that are prefilled."""
    # In a mixed batch the requests that decode are not inserted into the tree again.
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    for req in batch.reqs or ():
        if id(req) not in decoding:
            vars(req).pop(_SETTLED_ATTRIBUTE, None)


def schedule_context_of(model_runner: ModelRunner) -> ScheduleContext | None:
    """The schedule of a model runner; None for one that does not use our backend."""
    found: ScheduleContext | None = vars(model_runner).get(_CONTEXT_ATTRIBUTE)
    return found


def ensure_schedule_context(model_runner: ModelRunner) -> ScheduleContext:
    """The schedule of a model runner, a new one where there is none."""
    found = schedule_context_of(model_runner) or ScheduleContext()
    setattr(model_runner, _CONTEXT_ATTRIBUTE, found)
    return found


def _init_new(original: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    forward_batch = original(cls, batch, *args, **kwargs)
    setattr(forward_batch, BATCH_ATTRIBUTE, batch)
    return forward_batch


def _forward(original: Any, self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    # Draft runners call this too, nested in the target's pass; they have no schedule.
    schedule = schedule_context_of(self)
    if schedule is None:
        return original(self, forward_batch, *args, **kwargs)
    previous = schedule.push(forward_batch)
    try:
        return original(self, forward_batch, *args, **kwargs)
    finally:
        schedule.pop(previous)


def _reset_for_retract(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    for schedule in _CONTEXTS:
        schedule.epoch += 1
    return original(self, *args, **kwargs)


TOUCHED = (
    Touch(
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        why="the forward batch carries no requests and no tree, and the radix paths hang on those",
        releases=f"{RELEASES}, called as `(cls, batch, model_runner, **options)`",
        kind=classmethod,
        parameters=("batch", "model_runner"),
        replacement=_init_new,
    ),
    Touch(
        "sglang.srt.model_executor.model_runner:ModelRunner.forward",
        why="the backend sees a copy of the forward batch without anything attached to it; this is "
        "the last place that sees the original, and it encloses eager passes and graph replays",
        releases=f"{RELEASES}, called as `(self, forward_batch, ...)`",
        parameters=("self", "forward_batch"),
        replacement=_forward,
    ),
    Touch(
        "sglang.srt.managers.schedule_batch:Req.reset_for_retract",
        why="a retracted request gives up its slots. Most come back through a prefill, which ends "
        "every plan. On the decode side of PD disaggregation they come back without a forward pass "
        "(`PREBUILT`), and after a pause that retracts everybody the same requests may decode "
        "again, in the same order, on other slots",
        releases=f"{RELEASES}, called for every retraction, as `(self)`",
        replacement=_reset_for_retract,
    ),
)
