"""A decode batch or verify pass as SGLang handed it over: what planning reads of it, alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_patches.attributes import ForwardBatch, ReplayView, Request, ScheduleBatch

__all__ = ["DecodeBatch", "ScheduledRows"]

IntArray = NDArray[np.int64]

_INT64 = np.dtype(np.int64)


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
    No property reads a device. Requests at the end of a batch may be padding of a graph.

    In a verify pass of speculative decoding each request has several query tokens, the drafts, of
    which the first is the token that was accepted last. SGLang's lengths leave them out, a decode
    batch's count its new token; lengths here count all of them.

    Attributes:
        forward_batch: SGLang's ``ForwardBatch``, or what its graph runner hands over instead; rows
            where a batch has been scheduled, and nothing more.
        schedule_batch: SGLang's ``ScheduleBatch`` behind it; None where none is known.
        in_graph: the step is a graph's, so its tails grow inside the graph.
        drafts: tokens of each request that a verify pass checks; 0 in decode.
    """

    forward_batch: ForwardBatch | ReplayView | ScheduledRows
    schedule_batch: ScheduleBatch | None
    in_graph: bool = False
    drafts: int = 0

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
    def kind(self) -> str:
        """What kind of pass it is, as a `StepState` says it."""
        return "verify" if self.drafts else "decode"

    @property
    def padded_batch_size(self) -> int:
        """Requests, padding included."""
        return self.forward_batch.batch_size

    @property
    def num_rows(self) -> int:
        """Rows of q and of the outputs, padding included."""
        return self.forward_batch.batch_size * (self.drafts or 1)

    @property
    def num_requests(self) -> int:
        """Requests that are not padding of a graph."""
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
        """[padded_batch_size] lengths as SGLang has them, on the device: without drafts."""
        return self.forward_batch.seq_lens

    @property
    def new_slots(self) -> torch.Tensor:
        """[num_rows] slots of the new tokens, on the device; a replay's may lack the padding."""
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
            return total + self.drafts * self.padded_batch_size
        lens = self.host_lengths(self.padded_batch_size)
        return -1 if lens is None else int(lens.sum())

    def is_of(self, reqs: list[Request], padded_batch_size: int, drafts: int) -> bool:
        """Whether it is a batch of these requests, in this order, with as many drafts each."""
        return (
            self.schedule_batch is not None
            and self.drafts == drafts
            and self.forward_batch.batch_size == padded_batch_size
            and self.schedule_batch.reqs == reqs
        )

    def counted_lengths(self) -> IntArray | None:
        """Lengths [padded_batch_size] as SGLang has them, where the CPU knows them: without drafts.

        No copy, and SGLang may add to them in place.
        """
        lens = self.forward_batch.seq_lens_cpu
        if lens is None:
            lens = self.forward_batch.seq_lens
        if not lens.is_cpu:
            return None
        found: IntArray = lens.numpy()
        return found if found.dtype is _INT64 else found.astype(np.int64)

    def host_lengths(self, num_requests: int) -> IntArray | None:
        """Lengths [num_requests] where the CPU knows them, else None."""
        lens = self.counted_lengths()
        return None if lens is None else lens[:num_requests] + self.drafts

    def device_lengths(self, num_requests: int) -> IntArray:
        """Lengths [num_requests], read from the device, for which the CPU waits."""
        lens = np.asarray(self.seq_lens[:num_requests].cpu().numpy(), dtype=np.int64)
        return lens + self.drafts

    def kv_states(self) -> list[Any]:
        """What changes when a request's KV moves although the same requests decode."""
        indices = self.pool_indices
        states: list[Any] = [(req.retraction_count, req.last_node) for req in self.reqs]
        return states if indices is None else [*states, *indices.tolist()]
