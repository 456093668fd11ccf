"""FastTree's kernels (PanZaifeng/FastTree-Artifact, kernel_bench/fasttree.py), from a clone.

The clone's ``kernel_bench`` folder is named by the environment variable ``FASTTREE_KERNEL_BENCH``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_prefix.bench.providers.base import Provider
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.workloads.inputs import AttentionInputs

__all__ = ["FOLDER_VARIABLE", "FastTree"]

FOLDER_VARIABLE = "FASTTREE_KERNEL_BENCH"

# As in kernel_bench/run_benchmark.sh and the defaults of kernel_bench/benchmark.py: query rows per
# tile over the group size, KV tile, KV split, and CTA counts that shrink the split.
_QUERY_ROWS = (64, 16)
_KV_TILES = (32, 32)
_KV_SPLITS = [1024, 128]
_THRESHOLDS = ([132, 528], [132, 132])


class FastTree(Provider):
    """FastTree's plan and its two-stage kernels; it reads every node once.

    It takes the slots of a node for a run, from which we look ours up on the device.
    """

    name = "fasttree"
    kind = "peer"

    @classmethod
    def unavailable(cls) -> str | None:
        folder = os.environ.get(FOLDER_VARIABLE)
        if not folder:
            return f"{FOLDER_VARIABLE} names no folder"
        try:
            _load(folder)
        except Exception as error:  # a script of another time may raise anything when imported
            return f"{type(error).__name__}: {error}"
        return None

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        self._group = group = inputs.heads.qo // inputs.heads.kv
        if group & (group - 1) or group > min(_QUERY_ROWS):
            raise NotRunError(f"group size {group} is no power of two up to {min(_QUERY_ROWS)}")
        tree = inputs.batch.tree
        if tree.cut.any() or set(tree.parent.tolist()) & set(tree.leaf.tolist()):
            raise NotRunError("requests end inside shared nodes")
        self.kv_tokens_read = inputs.unique_tokens
        self._module = _load(os.environ[FOLDER_VARIABLE])
        self._nodes, slots = _nodes(inputs)
        self._pointers = np.cumsum([0, *(node.seqlen for node in self._nodes)]).tolist()
        # int32 offsets overflow in its kernels on a large cache; 64-bit slots prevent that.
        dtype = torch.int64 if inputs.k[0].numel() >= 1 << 31 else torch.int32
        self._slots = torch.from_numpy(slots).to(inputs.q.device, dtype)
        self._plan: tuple[Any, ...] = ()

    def plan(self) -> None:
        w = self.inputs
        params = self._module.FastTreeParams()
        params.set_values(0.66, 0.33, 0.1)
        params.set_q_tile_sizes([rows // self._group for rows in _QUERY_ROWS])
        params.set_kv_tile_sizes(list(_KV_TILES))
        params.set_kv_group_num(self._group)
        sizes = (w.batch.batch_size, w.heads.qo, w.heads.kv, w.heads.dim)
        with contextlib.redirect_stdout(io.StringIO()):
            (entries, *plan), _ = self._module.fasttree_preparation(
                self._nodes, self._pointers, *sizes, _KV_SPLITS, *_THRESHOLDS, params
            )
        # With the tiles as the planner leaves them.
        self._plan = (self._slots[entries.long()], *plan, params.TSQs, params.TSKs)

    def run(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = self.inputs
        self._module.fasttree_decode(w.q, k, v, w.out, *self._plan, w.sm_scale)
        return w.out


def _nodes(inputs: AttentionInputs) -> tuple[list[Any], NDArray[np.int64]]:
    """FastTree's nodes, and their slots one after another, with its padding, -1, at the end."""
    batch, tree = inputs.batch, inputs.batch.tree
    parents, lengths = tree.parent.tolist(), tree.length.tolist()
    if parents.count(-1) > 1:  # several roots hang below an empty one
        parents, lengths = [-1, *(parent + 1 for parent in parents)], [0, *lengths]
    nodes = [
        SimpleNamespace(parent=p, id=i, seqlen=n, num_children=parents.count(i), requests=[])
        for i, (p, n) in enumerate(zip(parents, lengths, strict=True))
    ]
    added = len(nodes) - len(tree.parent)
    slots: list[Any] = [()] * len(nodes)
    for request, path in enumerate(batch.paths):
        own = [0] * added + [node + added for node in path.node_ids]
        ends = [0] * added + list(path.ends)
        for start, end, node in zip((0, *ends), ends, own, strict=False):
            nodes[node].requests.append(request)
            slots[node] = batch.table[request, start:end]
    return nodes, np.append(np.concatenate(slots), -1)


@cache
def _load(folder: str) -> Any:
    path = Path(folder) / "fasttree.py"
    spec = importlib.util.spec_from_file_location("fasttree_kernel_bench", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{FOLDER_VARIABLE} has no fasttree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
