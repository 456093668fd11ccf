"""What the log says when a backend has been built."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from sglang_prefix.backend.fallback import REASONS
from sglang_prefix.backend.layers import ServedLayers
from sglang_prefix.config import PrefixConfig

__all__ = ["log_startup"]

logger = logging.getLogger(__name__)


def log_startup(
    served: ServedLayers | None,
    num_layers: int,
    delegated: Mapping[int, str],
    graph_labels: Sequence[str],
    stock_name: str,
    config: PrefixConfig,
    inactive: str | None,
) -> None:
    """One line that says whether anything is packed, and one per reason to delegate a layer.

    Args:
        served: what runs our layers; None if nothing does.
        num_layers: attention layers of the model.
        delegated: reason by layer id, of layers that are always the stock backend's.
        graph_labels: labels that decode graphs are captured under.
        stock_name: name of the stock backend.
        config: settings.
        inactive: why nothing is packed, a key of :data:`REASONS`; None if something is.
    """
    workspace = served.workspace if served else None
    logger.info(
        "prefix attention: %d of %d layers, executor %s, stock backend %s, gate %s, policy %s, "
        "graph labels %s%s%s",
        len(served.runner_of) if served and not inactive else 0,
        num_layers,
        "/".join(served.executor_names) if served else "none",
        stock_name,
        config.gate,
        config.policy,
        "/".join(graph_labels) or "none",
        f", workspace {workspace.num_bytes / 2**20:.0f} MiB" if workspace else "",
        f", inactive: {REASONS[inactive]}" if inactive else "",
    )
    for reason in sorted(set(delegated.values())):
        ids = [layer_id for layer_id, found in delegated.items() if found == reason]
        logger.info("prefix attention: layers %s are stock's (%s)", ids, REASONS[reason])
