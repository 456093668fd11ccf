"""How long a plan's forward stage would take on a GPU, by the costs that it was planned with.

As the device does it: programs of the widest class are placed first, on multiprocessors that have
room for them, and each takes every n-th item of its class. Programs that read share the bandwidth
of main memory, and those of one multiprocessor its instructions; in the fixed time of an item its
program reads nothing. A model, to compare plans with each other; its times are no measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.work_list import TILE_CLASS_FIELD, build_work_list, tile_classes
from sglang_prefix.packing.cost import TileCost
from sglang_prefix.packing.gpu import L2_SPEEDUP
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.splits import even_token_us, tile_table

__all__ = ["Simulation", "simulate"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_STEPS = 400  # into which the time of the work is divided, and no finer
_FAIR_SHARE_ROUNDS = 3


class Simulation(NamedTuple):
    """What came out, in microseconds.

    Attributes:
        makespan_us: time of the forward stage, launches left out.
        work_us: the plan's packs without splits, if their work lay evenly on all programs.
        shortest_us: the longest pack in the shortest splits that are allowed, alone on the device.
        partials_us: writing the partial results at the device's bandwidth.
        merge_us: reading them from the L2 cache.
    """

    makespan_us: float
    work_us: float
    shortest_us: float
    partials_us: float
    merge_us: float

    @property
    def bound_us(self) -> float:
        """The larger of the work on all programs and the longest item, and the partial results."""
        return max(self.work_us, self.shortest_us) + self.partials_us

    @property
    def total_us(self) -> float:
        """Both stages."""
        return self.makespan_us + self.merge_us


class _Items(NamedTuple):
    """One class: its tile, and of the items in the order of the list the bytes and the microseconds
    of a multiprocessor's instructions."""

    tile: TileCost
    num_bytes: FloatArray
    issue_us: FloatArray


def simulate(plan: CostedPlan) -> Simulation:
    """Simulate a plan on the GPU that it was made for."""
    shape, device = plan.costs.shape, plan.costs.device
    rows = np.diff(plan.query_indptr) * shape.group_size
    classes = tile_classes(rows, [tile.rows for tile in device.tiles])
    table = tile_table(plan.costs)
    block_rows, tokens, num_sms, programs, item_us, lone_us, issue_us = table[classes, :7].T
    lengths = plan.pack_end - plan.pack_start
    items = shape.num_kv_heads * -(-rows // block_rows)
    each_us = np.array([even_token_us(row) for row in table])[classes]
    # Nobody reads before the first item's fixed time is over.
    fixed_us = max((items * item_us / (num_sms * programs)).sum(), item_us.max())
    work_us = fixed_us + (items * lengths * each_us).sum()
    least = np.minimum(np.maximum(device.min_split_tokens, tokens), lengths)
    merged = plan.num_partials if plan.num_partials > plan.batch_size else 0
    partials_us = merged * shape.partial_size / device.read_bytes_per_us
    return Simulation(
        _Device(plan, max(work_us, 1e-3) / _STEPS).run(),
        float(work_us),
        float((item_us + least * np.maximum(lone_us, issue_us)).max()),
        partials_us,
        partials_us / L2_SPEEDUP,
    )


def _items_of(plan: CostedPlan) -> list[_Items]:
    """The classes in use, as the kernels list their items."""
    shape, tiles = plan.costs.shape, plan.costs.device.tiles
    items, _ = build_work_list(plan, shape.group_size, [tile.rows for tile in tiles])
    items = np.repeat(items.astype(np.int64), shape.num_kv_heads, axis=0)
    pack = np.searchsorted(plan.partial_indptr, items[:, 1], side="right") - 1
    lengths = (plan.pack_end - plan.pack_start)[pack]
    chunk = -(-lengths // items[:, 7])
    tokens = np.clip(lengths - items[:, 6] * chunk, 0, chunk)
    token_bytes = shape.kv_token_bytes / shape.num_kv_heads
    row_bytes = shape.partial_size / shape.num_qo_heads
    found = []
    for number in np.unique(items[:, TILE_CLASS_FIELD]).tolist():
        mine, tile = items[:, TILE_CLASS_FIELD] == number, tiles[number]
        first_row = items[mine, 2]
        rows = np.minimum(items[mine, 3] - first_row, tile.rows)
        from_memory = np.where(first_row > 0, 1 / L2_SPEEDUP, 1.0)
        num_bytes = tokens[mine] * token_bytes * from_memory + rows * row_bytes
        issue_us = -(-tokens[mine] // tile.tokens) * tile.tokens * tile.token_us
        found.append(_Items(tile, num_bytes, np.maximum(issue_us, 1e-9)))
    return found


class _Device:
    """Multiprocessors with programs, as time goes on.

    Args:
        plan: what runs.
        least_us: time is not divided finer.
    """

    def __init__(self, plan: CostedPlan, least_us: float) -> None:
        device = plan.costs.device
        self._num_sms, self._bandwidth = device.num_sms, device.read_bytes_per_us
        self._least_us = least_us
        self._free = np.ones(device.num_sms)  # part of each multiprocessor
        classes = _items_of(plan)[::-1]  # the widest first
        self._bytes = np.concatenate([items.num_bytes for items in classes])
        self._issue = np.concatenate([items.issue_us for items in classes])
        sizes = [len(items.num_bytes) for items in classes]
        counts = [
            min(size, items.tile.programs * device.num_sms)
            for size, items in zip(sizes, classes, strict=True)
        ]
        first = np.cumsum([0, *sizes[:-1]])
        # Of each program: its class, next item and the items behind it; of its tile; its place.
        self._class = np.repeat(np.arange(len(classes)), counts)
        self._next = np.concatenate(
            [at + np.arange(n) for at, n in zip(first, counts, strict=True)]
        )
        self._stop, self._stride = (first + sizes)[self._class], np.array(counts)[self._class]
        tiles = [items.tile for items in classes]
        self._share = np.array([tile.sm_share for tile in tiles])[self._class]
        self._fixed = np.array([tile.item_us for tile in tiles])[self._class]
        self._lone = np.array([tile.lone_bytes_per_us for tile in tiles])[self._class]
        self._sm = np.full(len(self._class), -1)

    def run(self) -> float:
        """Microseconds until all items are done."""
        fixed, left = self._fixed.copy(), np.ones(len(self._class))
        runs = np.zeros(len(self._class), dtype=bool)
        now = 0.0
        self._place(runs)
        while runs.any():
            waits, reads = np.flatnonzero(runs & (fixed > 0)), np.flatnonzero(runs & (fixed <= 0))
            rate = self._rates(reads)
            left[reads] += rate * fixed[reads]  # for what was too much in the step before
            fixed[reads] = 0.0
            until = np.concatenate((fixed[waits], left[reads] / rate))
            step = max(float(until.min()), self._least_us)
            now += step
            fixed[waits] -= step
            left[reads] -= rate * step
            is_done = left[reads] <= 1e-9
            done = reads[is_done]
            if not len(done):
                continue
            fixed[done], left[done] = self._fixed[done] + left[done] / rate[is_done], 1.0
            self._next[done] += self._stride[done]
            ends = done[self._next[done] >= self._stop[done]]
            if len(ends):
                runs[ends] = False
                np.add.at(self._free, self._sm[ends], self._share[ends])
                self._place(runs)
        return now

    def _place(self, runs: NDArray[np.bool_]) -> None:
        """Give programs that wait a multiprocessor with room, the emptiest first."""
        for number in range(int(self._class[-1]) + 1):
            waiting = np.flatnonzero((self._sm < 0) & (self._class == number))
            while len(waiting):
                share = self._share[waiting[0]]
                order = np.argsort(-self._free, kind="stable")
                order = order[self._free[order] >= share - 1e-9][: len(waiting)]
                if not len(order):
                    break
                placed, waiting = waiting[: len(order)], waiting[len(order) :]
                self._sm[placed], runs[placed] = order, True
                self._free[order] -= share

    def _rates(self, reads: IntArray) -> FloatArray:
        """Parts of their items that programs do in a microsecond."""
        item, sm = self._next[reads], self._sm[reads]
        num_bytes = self._bytes[item]
        neighbours = np.bincount(sm, minlength=self._num_sms)[sm]
        rate = np.minimum(1 / (neighbours * self._issue[item]), self._lone[reads] / num_bytes)
        wanted = rate * num_bytes
        if wanted.sum() <= self._bandwidth:
            return np.asarray(rate)
        # Everybody gets the same bandwidth, but nobody more than is wanted.
        level = self._bandwidth / len(reads)
        for _ in range(_FAIR_SHARE_ROUNDS):
            modest = wanted <= level
            level = (self._bandwidth - wanted[modest].sum()) / max(1, (~modest).sum())
        return np.asarray(np.minimum(rate, level / num_bytes))
