"""What we are compared with: kernels of other projects, where they can be imported.

Nothing here is needed to run the benchmarks. Each baseline says why it is missing, or why it does
not apply to a workload; neither is silent in the results.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

import torch

from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = [
    "Baseline",
    "FlashAttention3",
    "FlashInferCascade",
    "FlashInferDecode",
    "SglangTriton",
    "import_reason",
]

# SGLang's default for --triton-attention-num-kv-splits.
_MAX_KV_SPLITS = 8
# FlashInfer recommends 128 MB; the widest batches here need more.
_WORKSPACE_BYTES = 512 << 20


def import_reason(*modules: str) -> str | None:
    """Why one of the modules cannot be imported here; None if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # compiled packages raise what they like when they load
            return f"{module}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


class Baseline(ABC):
    """A kernel of someone else's, prepared for one workload.

    Args:
        workload: what to attend to.
    """

    name: ClassVar[str]
    stock: ClassVar[bool]  # a decode kernel that SGLang itself would use

    def __init__(self, workload: AttentionInputs) -> None:
        self.workload = workload

    @classmethod
    @abstractmethod
    def unavailable(cls, device: torch.device) -> str | None:
        """Why it cannot be used on this host; None if it can."""

    @classmethod
    def inapplicable(cls, workload: AttentionInputs) -> str | None:
        """Why it cannot run this workload; None if it can."""
        return None

    @abstractmethod
    def plan(self) -> None:
        """What it does once per step, before the layers."""

    @abstractmethod
    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One layer; returns the output [B, Hq, Dv]."""


class SglangTriton(Baseline):
    """SGLang's Triton decode kernels with the metadata of its Triton backend."""

    name = "sglang-triton"
    stock = True

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return import_reason("sglang.kernels.ops.attention.decode_attention", _indices_module())

    def __init__(self, workload: AttentionInputs) -> None:
        super().__init__(workload)
        kernels = importlib.import_module("sglang.kernels.ops.attention.decode_attention")
        metadata = importlib.import_module("sglang.kernels.ops.attention.metadata")
        self._decode: Any = kernels.decode_attention_fwd
        self._count_splits: Any = metadata.get_num_kv_splits_triton
        self._gather: Any = importlib.import_module(
            _indices_module()
        ).create_flashinfer_kv_indices_triton
        q, device = workload.q, workload.q.device
        batch, heads = q.shape[:2]
        self._kv_indptr = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        num_tokens = int(workload.batch.seq_lens.sum())
        self._kv_indices = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self._num_splits = torch.zeros(batch, dtype=torch.int32, device=device)
        shape = (batch, heads, _MAX_KV_SPLITS)
        self._logits = torch.empty(*shape, workload.v.shape[-1], device=device)
        self._lse = torch.empty(shape, device=device)
        self._num_cores = 8
        accepted = inspect.signature(self._decode).parameters
        self._options: dict[str, Any] = {}
        self._count_options: dict[str, Any] = {}
        if device.type == "cuda":
            self._num_cores = torch.cuda.get_device_properties(device).multi_processor_count
            if "use_pdl" in accepted:
                arch = importlib.import_module("sglang.kernels.jit.utils.arch")
                self._options["use_pdl"] = arch.is_arch_support_pdl()
        if "uneven_batch" in accepted and "uneven_batch_ptr" in self._count_splits.arg_names:
            uneven = torch.zeros(1, dtype=torch.int32, device=device)
            self._options["uneven_batch"] = self._count_options["uneven_batch_ptr"] = uneven

    def plan(self) -> None:
        w = self.workload
        batch, heads = w.q.shape[:2]
        self._kv_indptr[1:] = torch.cumsum(w.seq_lens, 0)
        self._gather[(batch,)](
            w.req_to_token,
            w.rows,
            w.seq_lens,
            self._kv_indptr,
            None,
            self._kv_indices,
            w.req_to_token.stride(0),
        )
        self._count_splits[(1,)](
            self._num_splits,
            w.seq_lens,
            batch,
            1,
            heads,
            w.k.shape[-2],
            _MAX_KV_SPLITS,
            self._num_cores,
            MAX_NUM_SEQ=max(256, 1 << (batch - 1).bit_length()),
            **self._count_options,
        )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.workload
        self._decode(
            w.q,
            k,
            v,
            w.out,
            self._kv_indptr,
            self._kv_indices,
            self._logits,
            self._lse,
            self._num_splits,
            _MAX_KV_SPLITS,
            w.sm_scale,
            1.0,
            1.0,
            **self._options,
        )
        return w.out


@cache
def _indices_module() -> str:
    """Where this release of SGLang keeps the kernel that gathers slots."""
    names = [f"sglang.kernels.ops.{package}.kv_indices" for package in ("kvcache", "attention")]
    return next((name for name in names if import_reason(name) is None), names[0])


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class _Paged(Baseline):
    """A kernel that reads pages through indices: [pages, page size, Hkv, D] caches."""

    def __init__(self, workload: AttentionInputs) -> None:
        super().__init__(workload)
        self._page_size = workload.batch.page_size

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return "needs a GPU" if device.type != "cuda" else import_reason(cls._module)

    _module: ClassVar[str]

    def pages(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache [slots, Hkv, D] as pages."""
        return cache.view(-1, self._page_size, *cache.shape[1:])

    def page_lists(self, starts: list[int], stops: list[int], requests: list[int]) -> _PageLists:
        """Pages of position ranges of requests, as FlashInfer wants them."""
        size = self._page_size
        counts = [-(-(stop - start) // size) for start, stop in zip(starts, stops, strict=True)]
        indptr = torch.tensor([0, *counts]).cumsum(0).int()
        context = self.workload.req_to_token.shape[1]
        positions = [
            torch.arange(start, stop, size) + request * context
            for start, stop, request in zip(starts, stops, requests, strict=True)
        ]
        lengths = torch.tensor(stops) - torch.tensor(starts)
        flat = torch.cat(positions).to(self.workload.q.device)
        return _PageLists(indptr, flat, ((lengths - 1) % size + 1).int())

    def page_indices(self, lists: _PageLists) -> torch.Tensor:
        """[n] int32 pages, read from the slot table on the device."""
        slots = self.workload.req_to_token.view(-1)[lists.positions]
        return slots if self._page_size == 1 else slots // self._page_size


class _PageLists:
    """Page counts as ``indptr``, flat positions in the slot table, tokens of the last pages."""

    def __init__(
        self, indptr: torch.Tensor, positions: torch.Tensor, last_page_len: torch.Tensor
    ) -> None:
        self.indptr, self.positions, self.last_page_len = indptr, positions, last_page_len


class FlashInferDecode(_Paged):
    """FlashInfer's paged decode, on tensor cores from four query heads per KV head on."""

    name = "flashinfer"
    stock = True
    _module = "flashinfer"

    def __init__(self, workload: AttentionInputs) -> None:
        super().__init__(workload)
        flashinfer: Any = importlib.import_module("flashinfer")
        group = workload.q.shape[1] // workload.k.shape[-2]
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(workload.q.device), "NHD", use_tensor_cores=group >= 4
        )
        lens = workload.batch.seq_lens.tolist()
        self._lists = self.page_lists([0] * len(lens), lens, list(range(len(lens))))

    def plan(self) -> None:
        w = self.workload
        self._wrapper.plan(
            self._lists.indptr,
            self.page_indices(self._lists),
            self._lists.last_page_len,
            w.q.shape[1],
            w.k.shape[-2],
            w.q.shape[2],
            self._page_size,
            q_data_type=w.q.dtype,
            kv_data_type=w.k.dtype,
            sm_scale=w.sm_scale,
        )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.workload
        out: torch.Tensor = self._wrapper.run(w.q, (self.pages(k), self.pages(v)), out=w.out)
        return out


class FlashInferCascade(_Paged):
    """FlashInfer's multi-level cascade, its levels given by us, pinned to FA2.

    Left to itself it takes FA3 on Hopper, whose decode tiles are nearly empty (see
    sgl-project/mini-sglang, python/minisgl/attention/fi.py).
    """

    name = "flashinfer-cascade"
    stock = False
    _module = "flashinfer"

    def __init__(self, workload: AttentionInputs) -> None:
        super().__init__(workload)
        flashinfer: Any = importlib.import_module("flashinfer")
        levels = workload.batch.levels()
        assert levels is not None
        self._wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
            len(levels), _workspace(workload.q.device), "NHD"
        )
        for wrapper in self._wrapper._batch_prefill_wrappers:
            wrapper._backend = "fa2"
        ends = [path.ends for path in workload.batch.paths]
        self._qo_indptr, self._lists = [], []
        for depth, nodes in enumerate(levels):
            first = [0, *(1 + (nodes[1:] != nodes[:-1]).nonzero()[0]).tolist()]
            self._qo_indptr.append(torch.tensor([*first, len(nodes)], dtype=torch.int32))
            starts = [ends[b][depth - 1] if depth else 0 for b in first]
            self._lists.append(self.page_lists(starts, [ends[b][depth] for b in first], first))

    @classmethod
    def inapplicable(cls, workload: AttentionInputs) -> str | None:
        levels = workload.batch.levels()
        if levels is None:
            return "the forest is no set of levels"
        return "nothing is shared" if len(levels) < 2 else None

    def plan(self) -> None:
        w = self.workload
        self._wrapper.plan(
            self._qo_indptr,
            [lists.indptr for lists in self._lists],
            [self.page_indices(lists) for lists in self._lists],
            [lists.last_page_len for lists in self._lists],
            w.q.shape[1],
            w.k.shape[-2],
            w.q.shape[2],
            self._page_size,
            sm_scale=w.sm_scale,
            q_data_type=w.q.dtype,
            kv_data_type=w.k.dtype,
        )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._wrapper.run(self.workload.q, (self.pages(k), self.pages(v)))
        return out


class FlashAttention3(_Paged):
    """FA3 from SGLang's kernel package, called as SGLang's backend calls it."""

    name = "fa3"
    stock = True
    _module = "sgl_kernel.flash_attn"

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        reason = super().unavailable(device)
        if reason is None and torch.cuda.get_device_capability(device)[0] != 9:
            return "needs compute capability 9.x"
        return reason

    def __init__(self, workload: AttentionInputs) -> None:
        super().__init__(workload)
        library: Any = importlib.import_module(self._module)
        self._attend: Any = library.flash_attn_with_kvcache
        self._schedule: Any = getattr(library, "get_scheduler_metadata", None)
        device, batch = workload.q.device, workload.q.shape[0]
        self._cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self._max_len = int(workload.batch.seq_lens.max())
        self._step: dict[str, Any] = {}
        accepted = inspect.signature(self._attend).parameters
        self._options = {"out": workload.out} if "out" in accepted else {}

    def plan(self) -> None:
        w = self.workload
        pages = w.req_to_token[:, :: self._page_size]
        if self._page_size > 1:
            pages = pages // self._page_size
        lens = w.seq_lens.int()
        self._step = {"page_table": pages.contiguous(), "cache_seqlens": lens}
        if self._schedule is not None:
            self._step["scheduler_metadata"] = self._schedule(
                batch_size=len(lens),
                max_seqlen_q=1,
                max_seqlen_k=self._max_len,
                num_heads=w.q.shape[1],
                num_heads_k=w.k.shape[-2],
                headdim=w.q.shape[2],
                cache_seqlens=lens,
                qkv_dtype=w.k.dtype,
                cu_seqlens_q=self._cu_seqlens_q,
                page_size=self._page_size,
                causal=True,
            )

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.workload
        out: torch.Tensor = self._attend(
            q=w.q,
            k_cache=self.pages(k),
            v_cache=self.pages(v),
            cu_seqlens_q=self._cu_seqlens_q,
            max_seqlen_q=1,
            softmax_scale=w.sm_scale,
            causal=True,
            **self._step,
            **self._options,
        )
        return out
