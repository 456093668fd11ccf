"""FlashInfer's paged decode, and its multi-level cascade."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from sglang_prefix.bench.providers.base import Provider
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["FlashInferCascade", "FlashInferDecode"]

# FlashInfer recommends 128 MB; the widest batches here need more.
_WORKSPACE_BYTES = 512 << 20


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class _FlashInfer(Provider):
    """What both ask for: lists of pages, heads, and types."""

    modules = ("flashinfer",)

    def page_lists(
        self, starts: Sequence[int], stops: Sequence[int], requests: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages of position ranges of requests: ``indptr``, flat positions in the slot table, and
        tokens of the last pages.
        """
        size, context = self.page_size, self.inputs.req_to_token.shape[1]
        ranges = [range(*ends, size) for ends in zip(starts, stops, strict=True)]
        indptr = torch.tensor([0, *map(len, ranges)]).cumsum(0).int()
        positions = [
            torch.tensor(positions) + request * context
            for positions, request in zip(ranges, requests, strict=True)
        ]
        last_page_len = [
            stop - positions[-1] for positions, stop in zip(ranges, stops, strict=True)
        ]
        return indptr, torch.cat(positions).to(self.inputs.q.device), _int32(last_page_len)

    def pages_at(self, positions: torch.Tensor) -> torch.Tensor:
        """[n] int32 pages at flat positions of the slot table, read on the device."""
        return self.page_numbers(self.inputs.req_to_token.view(-1)[positions])

    def plan_options(self) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Heads and page size, and options, as both ``plan`` methods take them."""
        w = self.inputs
        types = {"q_data_type": w.q.dtype, "kv_data_type": w.k.dtype}
        heads = (w.heads.qo, w.heads.kv, w.heads.dim, self.page_size)
        return heads, {**types, "sm_scale": w.sm_scale}


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class FlashInferDecode(_FlashInfer):
    """FlashInfer's paged decode, on tensor cores from four query heads per KV head on."""

    name = "flashinfer"
    kind = "stock"

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        group = inputs.heads.qo // inputs.heads.kv
        self._wrapper = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
            _workspace(inputs.q.device), "NHD", use_tensor_cores=group >= 4
        )
        lens = inputs.batch.seq_lens.tolist()
        self._pages = self.page_lists([0] * len(lens), lens, range(len(lens)))

    def plan(self) -> None:
        indptr, positions, last_page_len = self._pages
        heads, options = self.plan_options()
        self._wrapper.plan(indptr, self.pages_at(positions), last_page_len, *heads, **options)

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        out: torch.Tensor = self._wrapper.run(w.q, (self.pages(k), self.pages(v)), out=w.out)
        return out


class FlashInferCascade(_FlashInfer):
    """FlashInfer's multi-level cascade, its levels given by us, pinned to FA2.

    Left to itself it takes FA3 on Hopper, whose decode tiles are nearly empty (see
    sgl-project/mini-sglang, python/minisgl/attention/fi.py).
    """

    name = "flashinfer-cascade"
    kind = "peer"

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        levels = inputs.batch.levels()
        if levels is None:
            raise NotRunError("the forest is no set of levels")
        if len(levels) < 2:
            raise NotRunError("nothing is shared")
        self.kv_tokens_read = inputs.unique_tokens  # it reads every level once
        self._wrapper = importlib.import_module("flashinfer").MultiLevelCascadeAttentionWrapper(
            len(levels), _workspace(inputs.q.device), "NHD"
        )
        for wrapper in self._wrapper._batch_prefill_wrappers:
            wrapper._backend = "fa2"
        ends = [(0, *path.ends) for path in inputs.batch.paths]
        self._qo_indptr, self._pages = [], []
        for depth, nodes in enumerate(levels):
            first = [0, *(1 + (nodes[1:] != nodes[:-1]).nonzero()[0]).tolist()]
            self._qo_indptr.append(_int32([*first, len(nodes)]))
            starts, stops = zip(*(ends[b][depth : depth + 2] for b in first), strict=True)
            self._pages.append(self.page_lists(starts, stops, first))

    def plan(self) -> None:
        indptr, positions, last_page_len = zip(*self._pages, strict=True)
        pages = [self.pages_at(each) for each in positions]
        heads, options = self.plan_options()
        lists = (self._qo_indptr, list(indptr), pages, list(last_page_len))
        self._wrapper.plan(*lists, *heads, **options)

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._wrapper.run(self.inputs.q, (self.pages(k), self.pages(v)))
        return out
