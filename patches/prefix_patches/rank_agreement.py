"""Agreement among ranks that have batches of their own, before a step that they take together.

With DP attention SGLang's scheduler gathers a row of numbers from every rank before each step: how
many tokens it has, in which mode, whether it could replay a graph. Our numbers are further columns
of that row. So they cost no message of their own, and no rank can be waited for in vain: every rank
is in every exchange, also one that prefills or has nothing to do.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prefix_patches.attributes import ScheduleBatch
from prefix_patches.patch import RELEASES, Touch, resolve
from prefix_patches.schedule_context import ScheduleContext, schedule_context_of

__all__ = ["TOUCHED", "install", "why_not"]

_HOME = "sglang.srt.managers.scheduler_components.dp_attn"
_INFO = f"{_HOME}:MLPSyncBatchInfo"
# Where it keeps the rows of all, one for each rank of attention: from 0.5.18 on, and in 0.5.17,
# where they are still on the device.
_TABLES = ("tp0_info_cpu", "tp0_info")


@dataclass
class _Exchange:
    """The exchange under way.

    Attributes:
        schedule: who votes in it.
        vote: the numbers of this rank.
        info: SGLang's ``MLPSyncBatchInfo``, which holds those of all when it has ended; None where
            nothing was gathered.
    """

    schedule: ScheduleContext
    vote: tuple[int, ...]
    info: Any = None

    def end(self, batch: ScheduleBatch | None) -> None:
        """Tell the outcome to the batch of this rank, and to what stands in for it in the step."""
        if self.info is None or self.schedule.agree is None:
            return
        held = vars(self.info)
        table = held[next(name for name in _TABLES if name in held)]
        label = self.schedule.agree(table[:, -len(self.vote) :].tolist())
        if batch is not None:
            self.schedule.note_label(batch, label)
            if batch.inner_idle_batch is not None:
                self.schedule.note_label(batch.inner_idle_batch, label)


_exchange: _Exchange | None = None


def _prepare_mlp_sync_batch(original: Any, self: Any, local_batch: Any) -> Any:
    global _exchange
    schedule = schedule_context_of(self.model_runner)
    if schedule is None or schedule.vote is None:
        return original(self, local_batch)
    _exchange = exchange = _Exchange(schedule, schedule.vote(local_batch))
    try:
        batch = original(self, local_batch)
    finally:
        _exchange = None
    exchange.end(batch)
    return batch


def _get_local_tensor(original: Any, self: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
    if _exchange is None:
        return original(self, device, *args, **kwargs)
    _exchange.info = self
    # Put together on the CPU: the row still goes to the device in one copy.
    row = original(self, "cpu", *args, **kwargs)
    return torch.cat((row, row.new_tensor(_exchange.vote))).to(device)


def _get_fallback_tensor(original: Any, self: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
    if _exchange is None:
        return original(self, device, *args, **kwargs)
    row = original(self, "cpu", *args, **kwargs)
    return torch.cat((row, row.new_zeros(len(_exchange.vote)))).to(device)


_touch = partial(
    Touch,
    if_gone="with DP attention, decode graphs and SGLANG_PREFIX_GATE=auto every step is stock's, "
    "under the reason `dp-attention`",
)

TOUCHED = (
    _touch(
        f"{_HOME}:SchedulerDPAttnAdapter.prepare_mlp_sync_batch",
        why="encloses the exchange before a step, and knows the batch and the model runner",
        releases=f"{RELEASES}, called once per exchange; its result is the batch that runs, or has "
        "the idle one that runs in `inner_idle_batch`",
        parameters=("self", "local_batch"),
        exact=True,
        replacement=_prepare_mlp_sync_batch,
    ),
    _touch(
        f"{_INFO}._get_local_tensor",
        why="makes the row of this rank; what is gathered is as wide as it is",
        releases=f"{RELEASES}; rows are read by the numbers of their first columns",
        parameters=("self", "device"),
        replacement=_get_local_tensor,
    ),
    _touch(
        f"{_INFO}._get_fallback_tensor",
        why="makes the row of a rank that has left",
        releases=f"{RELEASES}, as wide as the other",
        parameters=("self", "device"),
        replacement=_get_fallback_tensor,
    ),
)


def why_not() -> str | None:
    """What this SGLang lacks for an agreement; None where it lacks nothing."""
    problems = [problem for touch in TOUCHED if (problem := touch.problem()) is not None]
    if not problems and not set(_TABLES) & set(inspect.signature(resolve(_INFO)).parameters):
        problems = [f"{_INFO.replace(':', '.')} ({' and '.join(_TABLES)} are gone)"]
    return "; ".join(problems) or None


def install() -> None:
    """Take part in the exchange; only on servers that need it. Idempotent.

    Raises:
        RuntimeError: a patch did not take.
    """
    for touch in TOUCHED:
        touch.install()
        if not touch.installed():
            raise RuntimeError(f"sglang-prefix: the patch {touch.name} did not take effect")
