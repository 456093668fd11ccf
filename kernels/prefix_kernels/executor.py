"""The interface of everything that runs plans, and how one is chosen and built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.arguments import check_choice
from prefix_kernels.launches import LaunchSetting
from prefix_kernels.plan import AttentionShape, PackPlan

__all__ = [
    "EXECUTORS",
    "AttentionParams",
    "PlanExecutor",
    "check_num_new",
    "choose_executor",
    "make_executor",
    "why_not_shape",
    "why_torch",
]

IntArray = NDArray[np.int64]

# Where the class of each executor is. It is imported on first use: importing Triton takes a second,
# and the torch executor needs none of it.
_CLASSES = {
    "torch": ("prefix_kernels.torch_executor", "TorchExecutor"),
    "native": ("prefix_kernels.native_executor", "NativeExecutor"),
    "triton": ("prefix_kernels.triton_executor", "TritonExecutor"),
}
EXECUTORS = ("auto", *_CLASSES)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionParams:
    """The numbers that an attention layer brings along.

    Attributes:
        sm_scale: factor on the scores.
        logit_cap: scores become ``cap * tanh(score / cap)``; 0 for none.
        k_scale, v_scale: dequantisation factors, numbers or float32 device tensors of shape [] or
            [Hkv].
        sinks: a logit per query head that takes part in the softmax and brings no value; [Hq]
            float32, bfloat16 or float16 on the device, contiguous. None for none, and so is -inf.
    """

    sm_scale: float
    logit_cap: float = 0.0
    k_scale: float | torch.Tensor = 1.0
    v_scale: float | torch.Tensor = 1.0
    sinks: torch.Tensor | None = None


class PlanExecutor(ABC):
    """Runs plans: ``load`` once per plan, ``append`` once per step, ``run`` once per layer.

    The executor owns ``kv_slots``, the slots of all positions that the plan reads, and the lengths
    of the plan's tails. So rows of ``req_to_token`` may change hands while a plan is in use.

    Args:
        shape: heads, head dims and item sizes of the layers served.
        device: where q, the caches and ``req_to_token`` live.
        check_slots: refuse slots outside the caches on every device. On the CPU they always are;
            elsewhere looking at them costs a device sync per plan and step.

    Attributes:
        name: "torch", "native" or "triton".
        plan: the plan in use; None before the first.
        padded_batch_size: rows of q and the outputs under the plan in use.
        slot_range: the smallest and the largest slot in use, where slots are checked.
    """

    name: ClassVar[str]

    def __init__(
        self, shape: AttentionShape, device: torch.device, *, check_slots: bool = False
    ) -> None:
        self.shape = shape
        self.device = device
        self.plan: PackPlan | None = None
        self.padded_batch_size = 0
        self.slot_range = (0, 0)
        self._checks_slots = check_slots or device.type == "cpu"

    @classmethod
    def why_not(
        cls, device: torch.device, q_dtype: torch.dtype, kv_dtype: torch.dtype
    ) -> str | None:
        """Why this executor cannot run on such tensors; None if it can."""
        return None

    @classmethod
    def why_not_shape(cls, shape: AttentionShape, device: torch.device) -> str | None:
        """Why this executor cannot run layers of a shape on a device; None if it can."""
        return None

    @property
    def max_block_rows(self) -> int | None:
        """Query rows (requests times group size) that read KV in one pass; None for any number."""
        return None

    @property
    def launch_setting(self) -> LaunchSetting | None:
        """What decides the launches; None where there are none, on the CPU."""
        return None

    @property
    @abstractmethod
    def kv_slots(self) -> torch.Tensor:
        """Slots of the plan in use, int32 or int64 on the device, laid out by it."""

    def load(
        self,
        plan: PackPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        *,
        padded_batch_size: int | None = None,
    ) -> None:
        """Take a plan into use and copy the slots of its positions. Reads no device value.

        Args:
            plan: the plan.
            req_to_token: [rows, context] int32 or int64 on the device, dense in its second
                dimension.
            req_pool_indices: [B] int32 or int64 on the device.
            padded_batch_size: rows of q and the outputs. Those past the plan's queries are padding
                and get zeros. None for as many as there are queries.

        Raises:
            ValueError: the plan is larger than the executor's fixed capacity.
        """
        size = plan.num_rows if padded_batch_size is None else padded_batch_size
        self._load(plan, req_to_token, req_pool_indices, size)
        self.plan, self.padded_batch_size = plan, size
        if self._checks_slots:
            self.slot_range = self._find_slot_range()

    def append(
        self,
        seq_lens: torch.Tensor,
        new_slots: torch.Tensor,
        *,
        num_new: IntArray | None = None,
    ) -> None:
        """Let every tail grow by a token, or by ``num_new``, without a device sync.

        Under a plan with ``query_lens`` this is a step of as many query tokens, which stand at the
        end: a request's last ones, whose slots are all written. Where some drafts of the step
        before were rejected, tails have grown by fewer, and positions are written again.

        The Triton executor takes the lengths from the device, so a graph may hold the call and,
        without ``num_new``, a repeated step does no harm. It knows of growth only what that says;
        without it, as where the device alone knows what was accepted, the caller sees to it that no
        tail outgrows its reserved slots. The others count the steps on the host.

        Args:
            seq_lens: [B] int32 or int64 on the device: the lengths with the new tokens. Padding
                rows may follow.
            new_slots: [R] int32 or int64 on the device: the slots of the step's query tokens,
                request after request, likewise.
            num_new: [B] int64 on the host: tokens by which each tail grows, from 1 to the query
                tokens of its request. None for one each, or for the Triton executor, unknown.

        Raises:
            ValueError: ``num_new`` is none of these.
            RuntimeError: a tail has used up its reserved slots, as far as the executor knows.
        """
        assert self.plan is not None
        if num_new is not None:
            check_num_new(num_new, self.plan)
        self._append(seq_lens, new_slots, num_new)
        if self._checks_slots and not _is_capturing(self.device):
            self._widen_slot_range(new_slots[: self.plan.num_rows])

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
    ) -> None:
        """Attend one layer's queries to their KV. Synchronises nothing.

        Args:
            q: [R, Hq, D], padding rows included; this and the next three dense in their last
                dimension.
            k_cache, v_cache: [slots, Hkv, D] and [slots, Hkv, Dv]; with ``shape.v_in_k`` the
                latter is the view ``k_cache[..., :Dv]``. Every position of a request holds KV,
                those of its query tokens included.
            out: [R, Hq, Dv], written.
            lse: [R, Hq] float32, natural log; written where given. It is that of the KV alone,
                without the sinks, so that it merges with partial results over other KV.
            params: the layer's numbers.

        Raises:
            ValueError: a slot lies outside the caches, where slots are checked.
        """
        if self._checks_slots:
            self._check_slots(k_cache.shape[0])
        self._run(q, k_cache, v_cache, out, lse, params)

    def write_slots(self, target: IntArray, slots: torch.Tensor) -> None:
        """Write ``slots`` [n] on the device to the entries ``target`` [n] of ``kv_slots``."""
        if not len(target):
            return
        if self._checks_slots:
            self._widen_slot_range(slots)
        self._write_slots(target, slots)

    @abstractmethod
    def set_tail_lengths(self, tail_lengths: IntArray) -> None:
        """Set the tokens [B] in each request's tail; their slots must have been written."""

    @abstractmethod
    def _load(
        self,
        plan: PackPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        padded_batch_size: int,
    ) -> None: ...

    @abstractmethod
    def _append(
        self, seq_lens: torch.Tensor, new_slots: torch.Tensor, num_new: IntArray | None
    ) -> None: ...

    @abstractmethod
    def _run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
    ) -> None: ...

    def _find_slot_range(self) -> tuple[int, int]:
        """The smallest and the largest slot of a plan just loaded."""
        return _bounds(self.kv_slots)

    def _write_slots(self, target: IntArray, slots: torch.Tensor) -> None:
        kv_slots = self.kv_slots
        kv_slots[torch.from_numpy(target).to(self.device)] = slots.to(kv_slots.dtype)

    def _widen_slot_range(self, slots: torch.Tensor) -> None:
        low, high = _bounds(slots)
        self.slot_range = (min(self.slot_range[0], low), max(self.slot_range[1], high))

    def _check_slots(self, num_slots: int) -> None:
        low, high = self.slot_range
        if low < 0 or high >= num_slots:
            raise ValueError(
                f"the slots of req_to_token or new_slots reach {low if low < 0 else high}; "
                f"legal: 0 to {num_slots - 1} for this k_cache. Plan again."
            )


def choose_executor(
    name: str, device: torch.device, q_dtype: torch.dtype, kv_dtype: torch.dtype
) -> str:
    """Resolve ``"auto"``: Triton on a GPU and compiled code on the CPU, or else torch.

    Where it comes to compiled code, this compiles it the first time, for some seconds.

    Raises:
        ValueError: the name is unknown, or its executor cannot take these tensors.
    """
    check_choice("executor", name, EXECUTORS)
    if name == "auto":
        return "torch" if why_torch(device, q_dtype, kv_dtype) else _fastest(device)
    why_not = _class_of(name).why_not(device, q_dtype, kv_dtype)
    if why_not:
        raise ValueError(f"executor={name!r} cannot be used here: {why_not}; legal: 'torch'")
    return name


def why_torch(device: torch.device, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> str | None:
    """Why ``"auto"`` comes to the torch executor: what keeps the fastest one from such tensors.

    None where nothing does.
    """
    name = _fastest(device)
    why_not = _class_of(name).why_not(device, q_dtype, kv_dtype)
    return f"the {name} executor cannot be used: {why_not}" if why_not else None


def _fastest(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "native"


def why_not_shape(name: str, shape: AttentionShape, device: torch.device) -> str | None:
    """Why the executor of that name cannot run layers of a shape on a device; None if it can."""
    return _class_of(name).why_not_shape(shape, device)


def make_executor(
    name: str, shape: AttentionShape, device: torch.device, **options: Any
) -> PlanExecutor:
    """Build the executor that :func:`choose_executor` named.

    Args:
        name: "torch", "native" or "triton".
        shape: of the layers served.
        device: where they run.
        options: further arguments of the executor's class.
    """
    return _class_of(name)(shape, device, **options)


def _class_of(name: str) -> type[PlanExecutor]:
    module, cls = _CLASSES[name]
    found: type[PlanExecutor] = getattr(import_module(module), cls)
    return found


def check_num_new(num_new: IntArray, plan: PackPlan) -> None:
    """Raise ValueError for a growth that would leave positions without a slot, or repeat a step."""
    most = np.ones(plan.batch_size, np.int64) if plan.query_lens is None else plan.query_lens
    if num_new.shape != most.shape or num_new.dtype != np.int64:
        raise ValueError(
            f"num_new has shape {num_new.shape} and dtype {num_new.dtype}; legal: "
            f"[{len(most)}] of int64, as the plan has requests"
        )
    bad = np.flatnonzero((num_new < 1) | (num_new > most))
    if len(bad):
        b = bad[0]
        raise ValueError(
            f"num_new[{b}]={num_new[b]}; legal: 1 to {most[b]}, the query tokens of the request"
        )


def _bounds(slots: torch.Tensor) -> tuple[int, int]:
    """The smallest and the largest slot; (0, 0) if there is none."""
    return (int(slots.min()), int(slots.max())) if len(slots) else (0, 0)


def _is_capturing(device: torch.device) -> bool:
    """Whether a graph is being captured, in which nothing may be read from the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
