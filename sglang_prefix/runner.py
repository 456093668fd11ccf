"""The executor as the backend still calls it; goes when the backend calls executors itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.executor import EXECUTORS, AttentionParams, choose_executor, make_executor
from prefix_kernels.plan import AttentionShape, PackPlan

__all__ = ["EXECUTORS", "PlanRunner", "choose_executor"]

IntArray = NDArray[np.int64]


class PlanRunner:
    """One executor under the old names."""

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        executor: str,
        *,
        check_slots: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._executor = make_executor(
            executor, shape, device, check_slots=check_slots, **(options or {})
        )
        self.executor_name = executor

    @property
    def plan(self) -> PackPlan | None:
        """The plan in use."""
        return self._executor.plan

    @property
    def num_rows(self) -> int:
        """Batch rows, padding included."""
        return self._executor.padded_batch_size

    @property
    def max_block_rows(self) -> int | None:
        """Of the executor."""
        return self._executor.max_block_rows

    def load(
        self,
        plan: PackPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        num_rows: int | None = None,
    ) -> None:
        """Load a plan."""
        self._executor.load(plan, req_to_token, req_pool_indices, padded_batch_size=num_rows)

    def append_in_graph(self, seq_lens: torch.Tensor, new_slots: torch.Tensor) -> None:
        """Append inside a graph."""
        self._executor.append(seq_lens, new_slots)

    def note_growth(self) -> None:
        """Nothing: the executor's lengths are on the device."""

    def append(
        self, seq_lens: IntArray, new_slots: torch.Tensor, device_lens: torch.Tensor | None = None
    ) -> None:
        """Append one token to every tail."""
        lens = torch.from_numpy(seq_lens) if device_lens is None else device_lens
        self._executor.append(lens, new_slots)

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        **params: Any,
    ) -> None:
        """Run a layer."""
        self._executor.run(q, k_cache, v_cache, out, lse, AttentionParams(**params))
