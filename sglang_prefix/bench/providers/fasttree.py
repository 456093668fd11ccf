"""FastTree's kernels (PanZaifeng/FastTree-Artifact, kernel_bench/fasttree.py), from a clone.

The clone's ``kernel_bench`` folder is named by the environment variable ``FASTTREE_KERNEL_BENCH``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from sglang_prefix.bench.providers.base import Provider
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["FOLDER_VARIABLE", "PROVIDERS", "FastTree"]

FOLDER_VARIABLE = "FASTTREE_KERNEL_BENCH"

# As in kernel_bench/run_benchmark.sh and the defaults of kernel_bench/benchmark.py: query rows per
# tile over the group size, KV tile, KV split, and CTA counts that shrink the split.
_QUERY_ROWS = (64, 16)
_KV_TILES = (32, 32)
_KV_SPLITS = [1024, 128]
_THRESHOLDS = ([132, 528], [132, 132])


@dataclass
class _Node:
    """What FastTree's planner reads of a node."""

    parent: int
    id: int
    seqlen: int
    num_children: int = 0
    requests: list[int] = field(default_factory=list)


class FastTree(Provider):
    """FastTree's plan and its two-stage kernels.

    It takes the slots of a node for a run, from which we look ours up on the device.
    """

    name = "fasttree"
    kind = "peer"

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        folder = os.environ.get(FOLDER_VARIABLE)
        if not folder:
            return f"{FOLDER_VARIABLE} names no folder"
        try:
            _load(folder)
        except Exception as error:  # whatever a script of another time does when it is imported
            return f"{type(error).__name__}: {error}"
        return None

    @classmethod
    def inapplicable(cls, inputs: AttentionInputs) -> str | None:
        tree = inputs.batch.tree
        group = inputs.heads.qo // inputs.heads.kv
        if group & (group - 1) or group > min(_QUERY_ROWS):
            return f"group size {group} is no power of two up to {min(_QUERY_ROWS)}"
        inner = set(tree.parent.tolist()) & set(tree.leaf.tolist())
        if inner or tree.cut.any():
            return "requests end inside shared nodes"
        return None

    @property
    def kv_tokens_read(self) -> int:
        """It reads every node once."""
        return self.inputs.unique_tokens

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        self._module: Any = _load(os.environ[FOLDER_VARIABLE])
        tree, table = inputs.batch.tree, inputs.batch.table
        # Several roots hang below an empty one.
        below = int((tree.parent < 0).sum() > 1)
        self._nodes = [_Node(-1, 0, 0)] * below
        for parent, length in zip(
            (tree.parent + below).tolist(), tree.length.tolist(), strict=True
        ):
            self._nodes.append(_Node(parent, len(self._nodes), length))
            if parent >= 0:
                self._nodes[parent].num_children += 1
        slots: list[Any] = [()] * len(self._nodes)
        if below:
            self._nodes[0].requests.extend(range(inputs.batch.batch_size))
        for request, path in enumerate(inputs.batch.paths):
            for start, end, node in zip((0, *path.ends), path.ends, path.node_ids, strict=False):
                self._nodes[node + below].requests.append(request)
                slots[node + below] = table[request, start:end]
        lengths = [node.seqlen for node in self._nodes]
        self._pointers = np.concatenate(([0], np.cumsum(lengths))).tolist()
        flat = np.append(np.concatenate(slots), -1)  # the last entry is FastTree's padding, -1
        # int32 offsets overflow in its kernels on a large cache; 64-bit slots prevent that.
        wide = inputs.k[0].numel() >= 1 << 31
        self._slots = torch.from_numpy(flat).to(
            inputs.q.device, torch.int64 if wide else torch.int32
        )
        self._plan: tuple[Any, ...] = ()
        self._tiles: tuple[list[int], list[int]] = ([], [])

    def plan(self) -> None:
        w = self.inputs
        group = w.heads.qo // w.heads.kv
        params = self._module.FastTreeParams()
        params.set_values(0.66, 0.33, 0.1)
        params.set_q_tile_sizes([rows // group for rows in _QUERY_ROWS])
        params.set_kv_tile_sizes(list(_KV_TILES))
        params.set_kv_group_num(group)
        with contextlib.redirect_stdout(io.StringIO()):
            plan, _ = self._module.fasttree_preparation(
                self._nodes,
                self._pointers,
                w.batch.batch_size,
                w.heads.qo,
                w.heads.kv,
                w.heads.dim,
                _KV_SPLITS,
                *_THRESHOLDS,
                params,
            )
        self._plan = (self._slots[plan[0].long()], *plan[1:])
        # The planner may have changed them; its own benchmark passes the ones it started with.
        self._tiles = (params.TSQs, params.TSKs)

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        self._module.fasttree_decode(w.q, k, v, w.out, *self._plan, *self._tiles, w.sm_scale)
        return w.out


@cache
def _load(folder: str) -> ModuleType:
    path = Path(folder) / "fasttree.py"
    spec = importlib.util.spec_from_file_location("fasttree_kernel_bench", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{FOLDER_VARIABLE} has no fasttree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROVIDERS = (FastTree,)
