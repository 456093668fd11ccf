"""What an executor needs of a plan and is to its caller, and how a pack is cut into splits."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["PlanArrays", "PlanExecutor", "split_bounds"]

IntArray = NDArray[np.int64]


class PlanArrays(Protocol):
    """A pack plan as host arrays. ``P`` packs serve ``B`` requests; the last ``B`` are the tails.

    A pack is one stretch of positions that ``query_indptr[p + 1] - query_indptr[p]`` requests
    read together, in ``num_splits[p]`` pieces. Pack ``P - B + b`` is the tail of request ``b``: it
    alone grows. Piece ``s`` of pack ``p`` writes, for its ``j``-th query, the partial with number
    ``partial_index[partial_indptr[p] + s * num_queries + j]``; the partials of request ``b`` are
    the numbers from ``request_indptr[b]`` to ``request_indptr[b + 1]``.

    The slots of pack ``p`` stand in ``kv_slots`` from ``slot_offset[p]`` on; behind those of a
    tail is room for ``reserved_tail_slots`` more.
    """

    @property
    def batch_size(self) -> int: ...
    @property
    def num_packs(self) -> int: ...
    @property
    def num_partials(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def reserved_tail_slots(self) -> int: ...
    @property
    def seq_lens(self) -> IntArray: ...
    @property
    def pack_start(self) -> IntArray: ...
    @property
    def pack_end(self) -> IntArray: ...
    @property
    def query_indptr(self) -> IntArray: ...
    @property
    def queries(self) -> IntArray: ...
    @property
    def num_splits(self) -> IntArray: ...
    @property
    def slot_offset(self) -> IntArray: ...
    @property
    def partial_indptr(self) -> IntArray: ...
    @property
    def partial_index(self) -> IntArray: ...
    @property
    def request_indptr(self) -> IntArray: ...


class PlanExecutor(Protocol):
    """What runs plans: `cpu.TorchExecutor` or `triton_executor.TritonExecutor`.

    ``max_block_rows`` query rows (requests times group size) read KV in one pass; None for any
    number. ``append`` lets every tail grow by one token from device tensors alone, and is False
    where the executor cannot.
    """

    @property
    def max_block_rows(self) -> int | None: ...
    @property
    def kv_slots(self) -> torch.Tensor: ...
    def load(
        self,
        plan: PlanArrays,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        *,
        num_rows: int | None = None,
    ) -> None: ...
    def write_slots(self, target: IntArray, slots: torch.Tensor) -> None: ...
    def set_lengths(self, tail_lengths: IntArray) -> None: ...
    def append(self, seq_lens: torch.Tensor, new_slots: torch.Tensor) -> bool: ...
    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        *,
        sm_scale: float,
        logit_cap: float = 0.0,
        k_scale: float | torch.Tensor = 1.0,
        v_scale: float | torch.Tensor = 1.0,
    ) -> None: ...


def split_bounds(length: int, num_splits: int, split: int) -> tuple[int, int]:
    """Tokens of piece ``split`` of a pack that holds ``length`` tokens now, as [begin, end).

    Pieces are equal up to rounding and depend on the current length only, so a plan stays valid
    while its tails grow. A piece of a short pack may be empty.
    """
    chunk = -(-length // num_splits)
    return min(split * chunk, length), min((split + 1) * chunk, length)
