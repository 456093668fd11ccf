"""A decode batch as SGLang handed it over: what planning reads of it, and nothing of it before."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_patches.attributes import ForwardBatch, ReplayView, Request, ScheduleBatch

__all__ = ["DecodeBatch", "ScheduledRows"]

IntArray = NDArray[np.int64]


class ScheduledRows(NamedTuple):
    """What planning reads of a forward batch, before there is one: rows that are not padded yet."""

    batch_size: int
    out_cache_loc: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    spec_info: Any
    seq_lens_sum: int | None = None


class DecodeBatch(NamedTuple):
    """A view of one decode batch. Copies nothing, and reads an attribute when it is asked for it.

    SGLang's objects are not typed, and differ between releases; what they are ends here.
    No property reads a device. Rows at the end of a batch may be padding of a graph.

    Attributes:
        forward_batch: SGLang's ``ForwardBatch``, or what its graph runner hands over instead; rows
            where a batch has been scheduled, and nothing more.
        schedule_batch: SGLang's ``ScheduleBatch`` behind it; None where none is known.
        in_graph: the step is a graph's, so its tails grow inside the graph.
    """

    forward_batch: ForwardBatch | ReplayView | ScheduledRows
    schedule_batch: ScheduleBatch | None
    in_graph: bool = False

    @classmethod
    def scheduled(cls, batch: ScheduleBatch) -> DecodeBatch:
        """The decode batch that a schedule batch is about to become."""
        lens = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu
        rows = ScheduledRows(
            len(lens),
            batch.out_cache_loc,
            batch.req_pool_indices,
            batch.seq_lens,
            batch.seq_lens_cpu,
            batch.spec_info,
        )
        return cls(rows, batch)

    @property
    def padded_batch_size(self) -> int:
        """Rows of q and of the outputs, padding included."""
        return self.forward_batch.batch_size

    @property
    def num_requests(self) -> int:
        """Rows that are not padding of a graph."""
        batch = self.forward_batch
        return batch.batch_size - int(getattr(batch, "num_padding", 0))

    @property
    def is_idle(self) -> bool:
        """Whether a rank without requests replays a graph for the sake of the others."""
        mode = getattr(self.forward_batch, "actual_forward_mode", None)
        return mode is not None and bool(mode.is_idle())

    @property
    def reqs(self) -> list[Request]:
        """SGLang's requests; none where no schedule batch is known."""
        return [] if self.schedule_batch is None else self.schedule_batch.reqs

    @property
    def tree_cache(self) -> Any:
        """SGLang's prefix cache of a batch that has requests."""
        assert self.schedule_batch is not None
        return self.schedule_batch.tree_cache

    @property
    def req_pool_indices(self) -> torch.Tensor:
        """[padded_batch_size] rows of ``req_to_token``, on the device."""
        return self.forward_batch.req_pool_indices

    @property
    def seq_lens(self) -> torch.Tensor:
        """[padded_batch_size] lengths, the new token included, on the device."""
        return self.forward_batch.seq_lens

    @property
    def new_slots(self) -> torch.Tensor:
        """[padded_batch_size] slots of the new tokens, on the device."""
        return self.forward_batch.out_cache_loc

    @property
    def pool_indices(self) -> torch.Tensor | None:
        """[num_requests] rows of ``req_to_token`` as the scheduler knows them on the CPU.

        SGLang makes a new tensor whenever one changes.
        """
        batch = self.schedule_batch
        assert batch is not None
        found = batch.req_pool_indices_cpu
        if found is None:
            found = batch.req_pool_indices
            return found if found.device.type == "cpu" else None
        return found

    @property
    def sum_of_lengths(self) -> int:
        """Sum of all lengths, padding included; -1 where the CPU knows none."""
        total = self.forward_batch.seq_lens_sum
        if isinstance(total, int):
            return total
        lens = self.host_lengths(self.padded_batch_size)
        return -1 if lens is None else int(lens.sum())

    def is_of(self, reqs: list[Request], padded_batch_size: int, sum_of_lengths: int) -> bool:
        """Whether it is a batch of these requests, in this order, with lengths of this sum."""
        return (
            self.schedule_batch is not None
            and self.forward_batch.batch_size == padded_batch_size
            and self.schedule_batch.reqs == reqs
            and self.sum_of_lengths == sum_of_lengths
        )

    def host_lengths(self, num_requests: int) -> IntArray | None:
        """Lengths [num_requests] where the CPU knows them, else None."""
        lens = self.forward_batch.seq_lens_cpu
        if lens is None:
            lens = self.forward_batch.seq_lens
        if lens.device.type != "cpu":
            return None
        # A copy: SGLang adds to the lengths in place.
        return np.array(lens.numpy()[:num_requests], dtype=np.int64)

    def device_lengths(self, num_requests: int) -> IntArray:
        """Lengths [num_requests], read from the device, for which the CPU waits."""
        return np.asarray(self.seq_lens[:num_requests].cpu().numpy(), dtype=np.int64)

    def kv_states(self) -> list[Any]:
        """What changes when a request's KV moves although the same requests decode."""
        indices = self.pool_indices
        states: list[Any] = [(req.retraction_count, req.last_node) for req in self.reqs]
        return states if indices is None else [*states, *indices.tolist()]
