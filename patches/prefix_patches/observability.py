"""What SGLang shows of itself, with our part in it: log line, ``/server_info``, metric labels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prefix_patches.attributes import ModelRunner, ParallelContext
from prefix_patches.patch import RELEASES, Touch
from prefix_patches.stock_backend import resolved_args

__all__ = ["STATE_KEY", "TOUCHED", "append_with", "metric_labels", "report_with"]

STATE_KEY = "sglang_prefix"

_DECODE_LOGGER = "sglang.srt.managers.scheduler_components.metrics_reporter"
_DECODE_LINE = "Decode batch"
_ENGINE_TYPES = {"prefill": "prefill", "decode": "decode"}

_reporters: list[Callable[[], dict[str, Any]]] = []

logger = logging.getLogger(__name__)


class _Appender(logging.Filter):
    """Lets every record pass, and lengthens the ones that it knows."""

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """See :class:`logging.Filter`."""
        if isinstance(record.msg, str) and record.msg.startswith(_DECODE_LINE):
            record.msg = f"{record.msg.rstrip(', ')}, {self._text()}"
        return True


def append_with(text: Callable[[], str]) -> None:
    """Append what ``text`` returns to each "Decode batch, ..." line of this process.

    An operator who watches that line sees whether batches are packed without asking the server. It
    is one message of one logger, every ``--decode-log-interval`` steps, from 0.5.17 to 0.5.23. When
    it is gone, the line stays as SGLang writes it; the counters are in ``/server_info`` as well.
    """
    logging.getLogger(_DECODE_LOGGER).addFilter(_Appender(text))


def report_with(reporter: Callable[[], dict[str, Any]]) -> None:
    """Add a callable whose dict of plain values is shown; one per backend of the process."""
    _reporters.append(reporter)


def _get_internal_state(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    result.internal_state[STATE_KEY] = [reporter() for reporter in _reporters]
    return result


def metric_labels(model_runner: ModelRunner) -> dict[str, str] | None:
    """Labels for the metrics of this rank; None where it exports none.

    Our counters stand on ``/metrics`` beside SGLang's and are joined with them by their labels, and
    only the ranks that export SGLang's are to export ours. The labels are those of
    ``SchedulerMetricsCollector``, from ``runtime_context.get_parallel`` and the resolved settings,
    0.5.17 to 0.5.23. When one is gone, our counters are not exported, and the log says so.
    """
    args = resolved_args(model_runner)
    try:
        if not args.enable_metrics or model_runner.is_draft_worker:
            return None
        from sglang.srt.runtime_context import get_parallel

        ranks: ParallelContext = get_parallel()
        if ranks.attn_tp_rank != 0 and not args.enable_metrics_for_all_schedulers:
            return None
        labels = {
            "model_name": args.served_model_name,
            "engine_type": _ENGINE_TYPES.get(args.disaggregation_mode, "unified"),
            "tp_rank": ranks.tp_rank,
            "pp_rank": ranks.pp_rank,
            "moe_ep_rank": ranks.moe_ep_rank,
        }
        if getattr(ranks, "dp_rank", None) is not None:
            labels["dp_rank"] = ranks.dp_rank
        labels |= args.extra_metric_labels or {}
    except (ImportError, AttributeError, AssertionError) as error:
        logger.warning("prefix attention: no metrics, SGLang's labels are not there (%s)", error)
        return None
    return {name: str(value) for name, value in labels.items()}


TOUCHED = (
    Touch(
        "sglang.srt.managers.scheduler:Scheduler.get_internal_state",
        why="a user must see whether the backend runs: `GET /server_info` and "
        "`Engine.get_server_info()` list this state, and the counters join it under `STATE_KEY`",
        releases=f"{RELEASES}; the result holds a dict `internal_state` of plain values",
        # Processes that run a model without a scheduler (`sglang.benchmark.one_batch`) have not
        # imported it, and are left alone.
        if_loaded=True,
        replacement=_get_internal_state,
    ),
)
