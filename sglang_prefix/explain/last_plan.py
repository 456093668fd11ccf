"""The last plan of a running server, for ``sglang-prefix explain --base-url``.

Off unless ``SGLANG_PREFIX_KEEP_PLAN=1``. What is kept is a reference to what planning has made
anyway; it becomes a record when somebody asks ``GET /server_info``, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglang_prefix.config import PrefixConfig
from sglang_prefix.explain.record import Answer, Neighbours, PlanRecord, ShapePlan

if TYPE_CHECKING:
    from sglang_prefix.backend.decode_planner import LayerGroup
    from sglang_prefix.forest import PrefixForest

__all__ = ["LastPlan"]

IntArray = NDArray[np.int64]

_OF_A_KIND = {"decode": "", "verify": ", a verify pass", "extend": ", an extend"}


class LastPlan:
    """Keeps what was decided about the newest batch that was planned, of any kind of pass.

    Args:
        config: settings of the backend.
    """

    def __init__(self, config: PrefixConfig) -> None:
        self._config = config
        self._kept: tuple[Any, ...] | None = None

    def note(
        self,
        forest: PrefixForest,
        groups: Sequence[LayerGroup],
        reason: str | None,
        predicted_us: tuple[float | None, float | None],
        page_size: int,
        padded_batch_size: int,
        *,
        kind: str = "decode",
        query_lens: IntArray | None = None,
    ) -> None:
        """Keep a batch; copies nothing.

        Args:
            forest: what its requests share; not changed afterwards.
            groups: the planners that planned it.
            reason: why the stock backend serves it; None if it is packed.
            predicted_us: the gate's newest predictions, packed and stock.
            page_size: tokens per KV page.
            padded_batch_size: rows of q, which in decode are requests, padding included.
            kind: of the pass, one of `counters.KINDS`.
            query_lens: [B] query tokens of each request, not changed afterwards; None for one each.
        """
        batch = page_size, padded_batch_size, kind, query_lens
        self._kept = (forest, groups, reason, predicted_us, *batch)

    def as_dict(self) -> dict[str, Any] | None:
        """The record of what was kept; None if nothing was."""
        if self._kept is None:
            return None
        forest, groups, reason, predicted_us, *batch = self._kept
        page_size, padded_batch_size, kind, query_lens = batch
        # In other cases the newest prediction may be an earlier batch's.
        predicted = predicted_us if reason in (None, "gate-no-gain") else (None, None)
        on_gpu = any(group.workspace is not None for group in groups)
        return PlanRecord(
            source=f"last plan of a running server{_OF_A_KIND[kind]}",
            page_size=page_size,
            neighbours=Neighbours.of(forest),
            plans=tuple(_plan_of(group, padded_batch_size) for group in groups),
            answer=Answer(self._config.gate, reason, *predicted),
            launch_mode=self._config.launch_mode,
            graph_rows=padded_batch_size if on_gpu else None,
            gpu=_gpu_name() if on_gpu else None,
            query_lens=None if query_lens is None else query_lens.tolist(),
        ).as_dict()


def _plan_of(group: LayerGroup, padded_batch_size: int) -> ShapePlan:
    planner = group.planner
    costs = planner.costs_of(padded_batch_size)
    return ShapePlan(
        group.num_layers, planner.policy_name, planner.max_partials, costs.shape, costs.device
    )


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
