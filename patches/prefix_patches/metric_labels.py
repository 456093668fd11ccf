"""``runtime_context.get_parallel`` and the resolved settings: the labels of SGLang's own metrics.

Why: our counters stand on ``/metrics`` beside SGLang's and are joined with them by their labels;
and only the ranks that export SGLang's metrics are to export ours.
Releases: 0.5.17 to 0.5.23; the labels are those of ``SchedulerMetricsCollector``.
When it is gone: our counters are not exported, and the log says so.
"""

from __future__ import annotations

import logging
from typing import Any

from prefix_patches.resolved_args import resolved_args

__all__ = ["metric_labels"]

logger = logging.getLogger(__name__)


def metric_labels(model_runner: Any) -> dict[str, str] | None:
    """Labels for the metrics of this rank; None where it exports none."""
    args = resolved_args(model_runner)
    if not getattr(args, "enable_metrics", False) or model_runner.is_draft_worker:
        return None
    try:
        from sglang.srt.runtime_context import get_parallel

        ranks = get_parallel()
        everyone = getattr(args, "enable_metrics_for_all_schedulers", False)
        if ranks.attn_tp_rank != 0 and not everyone:
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
    except (ImportError, AttributeError, AssertionError) as error:
        logger.warning("prefix attention: no metrics, SGLang's labels are not there (%s)", error)
        return None
    labels |= getattr(args, "extra_metric_labels", None) or {}
    return {name: str(value) for name, value in labels.items()}


_ENGINE_TYPES = {"prefill": "prefill", "decode": "decode"}
