"""How long a plan's forward stage would take on a GPU, by the costs that it was planned with.

List scheduling as the device does it: programs of the widest class are placed first, on
multiprocessors that have room for them, and each takes every n-th item of its class. Programs that
read share the bandwidth of main memory, those of one multiprocessor its instructions; an item's
fixed cost is time in which its program reads nothing. A model, for tests and comparisons of plans;
its times are no measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefix_kernels.work_list import TILE_CLASS_FIELD, build_work_list, tile_classes
from sglang_prefix.packing.layout import CostedPlan
from sglang_prefix.packing.splits import tile_table

__all__ = ["Simulation", "simulate"]

FloatArray = NDArray[np.float64]

# Estimate: what the L2 cache delivers over main memory.
_L2_SPEEDUP = 2.5
_STEPS = 400  # of time, in which the least time that the work can take is divided
_FAIR_SHARE_ROUNDS = 3


class Simulation(NamedTuple):
    """What came out.

    Attributes:
        makespan_us: time of the forward stage, launches left out.
        work_us: the work of the plan's packs without splits, if all workers of all classes had equal
            parts of it.
        shortest_us: the longest pack in the shortest splits that are allowed, alone on the device.
        merge_us: time of reading the partial results once more.
    """

    makespan_us: float
    work_us: float
    shortest_us: float
    merge_us: float

    @property
    def total_us(self) -> float:
        """Both stages."""
        return self.makespan_us + self.merge_us

    @property
    def bound_us(self) -> float:
        """What is to be expected of a good plan with these packs."""
        return max(self.work_us, self.shortest_us)


class _Items(NamedTuple):
    """[n] tiles to compute of one class, in the order of its list: bytes, and microseconds of a
    multiprocessor's instructions."""

    num_bytes: FloatArray
    issue_us: FloatArray


def simulate(plan: CostedPlan) -> Simulation:
    """Simulate a plan on the GPU that it was made for."""
    shape, device = plan.costs.shape, plan.costs.device
    rows = np.diff(plan.query_indptr) * shape.group_size
    classes = tile_classes(rows, [tile.rows for tile in device.tiles])
    block_rows, tokens, workers, *times = tile_table(plan.costs)[classes].T
    item_us, token_us, read_us, issue_us, row_us = times
    lengths = plan.pack_end - plan.pack_start
    items = shape.num_kv_heads * -(-rows // block_rows)
    each_us = np.maximum(np.maximum(read_us, issue_us), token_us / workers)
    # Nobody reads before the first item's fixed time is over.
    fixed_us = max((items * item_us / workers).sum(), item_us.max())
    work_us = float(fixed_us + (items * lengths * each_us).sum())
    least = np.minimum(np.maximum(device.min_split_tokens, tokens), lengths)
    merged = plan.num_partials if plan.num_partials > plan.batch_size else 0
    return Simulation(
        _Device(plan, max(work_us, 1e-3) / _STEPS).run(),
        work_us,
        float((item_us + least * token_us).max()),
        merged * shape.partial_size / (device.read_bytes_per_us * _L2_SPEEDUP),
    )


def _items_of(plan: CostedPlan) -> list[_Items]:
    """By tile class, as the kernels list them."""
    shape, tiles = plan.costs.shape, plan.costs.device.tiles
    items, _ = build_work_list(plan, shape.group_size, [tile.rows for tile in tiles])
    lengths = plan.pack_end - plan.pack_start
    pack = np.searchsorted(plan.partial_indptr, items[:, 1], side="right") - 1
    split, num_splits = items[:, 6], items[:, 7]
    chunk = -(-lengths[pack] // num_splits)
    begin = np.minimum(split * chunk, lengths[pack])
    tokens = np.minimum(begin + chunk, lengths[pack]) - begin
    token_bytes = shape.kv_token_bytes / shape.num_kv_heads
    row_bytes = shape.partial_size / shape.num_qo_heads
    found = []
    for number, tile in enumerate(tiles):
        mine = items[:, TILE_CLASS_FIELD] == number
        rows = np.minimum(items[mine, 3] - items[mine, 2], tile.rows)
        from_cache = np.where(items[mine, 2] > 0, 1 / _L2_SPEEDUP, 1.0)
        num_bytes = tokens[mine] * token_bytes * from_cache + rows * row_bytes
        issue_us = -(-tokens[mine] // tile.tokens) * tile.tokens * tile.token_us
        found.append(
            _Items(*(np.repeat(part, shape.num_kv_heads) for part in (num_bytes, issue_us)))
        )
    return found


class _Device:
    """Multiprocessors with programs, as time goes on.

    Args:
        plan: what runs.
        least_us: time is not divided finer.
    """

    def __init__(self, plan: CostedPlan, least_us: float) -> None:
        device = plan.costs.device
        found = zip(device.tiles, _items_of(plan), strict=True)
        work = [(tile, items) for tile, items in found if len(items.num_bytes)]
        self._num_sms, self._bandwidth = device.num_sms, device.read_bytes_per_us
        self._least_us = least_us
        self._free = np.ones(device.num_sms)
        self._waiting = []  # [class, programs placed, programs] of the widest first
        parts = []
        for number, (tile, found) in reversed([*enumerate(work)]):
            count = min(len(found.num_bytes), tile.programs * device.num_sms)
            parts.append((number, count))
        self._class = np.repeat(*map(np.array, zip(*parts, strict=True)))
        self._stride = np.repeat([count for _, count in parts], [count for _, count in parts])
        offsets = np.cumsum([0, *(len(found.num_bytes) for _, found in work)])
        self._bytes = np.concatenate([found.num_bytes for _, found in work])
        self._issue = np.maximum(np.concatenate([found.issue_us for _, found in work]), 1e-9)
        self._next = np.concatenate([offsets[number] + np.arange(count) for number, count in parts])
        self._stop = offsets[self._class + 1]
        self._share = np.array([tile.sm_share for tile, _ in work])[self._class]
        self._fixed_us = np.array([tile.item_us for tile, _ in work])[self._class]
        self._lone = np.array([tile.lone_bytes_per_us for tile, _ in work])[self._class]

    def run(self) -> float:
        """Microseconds until all items are done."""
        size = len(self._class)
        sm = np.full(size, -1)
        fixed, left = self._fixed_us.copy(), np.ones(size)
        done = np.zeros(size, dtype=bool)
        now = 0.0
        self._place(sm, done)
        while not done.all():
            active = np.flatnonzero((sm >= 0) & ~done)
            reads = fixed[active] <= 0
            who = active[reads]
            rate = self._rates(who, sm[who])
            left[who] += rate * fixed[who]  # for the time that was too much in the step before
            fixed[who] = 0.0
            until = np.concatenate((fixed[active[~reads]], left[who] / rate))
            step = max(float(until.min()), self._least_us)
            now += step
            fixed[active[~reads]] -= step
            left[who] -= rate * step
            ended = left[who] <= 1e-9
            if not ended.any():
                continue
            who, over = who[ended], -left[who[ended]] / rate[ended]
            self._next[who] += self._stride[who]
            fixed[who], left[who] = self._fixed_us[who] - over, 1.0
            ends = who[self._next[who] >= self._stop[who]]
            if len(ends):
                done[ends] = True
                np.add.at(self._free, sm[ends], self._share[ends])
                self._place(sm, done)
        return now

    def _place(self, sm: NDArray[np.int64], done: NDArray[np.bool_]) -> None:
        """Give programs that wait a multiprocessor with room, the emptiest first."""
        for number in np.unique(self._class)[::-1]:
            waiting = np.flatnonzero((sm < 0) & (self._class == number))
            while len(waiting):
                share = self._share[waiting[0]]
                open_sms = np.flatnonzero(self._free >= share - 1e-9)
                if not len(open_sms):
                    break
                order = open_sms[np.argsort(-self._free[open_sms], kind="stable")][: len(waiting)]
                sm[waiting[: len(order)]] = order
                self._free[order] -= share
                waiting = waiting[len(order) :]

    def _rates(self, who: NDArray[np.int64], sm: NDArray[np.int64]) -> FloatArray:
        """Parts of their items that programs do in a microsecond."""
        item = self._next[who]
        readers = np.bincount(sm, minlength=self._num_sms)[sm]
        num_bytes = self._bytes[item]
        rate = np.minimum(1 / (readers * self._issue[item]), self._lone[who] / num_bytes)
        wanted = rate * num_bytes
        if wanted.sum() <= self._bandwidth:
            return rate
        # Everybody gets the same, but nobody more than is wanted.
        level = self._bandwidth / len(who)
        for _ in range(_FAIR_SHARE_ROUNDS):
            modest = wanted <= level
            level = (self._bandwidth - wanted[modest].sum()) / max(1, (~modest).sum())
        return np.minimum(rate, level / num_bytes)
