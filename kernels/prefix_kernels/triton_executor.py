"""The Triton executor: runs a pack plan with our kernels, on CUDA or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpretedFunction

from prefix_kernels.arguments import INT32_MAX, check_choice, refusal
from prefix_kernels.executor import AttentionParams, PlanExecutor
from prefix_kernels.forward import pack_forward_kernel
from prefix_kernels.launch import launch
from prefix_kernels.launches import (
    AUTO,
    GRAPH_ROWS,
    LAUNCH_MODES,
    MERGE_MODES,
    LaunchConfig,
    LaunchSetting,
    PlanFacts,
    choose_launches,
    choose_modes,
    widest_block,
)
from prefix_kernels.merge import merge_kernel
from prefix_kernels.plan import AttentionShape, PackPlan
from prefix_kernels.plan_buffers import PlanBuffers, PlanCapacity, serialize_plan
from prefix_kernels.streams import LaunchStreams
from prefix_kernels.tiles import ROW_CLASSES, TILE_FIELDS, TileShape, formula_tile, row_classes
from prefix_kernels.work_list import TILE_CLASS_FIELD, build_work_list

__all__ = ["LAUNCH_MODES", "MERGE_MODES", "TritonExecutor"]

IntArray = NDArray[np.int64]

# The first compute capability with programmatic dependent launch.
_DEPENDENT_LAUNCH_MAJOR = 9


def _major_of(device: torch.device) -> int:
    """Major compute capability; 0 in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _tile_shape(shape: AttentionShape, device: torch.device) -> TileShape:
    found = TileShape.of(shape)
    if device.type != "cuda":
        return found
    return found.on_arch(f"sm_{_major_of(device)}0", torch.cuda.get_device_name(device))


class TritonExecutor(PlanExecutor):
    """Runs plans with the pack-forward and merge kernels. ``run`` allocates nothing.

    Args:
        shape, device, check_slots: as of :class:`PlanExecutor`; the device is a CUDA device, or the
            CPU under the interpreter.
        mode: "streams", one launch per tile class, each on its own stream; "fused", one launch
            for the two classes that have the same number of warps; or "auto", what
            :func:`~prefix_kernels.launches.choose_modes` says of a batch size.
        merge: "launch", a launch of its own; "in_kernel", by the forward program that ends last
            for a request; or "auto", likewise.
        capacity: fixed sizes of the buffers. Launches are fixed then, too: under every plan of the
            same padded batch size, ``append`` and ``run`` launch the same kernels on the same
            addresses, so that a captured graph replays under all of them. None to let the buffers
            grow and to fit the launches to each plan. Plans with ``query_lens`` have kernels of
            their own, so a graph is captured under one and replayed under such.
        graph_rows: of fixed launches, rows of the tiles beside the one that holds a whole batch.
        wide_first: whether launches of wider tiles have streams of higher priority.
        overlap_merge: whether the launch of the merge begins before the forward stage ends, where
            that is one launch and the device has programmatic dependent launch. Not yet run on a
            GPU, so it is off.
        tile_changes: values of fields of :class:`~prefix_kernels.tiles.TileConfig` that all tiles
            get, to measure a switch both ways.

    Attributes:
        modes: launch and merge mode of the plan in use, "auto" resolved.
    """

    name = "triton"

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        *,
        mode: str = AUTO,
        merge: str = AUTO,
        capacity: PlanCapacity | None = None,
        graph_rows: tuple[int, ...] = GRAPH_ROWS,
        wide_first: bool = True,
        overlap_merge: bool = False,
        tile_changes: Mapping[str, Any] | None = None,
        check_slots: bool = False,
    ) -> None:
        super().__init__(shape, device, check_slots=check_slots)
        check_choice("mode", mode, (AUTO, *LAUNCH_MODES))
        check_choice("merge", merge, (AUTO, *MERGE_MODES))
        for rows in graph_rows:
            if rows not in ROW_CLASSES:
                raise refusal("graph_rows", rows, ", ".join(map(str, ROW_CLASSES)))
        for field in tile_changes or ():
            if field not in TILE_FIELDS:
                raise refusal("tile_changes", field, ", ".join(TILE_FIELDS))
        if why_not := self.why_not_shape(shape, device):
            raise ValueError(why_not)
        self._tile_shape = _tile_shape(shape, device)
        self._asked_modes = mode, merge
        self.modes = choose_modes(1, shape.group_size, mode, merge, v_in_k=shape.v_in_k)
        self._graph_rows = graph_rows
        self._tile_changes = dict(tile_changes or {})
        self._launches_are_fixed = capacity is not None
        self._overlaps_merge = overlap_merge and _major_of(device) >= _DEPENDENT_LAUNCH_MAJOR
        self._buffers = PlanBuffers(shape, device, capacity)
        self._launches: list[tuple[LaunchConfig, int]] = []  # each with its number of programs
        self._num_slots = 0
        self._is_causal = False  # whether the plan in use has `query_lens`
        self._room: IntArray = np.zeros(0, dtype=np.int64)
        self._needs_merge = False
        with torch.inference_mode(False):
            self._one = torch.ones(1, device=device)
            self._no_lse = torch.empty(1, 1, device=device)
        self._streams = LaunchStreams(device, wide_first=wide_first)
        self._num_sms = 0
        if device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    @classmethod
    def why_not(
        cls, device: torch.device, q_dtype: torch.dtype, kv_dtype: torch.dtype
    ) -> str | None:
        """Why the kernels cannot run on such tensors; None if they can."""
        if device.type == "cuda":
            if torch.version.hip is not None:  # register bounds and launches are CUDA's
                return "the kernels need a GPU of NVIDIA's"
            if kv_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(device) < (
                8,
                9,
            ):
                return "float8_e4m3fn needs a GPU of compute capability 8.9 or later"
            return None
        if not isinstance(pack_forward_kernel, InterpretedFunction):
            interpreter = "Triton's interpreter (TRITON_INTERPRET=1)"
            return f"the kernels need a GPU, not {device}, or {interpreter}"
        if torch.bfloat16 in (q_dtype, kv_dtype):
            return "Triton's interpreter computes bfloat16 products wrongly; use float16 or float32"
        return None

    @classmethod
    def why_not_shape(cls, shape: AttentionShape, device: torch.device) -> str | None:
        """Why the kernels have no tile for layers of a shape on a device; None if they have."""
        tile_shape = _tile_shape(shape, device)
        rows = row_classes(tile_shape)
        if not rows:
            what, legal = f"v_head_dim={shape.v_head_dim}", "less"
            if shape.v_in_k and shape.kv_itemsize == 1:
                what, legal = "kv_itemsize=1 with v_in_k", "2 or 4"
            what += " has no tile of the Triton kernels"
        elif shape.v_in_k and device.type == "cuda":
            # Of one major version, some have less: 99 KiB on an L40S.
            properties: Any = torch.cuda.get_device_properties(device)  # stubs lack the next
            most = properties.shared_memory_per_block_optin
            needed = max(formula_tile(n, tile_shape).shared_bytes(tile_shape) for n in rows)
            if needed <= most:
                return None
            what = (
                f"v_head_dim={shape.v_head_dim} with v_in_k needs {needed} bytes of shared memory"
            )
            legal = f"up to {most} on this GPU"
        else:
            return None
        return f"{what}; legal: {legal}, or the executor 'torch'"

    @property
    def max_block_rows(self) -> int:
        """Query rows (requests times group size) that read KV in one pass."""
        return widest_block(self._asked_modes[0], self._tile_shape)

    @property
    def launch_setting(self) -> LaunchSetting:
        """What decides the launches."""
        return LaunchSetting(
            self._tile_shape,
            self.shape.group_size,
            self._num_sms,
            self._asked_modes[0],
            self._launches_are_fixed,
            self._graph_rows,
        )

    @property
    def buffers(self) -> PlanBuffers:
        """The plan in use, on the device."""
        return self._buffers

    @property
    def kv_slots(self) -> torch.Tensor:
        """Slots of the plan in use, laid out by it."""
        return self._buffers.kv_slots[: self._num_slots]

    def set_tail_lengths(self, tail_lengths: IntArray) -> None:
        """Set the tokens [B] in each request's tail, on the device."""
        plan = self.plan
        assert plan is not None
        self._room = plan.seq_lens - plan.tail_start + plan.reserved_tail_slots - tail_lengths
        lengths = torch.from_numpy(tail_lengths.astype(np.int32))
        self._buffers.tail_lengths[: len(lengths)].copy_(lengths, non_blocking=True)

    def _load(
        self,
        plan: PackPlan,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        padded_batch_size: int,
    ) -> None:
        group_size, is_fixed = self.shape.group_size, self._launches_are_fixed
        v_in_k = self.shape.v_in_k
        modes = choose_modes(padded_batch_size, group_size, *self._asked_modes, v_in_k=v_in_k)
        if is_fixed:
            facts = PlanFacts.of_every_plan(padded_batch_size, group_size, self._graph_rows)
        else:
            facts = PlanFacts.of(plan, group_size)
        launches = choose_launches(facts, self._tile_shape, modes[0])
        if modes[1] == "in_kernel":
            launches = [one.merging() for one in launches]
        launches = [one.with_tiles(self._tile_changes) for one in launches]
        block_rows = [tile.block_m for one in launches for tile in one.tiles]
        items, partials = build_work_list(plan, group_size, block_rows)
        if len(launches) == 1:
            lists = [items]
        else:
            lists = [items[items[:, TILE_CLASS_FIELD] == one.work_list] for one in launches]
        if len(items) * self.shape.num_kv_heads > INT32_MAX:
            raise ValueError(f"the plan has {len(items)} work items; legal: 2**31 tiles in all")
        serialized = serialize_plan(plan, lists, partials, padded_batch_size)
        self._buffers.load(plan, serialized, req_to_token, req_pool_indices, padded_batch_size)
        self._launches, self.modes = [], modes  # from here on nothing is refused
        for one, own in zip(launches, lists, strict=True):
            num_tiles = None if is_fixed else len(own) * self.shape.num_kv_heads
            num_programs = one.num_programs(self._tile_shape, self._num_sms, num_tiles)
            self._launches.append((one, num_programs))
        self._num_slots, self._is_causal = plan.num_slots, plan.query_lens is not None
        self._room = np.full(plan.batch_size, plan.reserved_tail_slots)
        self._needs_merge = (
            self._launches_are_fixed
            or padded_batch_size > plan.num_rows
            or bool((np.diff(plan.request_indptr) > 1).any())
        )

    def _append(
        self, seq_lens: torch.Tensor, new_slots: torch.Tensor, num_new: IntArray | None
    ) -> None:
        if num_new is not None:  # lengths are read on the device, but growth is bounded here
            if (num_new > self._room).any():
                raise RuntimeError("a tail has used up its reserved slots: plan again")
            self._room = self._room - num_new
        self._buffers.append(seq_lens, new_slots, causal=self._is_causal)

    def _run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        params: AttentionParams,
    ) -> None:
        k_factor, k_scales, k_scale_stride = self._split_scale(params.k_scale)
        v_factor, v_scales, v_scale_stride = self._split_scale(params.v_scale)
        buffers, shape = self._buffers, self.shape
        merges_in_kernel = self.modes[1] == "in_kernel"
        merges_after = self._needs_merge and not merges_in_kernel
        # The launch before the merge must be the one that the merge waits for.
        overlaps_merge = self._overlaps_merge and merges_after and len(self._launches) == 1
        lse_or_none = self._no_lse if lse is None else lse
        outputs: dict[str, Any] = dict(  # noqa: C408
            out_ptr=out,
            lse_ptr=lse_or_none,
            sinks_ptr=params.sinks,
            out_stride=out.stride(0),
            out_head_stride=out.stride(1),
            lse_stride=lse_or_none.stride(0),
            lse_head_stride=lse_or_none.stride(1),
            partial_out_ptr=buffers.partial_out,
            partial_lse_ptr=buffers.partial_lse,
            plan_ptr=buffers.plan,
            NUM_KV_HEADS=shape.num_kv_heads,
            GROUP_SIZE=shape.group_size,
            V_HEAD_DIM=shape.v_head_dim,
            BLOCK_DV=self._tile_shape.v_block,
            WRITES_LSE=lse is not None,
            OVERLAPS_MERGE=overlaps_merge,
        )
        forward: dict[str, Any] = dict(
            q_ptr=q,
            k_ptr=k_cache,
            v_ptr=v_cache,
            k_scale_ptr=k_scales,
            v_scale_ptr=v_scales,
            kv_slots_ptr=buffers.kv_slots,
            tail_lengths_ptr=buffers.tail_lengths,
            arrivals_ptr=buffers.arrivals,
            padded_batch_size=self.padded_batch_size,
            MERGES=merges_in_kernel,
            sm_scale=params.sm_scale * k_factor,
            v_factor=v_factor,
            logit_cap=params.logit_cap,
            q_stride=q.stride(0),
            q_head_stride=q.stride(1),
            K_STRIDE=k_cache.stride(0),
            K_HEAD_STRIDE=k_cache.stride(1),
            # What is not read must make no other kernel.
            V_STRIDE=0 if shape.v_in_k else v_cache.stride(0),
            V_HEAD_STRIDE=0 if shape.v_in_k else v_cache.stride(1),
            **outputs,
            k_scale_stride=k_scale_stride,
            v_scale_stride=v_scale_stride,
            HEAD_DIM=shape.head_dim,
            BLOCK_D=self._tile_shape.k_block,
            V_IN_K=shape.v_in_k,
            CAUSAL=self._is_causal,
            HAS_CAP=params.logit_cap > 0,
            # A scale that is not above 0 needs what those from a tensor get.
            HAS_SCALES=k_scales is not self._one
            or v_scales is not self._one
            or params.sm_scale * k_factor <= 0,
        )
        self._streams.run([partial(self._launch, *one, forward) for one in self._launches])
        if merges_after:
            launch(
                merge_kernel,
                (self.padded_batch_size, self.shape.num_kv_heads),
                **outputs,
                num_warps=4,
                # Only where it is asked for: an option is part of the key of a compiled kernel.
                **({"launch_pdl": True} if overlaps_merge else {}),
            )

    def _launch(self, config: LaunchConfig, num_programs: int, arguments: dict[str, Any]) -> None:
        tile, wide = config.tile, config.wide_tile
        launch(
            pack_forward_kernel,
            (num_programs,),
            **arguments,
            LIST=config.work_list,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            WIDE_BLOCK_M=wide.block_m if wide else 0,
            WIDE_BLOCK_N=wide.block_n if wide else 0,
            **tile.switches,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )

    def _split_scale(self, scale: float | torch.Tensor) -> tuple[float, torch.Tensor, int]:
        """A scale as a number, times a tensor and its stride from KV head to KV head."""
        if isinstance(scale, torch.Tensor):
            return 1.0, scale, scale.stride(0) if scale.dim() else 0
        return scale, self._one, 0
