"""The native executor: runs a pack plan on the CPU with one call of compiled code.

See ``native/native.cpp`` for what it does; here is what is kept for it between calls.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels import native_library
from prefix_kernels.executor import AttentionParams, PlanExecutor, check_num_new
from prefix_kernels.plan import AttentionShape, PackPlan

__all__ = ["NativeExecutor"]

IntArray = NDArray[np.int64]

# Numbered as in native/vectors.h.
_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
# Tokens that tails grow by before their work is cut anew: fewer than the shortest piece has
# (native/work.h), so that none becomes twice as long as was wanted.
_MAX_GROWN = 128
_MESSAGE_BYTES = 1000
_MESSAGE_SIZE = ctypes.c_int64(_MESSAGE_BYTES)
_MOST_PARTS = 2**62


def _members(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Plan(ctypes.Structure):  # as in native/work.h
    _fields_ = (
        *_members(ctypes.c_int64, "num_packs num_requests num_rows num_partials"),
        *_members(ctypes.c_void_p, "query_indptr queries num_splits slot_offset lengths"),
        *_members(ctypes.c_void_p, "partial_indptr partial_index request_indptr slots"),
        *_members(ctypes.c_int64, "num_qo_heads num_kv_heads head_dim v_head_dim"),
    )


# `Layer` of native/work.h: pointers, whole numbers, real ones. It is packed in one call: to set its
# members one by one takes longer than the compiled code does for a small layer.
_LAYER = struct.Struct("10P15q3d")


class NativeExecutor(PlanExecutor):
    """Runs plans with compiled code on torch's threads; arguments as of :class:`PlanExecutor`.

    Like the torch executor it keeps the lengths of the tails on the host. How the work is cut
    depends on them and on the number of threads, so that is done by the first layer after a load.
    While tails grow, the items at their ends grow with them, and the work is seldom cut anew.

    Args:
        max_parts: how many partials the work may be cut into; None for any number. A plan of more
            runs, too, and is cut no further.

    Attributes:
        num_parts: partials that the work is cut into now, at least those of the plan.
        partial_out, partial_lse: [>= num_parts, Hq, Dv] and [>= num_parts, Hq] float32.

    Raises:
        NativeUnavailableError: the library cannot be compiled or loaded here.
    """

    name = "native"

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        *,
        check_slots: bool = False,
        max_parts: int | None = None,
    ) -> None:
        super().__init__(shape, device, check_slots=check_slots)
        self.max_parts = max_parts
        self._library = native_library.library()
        self._work = ctypes.c_void_p(_call(self._library, "prefix_new", ctypes.c_void_p))
        weakref.finalize(self, self._library.prefix_delete, self._work)
        self._message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        self._plan = _Plan()
        self._layer = ctypes.create_string_buffer(_LAYER.size)
        self._arrays = np.zeros(0, dtype=np.int64)  # what the plan points to
        self._lengths = np.zeros(0, dtype=np.int64)
        self._num_shared = 0
        self._num_threads = 0  # that the work is cut for; 0 where it must be cut anew
        self._grown = 0  # tokens of each tail since then
        self._planned_range = (0, 0)
        self._slot_storage = torch.empty(0, dtype=torch.int32)
        self._kv_slots = self._slot_storage
        self.num_parts = 0
        self.partial_out = torch.empty(0)
        self.partial_lse = torch.empty(0)
        self._partials = (0, 0)  # their addresses

    @classmethod
    def why_not(
        cls, device: torch.device, q_dtype: torch.dtype, kv_dtype: torch.dtype
    ) -> str | None:
        """Why the library cannot run on such tensors; None if it can. Compiles it if need be."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        for dtype in (q_dtype, kv_dtype):
            if dtype not in _TYPES:
                return f"it does not read {dtype}"
        return native_library.why_not()

    @property
    def item_costs(self) -> IntArray:
        """Of the items of the work, as threads take them: for tests of how even it is cut."""
        size = _call(self._library, "prefix_costs", ctypes.c_int64, self._work, None)
        costs = np.zeros(size, dtype=np.int64)
        address = ctypes.c_void_p(costs.ctypes.data)
        _call(self._library, "prefix_costs", ctypes.c_int64, self._work, address)
        return costs

    @property
    def kv_slots(self) -> torch.Tensor:
        """Slots of the plan in use, int32, laid out by it."""
        return self._kv_slots

    def set_tail_lengths(self, tail_lengths: IntArray) -> None:
        """Set the tokens [B] in each request's tail; the first layer to run cuts the work anew."""
        self._lengths[self._num_shared :] = tail_lengths
        self._num_threads = 0

    def _load(
        self,
        plan: PackPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        padded_batch_size: int,
    ) -> None:
        del padded_batch_size  # `run` sees how many rows there are
        if len(self._slot_storage) < plan.num_slots:
            with torch.inference_mode(False):  # may be written from outside inference mode later
                self._slot_storage = torch.empty(plan.num_slots, dtype=torch.int32)
        self._kv_slots = self._slot_storage[: plan.num_slots]
        self._num_shared = plan.num_shared_packs
        self._num_threads = 0
        arrays = {
            "query_indptr": plan.query_indptr,
            "queries": plan.queries,
            "num_splits": plan.num_splits,
            "slot_offset": plan.slot_offset,
            "lengths": plan.pack_end - plan.pack_start,
            "partial_indptr": plan.partial_indptr,
            "partial_index": plan.partial_index,
            "request_indptr": plan.request_indptr,
            "starts": plan.pack_start,
        }
        # In one array, so that there is one address to ask for.
        self._arrays = np.concatenate(list(arrays.values()), dtype=np.int64)
        begins = [0, *accumulate(map(len, arrays.values()))]
        places = dict(zip(arrays, begins, strict=False))
        first = self._arrays.__array_interface__["data"][0]
        addresses = {name: first + 8 * place for name, place in places.items()}
        self._lengths = self._arrays[places["lengths"] :][: plan.num_packs]
        starts = addresses.pop("starts")
        shape = self.shape
        self._plan = _Plan(
            num_packs=plan.num_packs,
            num_requests=plan.batch_size,
            num_rows=plan.num_rows,
            num_partials=plan.num_partials,
            slots=self._kv_slots.data_ptr(),
            num_qo_heads=shape.num_qo_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            v_head_dim=shape.v_head_dim,
            **addresses,
        )
        rows = req_pool_indices.long().contiguous()
        if plan.query_lens is not None:  # by query, as the packs name them
            rows = rows[torch.from_numpy(plan.request_of_row)]
        slot_range = (ctypes.c_int64 * 2)()
        self._library.prefix_copy_slots(
            ctypes.byref(self._plan),
            ctypes.c_void_p(self._plan.slots),
            ctypes.c_int64(plan.num_slots),
            ctypes.c_void_p(starts),
            ctypes.c_void_p(req_to_token.data_ptr()),
            ctypes.c_int64(req_to_token.stride(0)),
            ctypes.c_int64(req_to_token.dtype == torch.int64),
            ctypes.c_void_p(rows.data_ptr()),
            slot_range,
        )
        self._planned_range = (slot_range[0], slot_range[1])

    def _find_slot_range(self) -> tuple[int, int]:
        return self._planned_range

    def _write_slots(self, target: IntArray, slots: torch.Tensor) -> None:
        self._kv_slots.numpy()[target] = slots.numpy()

    def append(
        self,
        seq_lens: torch.Tensor,
        new_slots: torch.Tensor,
        *,
        num_new: IntArray | None = None,
    ) -> None:
        """Let every tail grow; see :meth:`PlanExecutor.append`.

        Raises:
            RuntimeError: a tail has used up its reserved slots.
            ValueError: there are fewer slots than queries, or ``num_new`` is not legal.
        """
        if len(new_slots) < self._plan.num_rows:
            raise ValueError(
                f"new_slots has {len(new_slots)} elements; legal: {self._plan.num_rows} or more"
            )
        if num_new is not None:
            assert self.plan is not None
            check_num_new(num_new, self.plan)
        self._append(seq_lens, new_slots, num_new)  # which widens the range of slots, too

    def _append(
        self, seq_lens: torch.Tensor, new_slots: torch.Tensor, num_new: IntArray | None
    ) -> None:
        del seq_lens  # tokens are counted here, as by the torch executor
        new_slots = new_slots.contiguous()
        if num_new is not None:
            num_new = np.ascontiguousarray(num_new)
        slot_range = (ctypes.c_int64 * 2)(*self.slot_range)
        has_no_room = self._library.prefix_append(
            self._work,
            ctypes.byref(self._plan),
            ctypes.c_void_p(self._plan.slots),
            ctypes.c_void_p(self._plan.lengths),
            None if num_new is None else ctypes.c_void_p(num_new.ctypes.data),
            ctypes.c_void_p(new_slots.data_ptr()),
            ctypes.c_int64(new_slots.dtype == torch.int64),
            slot_range,
        )
        if has_no_room:
            raise RuntimeError("a tail has used up its reserved slots: plan again")
        self.slot_range = (slot_range[0], slot_range[1])
        self._grown += 1 if num_new is None else int(num_new.max())
        if self._grown >= _MAX_GROWN:
            self._num_threads = 0

    def _run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
    ) -> None:
        if self._num_threads != torch.get_num_threads():
            self.cut()
        batch = self._plan.num_rows
        if out.shape[0] > batch:
            out[batch:].zero_()
            if lse is not None:
                lse[batch:].fill_(-torch.inf)
        k_factor, k_scales, k_scale_stride = _split_scale(params.k_scale)
        v_factor, v_scales, v_scale_stride = _split_scale(params.v_scale)
        sinks = params.sinks
        _LAYER.pack_into(
            self._layer,
            0,
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            *self._partials,
            k_scales,
            v_scales,
            0 if sinks is None else sinks.data_ptr(),
            _TYPES[q.dtype],
            _TYPES[k_cache.dtype],
            0 if sinks is None else _TYPES[sinks.dtype],
            *q.stride()[:2],
            *k_cache.stride()[:2],
            *v_cache.stride()[:2],
            *out.stride()[:2],
            *((0, 0) if lse is None else lse.stride()),
            k_scale_stride,
            v_scale_stride,
            params.sm_scale * k_factor,
            v_factor,
            params.logit_cap,
        )
        failed = self._library.prefix_run(
            self._work, ctypes.byref(self._plan), self._layer, self._message, _MESSAGE_SIZE
        )
        if failed:
            raise RuntimeError(f"the native executor failed: {self._message.value.decode()}")

    def cut(self) -> None:
        """Cut the work for the lengths and threads of now; the first layer to run does it."""
        assert self.plan is not None, "load a plan before run"
        most = ctypes.c_int64(_MOST_PARTS if self.max_parts is None else self.max_parts)
        self.num_parts = _call(
            self._library, "prefix_cut", ctypes.c_int64, self._work, ctypes.byref(self._plan), most
        )
        shape = (self.num_parts, self.shape.num_qo_heads)
        if len(self.partial_lse) < self.num_parts:
            with torch.inference_mode(False):
                self.partial_out = torch.empty(*shape, self.shape.v_head_dim)
                self.partial_lse = torch.empty(shape)
        self._partials = self.partial_out.data_ptr(), self.partial_lse.data_ptr()
        self._num_threads = torch.get_num_threads()
        self._grown = 0


def _call(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = library[name]  # a new one, whose result type is ours alone
    function.restype = result
    return function(*arguments)


def _split_scale(scale: float | torch.Tensor) -> tuple[float, int, int]:
    """A scale as a number, times the tensor at an address, 0 for none, with a stride per head."""
    if isinstance(scale, torch.Tensor):
        return 1.0, scale.data_ptr(), scale.stride(0) if scale.dim() else 0
    return scale, 0, 0
