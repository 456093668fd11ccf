"""Checks of user input: each raises one ``ValueError`` naming argument, value and legal values."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_prefix.forest import PrefixForest

__all__ = [
    "KV_DTYPES",
    "Q_DTYPES",
    "check_device",
    "check_dtypes",
    "check_head_groups",
    "check_index",
    "check_kv_scale",
    "check_lengths",
    "check_logit_cap",
    "check_planned_lengths",
    "check_pool_indices",
    "check_positive_ints",
    "check_same_sharing",
    "check_scale",
    "check_slots",
    "check_table",
    "check_tensor",
    "check_unsupported",
    "lengths_of_forest",
]

IntArray = NDArray[np.int64]

Q_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KV_DTYPES = (*Q_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)
_INDEX_DTYPES = (torch.int32, torch.int64)


def check_positive_ints(**values: object) -> None:
    """Every value is an integer of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r}; legal: an integer of at least 1")


def check_head_groups(num_qo_heads: int, num_kv_heads: int) -> None:
    """Query heads come in whole groups per KV head."""
    if num_qo_heads % num_kv_heads:
        raise ValueError(
            f"num_qo_heads={num_qo_heads}; legal: a multiple of num_kv_heads={num_kv_heads}"
        )


def check_dtypes(q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """The dtypes are among those the executors take."""
    for name, dtype, legal in (("q_dtype", q_dtype, Q_DTYPES), ("kv_dtype", kv_dtype, KV_DTYPES)):
        if dtype not in legal:
            raise ValueError(f"{name}={dtype!r}; legal: {', '.join(map(str, legal))}")


def check_device(device: str | torch.device) -> torch.device:
    """The device exists; an unnumbered CUDA device becomes the current one."""
    try:
        found = torch.device(device)
        if found.type == "cuda":
            index = torch.cuda.current_device() if found.index is None else found.index
            return torch.empty(0, device=torch.device("cuda", index)).device
        return torch.empty(0, device=found).device
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r}; legal: a device of this host ({reason})") from None


def check_scale(name: str, value: float) -> float:
    """A finite number above 0."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r}; legal: a finite number above 0")
    return float(value)


def check_logit_cap(value: float) -> float:
    """A finite number, 0 for no cap."""
    if value == 0 and not isinstance(value, bool):
        return 0.0
    return check_scale("logit_cap", value)


def check_kv_scale(
    name: str, scale: float | torch.Tensor | None, num_kv_heads: int, device: torch.device
) -> float | torch.Tensor:
    """A positive number, or a tensor of shape [] or [Hkv] on the device; None is 1."""
    if scale is None:
        return 1.0
    if not isinstance(scale, torch.Tensor):
        return check_scale(name, scale)
    if scale.shape not in ((), (num_kv_heads,)) or not scale.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(scale.shape)} and dtype {scale.dtype}; legal: a number, or a "
            f"float tensor of shape [] or [{num_kv_heads}]"
        )
    if scale.device != device:
        raise ValueError(f"{name} is on {scale.device}; legal: {device}")
    return scale.float()


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """A tensor has exactly this shape, dtype and device; -1 in the shape matches nothing."""
    _check_kind(name, tensor, (dtype,), device)
    if tuple(tensor.shape) != shape:
        raise _shape_error(name, tensor, shape)


def check_index(name: str, tensor: torch.Tensor, length: int | None = None) -> None:
    """A one-dimensional int32 or int64 tensor, of a given length where one is given."""
    _check_kind(name, tensor, _INDEX_DTYPES)
    if tensor.dim() != 1 or (length is None and not len(tensor)):
        raise _shape_error(name, tensor, "[B] with B of at least 1")
    if length is not None and len(tensor) != length:
        raise _shape_error(name, tensor, f"[{length}]")


def check_table(req_to_token: torch.Tensor, device: torch.device) -> None:
    """``req_to_token`` is a two-dimensional index tensor on the device."""
    _check_kind("req_to_token", req_to_token, _INDEX_DTYPES, device)
    if req_to_token.dim() != 2:
        raise _shape_error("req_to_token", req_to_token, "[rows, context]")


def _check_kind(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; legal: a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}; legal: {', '.join(map(str, dtypes))}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; legal: {device}")


def _shape_error(name: str, tensor: torch.Tensor, legal: object) -> ValueError:
    return ValueError(f"{name} has shape {tuple(tensor.shape)}; legal: {legal}")


def check_lengths(lens: IntArray, context: int) -> None:
    """Every length is at least 1 and within its row."""
    bad = np.flatnonzero((lens < 1) | (lens > context))
    if len(bad):
        raise ValueError(
            f"seq_lens[{bad[0]}]={lens[bad[0]]}; legal: 1 to {context}, the width of req_to_token"
        )


def check_planned_lengths(lens: IntArray, planned: IntArray, reserved_tail_slots: int) -> None:
    """Every length is at least the planned one, and its tail has slots for the rest."""
    bad = np.flatnonzero((lens < planned) | (lens > planned + reserved_tail_slots))
    if len(bad):
        b = bad[0]
        raise ValueError(
            f"seq_lens[{b}]={lens[b]} does not fit the plan; legal: {planned[b]} to "
            f"{planned[b] + reserved_tail_slots}. Plan again."
        )


def check_pool_indices(indices: NDArray[np.integer], num_rows: int) -> None:
    """Every pool index names a row."""
    bad = np.flatnonzero((indices < 0) | (indices >= num_rows))
    if len(bad):
        raise ValueError(
            f"req_pool_indices[{bad[0]}]={indices[bad[0]]}; legal: 0 to {num_rows - 1}"
        )


def check_slots(new_slots: torch.Tensor) -> None:
    """Slots on the CPU are not negative."""
    if new_slots.device.type == "cpu" and len(new_slots) and int(new_slots.min()) < 0:
        raise ValueError(f"new_slots holds {int(new_slots.min())}; legal: 0 and above")


def check_unsupported(sinks: torch.Tensor | None, window_left: int) -> None:
    """Refuse what no executor supports yet, instead of ignoring it."""
    if sinks is not None:
        raise ValueError("sinks is not supported yet; legal: None")
    if window_left != -1:
        raise ValueError(f"window_left={window_left!r} is not supported yet; legal: -1 (no window)")


def lengths_of_forest(forest: PrefixForest, seq_lens: torch.Tensor) -> IntArray:
    """The forest's lengths, compared with ``seq_lens`` where that costs no device sync."""
    if not isinstance(forest, PrefixForest):
        raise ValueError(f"forest is a {type(forest).__name__}; legal: a PrefixForest")
    if forest.batch_size != len(seq_lens):
        raise ValueError(
            f"forest has {forest.batch_size} requests; legal: {len(seq_lens)}, as seq_lens has"
        )
    if seq_lens.device.type == "cpu" and (forest.seq_lens != seq_lens.numpy()).any():
        raise ValueError(
            f"forest was made for seq_lens={forest.seq_lens.tolist()}; legal: {seq_lens.tolist()}"
        )
    return forest.seq_lens


def check_same_sharing(given: PrefixForest, found: PrefixForest) -> None:
    """The forest given shares exactly what the rows show (``SGLANG_PREFIX_VERIFY=1``).

    Raises:
        RuntimeError: it does not; the message names a node on which they differ.
    """
    extra, missing = given.sharing() - found.sharing(), found.sharing() - given.sharing()
    if extra or missing:
        side, node = ("claims", extra) if extra else ("misses", missing)
        start, stop, requests = min(node, key=lambda n: n[:2])
        raise RuntimeError(
            f"SGLANG_PREFIX_VERIFY: the forest {side} a node of positions {start} to {stop} shared "
            f"by requests {sorted(requests)}; the slot rows give other nodes"
        )
