"""FlashInfer's paged decode, and its multi-level cascade."""

from __future__ import annotations

from functools import cache

import torch

from sglang_prefix.bench.providers.base import PagedProvider, load_module
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["PROVIDERS", "FlashInferCascade", "FlashInferDecode"]

# FlashInfer recommends 128 MB; the widest batches here need more.
_WORKSPACE_BYTES = 512 << 20


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class FlashInferDecode(PagedProvider):
    """FlashInfer's paged decode, on tensor cores from four query heads per KV head on."""

    name = "flashinfer"
    kind = "stock"
    modules = ("flashinfer",)

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        group = inputs.heads.qo // inputs.heads.kv
        self._wrapper = load_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
            _workspace(inputs.q.device), "NHD", use_tensor_cores=group >= 4
        )
        lens = inputs.batch.seq_lens.tolist()
        self._lists = self.page_lists([0] * len(lens), lens, list(range(len(lens))))

    def plan(self) -> None:
        w = self.inputs
        self._wrapper.plan(
            self._lists.indptr,
            self.page_indices(self._lists),
            self._lists.last_page_len,
            *self._shape,
            q_data_type=w.q.dtype,
            kv_data_type=w.k.dtype,
            sm_scale=w.sm_scale,
        )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        out: torch.Tensor = self._wrapper.run(w.q, (self.pages(k), self.pages(v)), out=w.out)
        return out


class FlashInferCascade(PagedProvider):
    """FlashInfer's multi-level cascade, its levels given by us, pinned to FA2.

    Left to itself it takes FA3 on Hopper, whose decode tiles are nearly empty (see
    sgl-project/mini-sglang, python/minisgl/attention/fi.py).
    """

    name = "flashinfer-cascade"
    kind = "peer"
    modules = ("flashinfer",)

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        levels = inputs.batch.levels()
        assert levels is not None
        self._wrapper = load_module("flashinfer").MultiLevelCascadeAttentionWrapper(
            len(levels), _workspace(inputs.q.device), "NHD"
        )
        for wrapper in self._wrapper._batch_prefill_wrappers:
            wrapper._backend = "fa2"
        ends = [path.ends for path in inputs.batch.paths]
        self._qo_indptr, self._lists = [], []
        for depth, nodes in enumerate(levels):
            first = [0, *(1 + (nodes[1:] != nodes[:-1]).nonzero()[0]).tolist()]
            self._qo_indptr.append(torch.tensor([*first, len(nodes)], dtype=torch.int32))
            starts = [ends[b][depth - 1] if depth else 0 for b in first]
            self._lists.append(self.page_lists(starts, [ends[b][depth] for b in first], first))

    @classmethod
    def inapplicable(cls, inputs: AttentionInputs) -> str | None:
        levels = inputs.batch.levels()
        if levels is None:
            return "the forest is no set of levels"
        return "nothing is shared" if len(levels) < 2 else None

    @property
    def kv_tokens_read(self) -> int:
        """It reads every level once."""
        return self.inputs.unique_tokens

    def plan(self) -> None:
        w = self.inputs
        self._wrapper.plan(
            self._qo_indptr,
            [lists.indptr for lists in self._lists],
            [self.page_indices(lists) for lists in self._lists],
            [lists.last_page_len for lists in self._lists],
            *self._shape,
            sm_scale=w.sm_scale,
            q_data_type=w.q.dtype,
            kv_data_type=w.k.dtype,
        )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._wrapper.run(self.inputs.q, (self.pages(k), self.pages(v)))
        return out


PROVIDERS = (FlashInferDecode, FlashInferCascade)
