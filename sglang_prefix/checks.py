"""Checks of tensors, dtypes, devices and forests: what a user hands to the wrapper.

Each raises one ``ValueError`` of one line that names the argument, its value and what is legal.
Plain values are in `prefix_kernels/arguments.py`, what forests are made from in `forest_checks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.arguments import INT32_MAX, check_number, refusal
from sglang_prefix.forest import PrefixForest
from sglang_prefix.forest_checks import check_forest, check_slots

__all__ = [
    "KV_DTYPES",
    "Q_DTYPES",
    "check_device",
    "check_dtype",
    "check_dtypes",
    "check_given_forest",
    "check_index",
    "check_kv_scale",
    "check_lengths",
    "check_logit_cap",
    "check_new_slots",
    "check_num_slots",
    "check_output",
    "check_planned_lengths",
    "check_pool_indices",
    "check_row_span",
    "check_same_sharing",
    "check_sinks",
    "check_table",
    "check_table_rows",
    "check_tensor",
    "check_unsupported",
    "check_v_in_k",
    "to_host",
]

IntArray = NDArray[np.int64]

Q_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KV_DTYPES = (*Q_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)
_INDEX_DTYPES = (torch.int32, torch.int64)


def check_dtype(name: str, dtype: Any, legal: Sequence[torch.dtype]) -> torch.dtype:
    """A dtype is among those the executors take."""
    if not isinstance(dtype, torch.dtype) or dtype not in legal:
        raise refusal(name, dtype, ", ".join(map(str, legal)))
    return dtype


def check_dtypes(
    dtype: torch.dtype | None, q_dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of q and of the caches, of which ``dtype`` sets both.

    Raises:
        ValueError: one is not served, or they contradict each other.
    """
    q_dtype = check_dtype("q_dtype", q_dtype, Q_DTYPES)
    if dtype is not None:
        q_dtype = check_dtype("dtype", dtype, Q_DTYPES)
    if kv_dtype is None:
        return q_dtype, q_dtype
    kv_dtype = check_dtype("kv_dtype", kv_dtype, KV_DTYPES)
    if dtype not in (None, kv_dtype):
        raise ValueError(f"dtype={dtype} sets kv_dtype too, but kv_dtype={kv_dtype}; legal: one")
    return q_dtype, kv_dtype


def check_device(device: Any) -> torch.device:
    """The device exists; an unnumbered CUDA device becomes the current one."""
    is_number = isinstance(device, Integral) and not isinstance(device, bool)
    if not is_number and not isinstance(device, str | torch.device):
        raise refusal("device", device, "a device of this host, as a str or torch.device")
    try:
        found = torch.device(int(device) if is_number else device)
        if found.type == "cuda":
            index = torch.cuda.current_device() if found.index is None else found.index
            return torch.empty(0, device=torch.device("cuda", index)).device
        return torch.empty(0, device=found).device
    except Exception as error:  # of torch's backends each raises errors of its own
        reason = " ".join(str(error).split("\n", 1)[0].split())
        raise refusal("device", device, f"a device of this host ({reason})") from None


def check_logit_cap(value: Any) -> float:
    """A number as for a scale, 0 for no cap."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return 0.0 if is_number and value == 0 else check_number("logit_cap", value)


def check_kv_scale(
    name: str, scale: Any, num_kv_heads: int, device: torch.device
) -> float | torch.Tensor:
    """A number, or a tensor of shape [] or [Hkv] on the device; None is 1.

    Values of a tensor are looked at on the CPU alone, where that does not wait for a device.
    """
    if scale is None:
        return 1.0
    if not isinstance(scale, torch.Tensor):
        return check_number(name, scale)
    _check_kind(name, scale, (scale.dtype,), device)
    if scale.shape not in ((), (num_kv_heads,)) or not scale.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(scale.shape)} and dtype {scale.dtype}; legal: a number, or a "
            f"float tensor of shape [] or [{num_kv_heads}]"
        )
    found: torch.Tensor = scale.float()
    if device.type == "cpu":
        for value in found.flatten().tolist():
            check_number(name, value)
    return found


def check_tensor(
    name: str,
    tensor: Any,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """A tensor has exactly this shape, dtype and device; None in the shape is any number.

    Its last dimension is dense, which kernels rely on.
    """
    _check_kind(name, tensor, (dtype,), device)
    legal = ["any" if size is None else size for size in shape]
    fits = (size in (want, None) for size, want in zip(shape, tensor.shape, strict=False))
    if tensor.dim() != len(shape) or not all(fits):
        raise _shape_error(name, tensor, str(legal).replace("'", ""))
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension; legal: 1, as after "
            "contiguous()"
        )


def check_row_span(name: str, tensor: torch.Tensor) -> None:
    """Within a row of q or of an output, kernels count elements in 32 bits."""
    span = sum(s * (n - 1) for s, n in zip(tensor.stride()[1:], tensor.shape[1:], strict=True))
    if span > INT32_MAX:
        raise ValueError(f"{name} has strides {tensor.stride()}; legal: rows within 2**31 elements")


def check_num_slots(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Both caches have as many slots, which int32 can number."""
    if len(v_cache) != len(k_cache):
        raise ValueError(f"v_cache has {len(v_cache)} slots; legal: {len(k_cache)}, as k_cache has")
    if len(k_cache) > INT32_MAX:
        raise ValueError(f"k_cache has {len(k_cache)} slots; legal: up to {INT32_MAX}")


def check_v_in_k(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """v_cache is the beginning of every row of k_cache, not a copy of it."""
    same = v_cache.data_ptr() == k_cache.data_ptr() and v_cache.stride() == k_cache.stride()
    if not same:
        raise ValueError(
            f"v_cache is a tensor of its own; legal with v_in_k: k_cache[..., :{v_cache.shape[2]}]"
        )


def check_output(name: str, tensor: torch.Tensor, **others: object) -> None:
    """A tensor that is written shares memory neither with itself nor with ``others``.

    Tensors that lie in each other's gaps are taken to share memory.
    """
    check_row_span(name, tensor)
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"{name} has strides {tensor.stride()}, so that elements share memory; legal: "
                "memory for each, as after contiguous()"
            )
        reach += stride * (size - 1)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} was made in inference mode; legal: there, or one made outside")
    begin, end = _memory(tensor)
    for other, read in others.items():
        if isinstance(read, torch.Tensor):
            low, high = _memory(read)
            if begin < high and low < end:
                raise ValueError(f"{name} shares memory with {other}; legal: memory of its own")


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses that a tensor's elements stand at, as ``[begin, end)``; (0, 0) for none."""
    if tensor.device.type == "meta" or not tensor.numel():
        return 0, 0
    last = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_index(
    name: str, tensor: Any, device: torch.device, length: int | None = None, why: str = ""
) -> None:
    """A one-dimensional int32 or int64 tensor, of a given length where one is given.

    It may be on another device than the layers, if that one holds values.
    """
    _check_kind(name, tensor, _INDEX_DTYPES)
    if tensor.device.type == "meta" and device.type != "meta":
        raise ValueError(f"{name} is on meta, which holds no values; legal: {device}")
    if tensor.dim() != 1 or (length is None and not len(tensor)):
        raise _shape_error(name, tensor, "[B] with B of at least 1")
    if length is not None and len(tensor) != length:
        raise _shape_error(name, tensor, f"[{length}]{why}")


def to_host(name: str, tensor: torch.Tensor) -> IntArray:
    """The values of an index tensor, as a copy: callers add to theirs."""
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on meta, which holds no values; legal: a device that does")
    return np.array(tensor.cpu().numpy(), dtype=np.int64)


def check_table(req_to_token: Any, device: torch.device) -> None:
    """``req_to_token`` is a two-dimensional index tensor on the device, with dense rows."""
    _check_kind("req_to_token", req_to_token, _INDEX_DTYPES, device)
    if req_to_token.dim() != 2:
        raise _shape_error("req_to_token", req_to_token, "[rows, context]")
    if req_to_token.stride(1) != 1 and req_to_token.shape[1] > 1:
        raise ValueError(
            f"req_to_token has stride {req_to_token.stride(1)} in its second dimension; legal: 1"
        )


def _check_kind(
    name: str,
    tensor: Any,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; legal: a torch.Tensor")
    # A class that dispatches for itself holds its values elsewhere, or none.
    own_dispatch = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_neg() or own_dispatch:
        kind = str(tensor.layout) if tensor.layout != torch.strided else type(tensor).__name__
        raise ValueError(f"{name} is not dense in memory ({kind}); legal: a plain torch.Tensor")
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


def check_new_slots(new_slots: torch.Tensor) -> None:
    """Slots on the CPU are not negative, and fit into 32 bits."""
    if new_slots.device.type != "cpu" or not len(new_slots):
        return
    for slot in (int(new_slots.min()), int(new_slots.max())):
        if not 0 <= slot <= INT32_MAX:
            raise ValueError(f"new_slots holds {slot}; legal: 0 and above, up to {INT32_MAX}")


def check_table_rows(rows: NDArray[np.integer], lens: IntArray) -> None:
    """The batch's rows of ``req_to_token`` hold slots, as far as its requests are long."""
    check_slots(rows, lens, "req_to_token")


def check_sinks(sinks: Any, num_qo_heads: int, device: torch.device) -> torch.Tensor | None:
    """Attention sinks: None, or [Hq] contiguous on the device; on the CPU less than infinity."""
    if sinks is None:
        return None
    _check_kind("sinks", sinks, Q_DTYPES, device)
    if sinks.shape != (num_qo_heads,):
        raise _shape_error("sinks", sinks, f"[{num_qo_heads}]")
    if not sinks.is_contiguous():
        raise ValueError(f"sinks has stride {sinks.stride(0)}; legal: 1")
    if device.type == "cpu" and not (sinks < torch.inf).all():
        raise ValueError("sinks holds NaN or infinity; legal: finite numbers, and -inf for no sink")
    found: torch.Tensor = sinks
    return found


def check_unsupported(window_left: Any) -> None:
    """Refuse what no executor supports yet, instead of ignoring it."""
    if not isinstance(window_left, Integral) or int(window_left) != -1:
        raise refusal("window_left", window_left, "-1 (no window); windows are not supported yet")


def check_given_forest(forest: Any, seq_lens: torch.Tensor) -> IntArray:
    """The forest's lengths, compared with ``seq_lens`` where that costs no device sync."""
    if not isinstance(forest, PrefixForest):
        raise ValueError(f"forest is a {type(forest).__name__}; legal: a PrefixForest")
    check_forest(forest)  # its arrays may have been written to since it was made
    if forest.batch_size != len(seq_lens):
        raise ValueError(
            f"forest has {forest.batch_size} requests; legal: {len(seq_lens)}, as seq_lens has"
        )
    if seq_lens.device.type == "cpu" and (forest.seq_lens != seq_lens.numpy()).any():
        bad = int((forest.seq_lens != seq_lens.numpy()).argmax())
        raise ValueError(
            f"forest was made for seq_lens[{bad}]={forest.seq_lens[bad]}; legal: "
            f"{int(seq_lens[bad])}, as seq_lens has"
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
