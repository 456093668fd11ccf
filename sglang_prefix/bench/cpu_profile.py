"""`bench profile`: what work costs the CPU executors beside reading KV, and the table of profiles
that a result file becomes.

Plans of packs that differ in requests, tokens and heads are timed; the constants of the cost model
are those that explain the times best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefix_kernels.executor import choose_executor
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.bench.results import check_source, read_result, write_checked
from sglang_prefix.bench.run import BenchRun, Case, NotRunError
from sglang_prefix.bench.timing import Clock, clock_for, host_seconds, interleaved
from sglang_prefix.bench.workloads.inputs import AttentionInputs, OutputCheck
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import pat_tree, shared_then_private
from sglang_prefix.packing.cost import (
    CPU_PROFILES,
    FITTED,
    PROFILES_FILE,
    AttentionShape,
    load_cpu_profiles,
)

__all__ = ["PROFILES_FILE", "ProfileRun", "fit_profile", "write_profiles"]

_SECONDS_PER_CASE = 2.0
# One head per KV head to eight, and heads of 64.
_HEADS = ("32:8", "32:32", "64:8", "9:3:64")
_DTYPES = ("bfloat16", "float32")
# Requests of a pack, and its tokens. Alone, few rows and many are computed in different ways; fewer
# than 64 tokens are padded to that by some.
_REQUESTS, _TOKENS = (1, 2, 4, 8, 32), (64, 256)
# Requests of a plan, as long as the packs are not more than 8: threads have something to share.
_BATCH, _MOST_PACKS = 32, 8
_LONE_REQUESTS = 16
_TAIL_TOKENS = 8
# Layers of a plan have KV of their own, more than a cache holds, as in a model.
_MAX_LAYERS, _KV_BYTES = 16, 64 << 20
_READS = 10
# Of measured times, the share that the rest of the machine slowed down least.
_QUANTILE = 0.25
_DIGITS = 2


class PackWork:
    """Packs of one size, ready to be timed.

    Args:
        executor: "native" or "torch".
        heads, dtype: of the layers.
        requests: of a pack; 1 for requests that share nothing.
        tokens: of a pack, or of such a request.
        seed: of the inputs.
        dry: tiny.

    Raises:
        MismatchError: the output is not what the oracle says.
    """

    def __init__(
        self,
        executor: str,
        heads: Heads,
        dtype: torch.dtype,
        requests: int,
        tokens: int,
        seed: int,
        *,
        dry: bool,
    ) -> None:
        self.num_packs = 1 if dry else min(_BATCH // requests, _MOST_PACKS)
        batch = self.num_packs * requests
        if requests == 1:
            self.num_packs, batch = 0, 2 if dry else _LONE_REQUESTS
            tree = shared_then_private(batch, 0, tokens)
        else:
            tree = pat_tree(f"{self.num_packs},{batch}_{tokens},{_TAIL_TOKENS}")
        inputs = AttentionInputs.lay_out(
            tree,
            heads,
            torch.device("cpu"),
            seed,
            dtype=dtype,
            max_layers=1 if dry else _MAX_LAYERS,
            max_kv_bytes=_KV_BYTES,
        )
        shape = heads.shape(dtype, dtype)
        attention = PackedAttention(shape, inputs.q.device, executor=executor, policy="node")
        plan = attention.plan(inputs.batch.forest())
        attention.load(plan, inputs.req_to_token, inputs.req_pool_indices)
        self._run = partial(_run_layers, inputs, attention)
        self._num_layers = inputs.num_layers
        self._run()
        OutputCheck(inputs, seed)(inputs.out)
        self.facts = {
            "requests": requests,
            "tokens": tokens,
            "packs": self.num_packs,
            "lone_requests": batch,
            "lone_tokens": tokens if requests == 1 else _TAIL_TOKENS,
        }

    def layer_us(self) -> float:
        """Run all layers once; microseconds of one."""
        return host_seconds(self._run) / self._num_layers * 1e6


def _run_layers(inputs: AttentionInputs, attention: PackedAttention) -> None:
    """All layers of a step; the first one last, whose output can be compared."""
    for layer in reversed(range(inputs.num_layers)):
        k, v = inputs.k[layer], inputs.v[layer]
        attention.executor.run(inputs.q, k, v, inputs.out, None, inputs.params)


def measure_packs(
    executor: str, heads: Heads, dtype: torch.dtype, clock: Clock, seed: int
) -> dict[str, Any]:
    """Check and time packs of all sizes: what `schema.ProfileCase` has."""
    try:
        choose_executor(executor, torch.device("cpu"), dtype, dtype)
    except ValueError as error:
        raise NotRunError(str(error)) from None
    sizes = product(_REQUESTS[:3:2], _TOKENS[:1]) if clock.dry else product(_REQUESTS, _TOKENS)
    works = {
        f"{requests}x{tokens}": PackWork(
            executor, heads, dtype, requests, tokens, seed, dry=clock.dry
        )
        for requests, tokens in sizes
    }
    timers: dict[str, Callable[[], float]] = {name: w.layer_us for name, w in works.items()}
    rounds = clock.rounds_within(_SECONDS_PER_CASE)
    times = interleaved(timers, rounds, warmups=int(not clock.dry))
    return {
        "executor": executor,
        "heads": {"qo": heads.qo, "kv": heads.kv, "dim": heads.dim},
        "itemsize": dtype.itemsize,
        "packs": [
            work.facts | {"us": float(np.quantile(times[name], _QUANTILE)), "raw_us": times[name]}
            for name, work in works.items()
        ],
    }


def fit_profile(cases: Sequence[Mapping[str, Any]], read_bytes_per_s: float) -> dict[str, float]:
    """The constants of the cost model that explain the times of one executor's cases best.

    A byte costs what it costs at the measured bandwidth. All else is fitted by least squares over
    relative errors, and turned into the bytes that could be read meanwhile; what would come out
    negative costs nothing.

    Args:
        cases: of a result file, see `schema.ProfileCase`; at least one.
        read_bytes_per_s: of the machine, from its limits.

    Returns:
        :data:`~sglang_prefix.packing.cost.FITTED` with two significant digits, and "error", the
        mean relative error of the times that they predict.
    """
    byte_us = 1e6 / read_bytes_per_s
    rows, us = [], []
    for case in cases:
        for pack in case["packs"]:
            rows.append(_amounts(case, pack))
            us.append(pack["us"])
    amounts, times = np.array(rows), np.array(us)
    read_us = amounts[:, 0] * byte_us
    # The call comes last: it costs every plan the same, so no choice depends on it.
    columns = np.column_stack([amounts[:, 1:], np.ones(len(times))]) / times[:, None]
    costs = _least_squares(columns, 1 - read_us / times)
    error = float(np.abs(columns @ costs + read_us / times - 1).mean())
    fitted = dict(zip(FITTED, (costs[:-1] / byte_us).tolist(), strict=True))
    return {name: _rounded(value) for name, value in fitted.items()} | {"error": _rounded(error)}


def _amounts(case: Mapping[str, Any], pack: Mapping[str, Any]) -> list[float]:
    """What a plan has of KV bytes, and of each of :data:`FITTED`."""
    qo, kv, dim = (case["heads"][name] for name in ("qo", "kv", "dim"))
    shape = AttentionShape(qo, kv, dim, dim, case["itemsize"], case["itemsize"])
    lone = pack["lone_requests"] * pack["lone_tokens"]
    shared = pack["packs"] * pack["tokens"]
    in_packs = pack["packs"] * pack["requests"]
    return [
        (lone + shared) * shape.kv_token_bytes,
        pack["packs"],
        in_packs * (shape.query_bytes + shape.partial_bytes),
        (lone + shared) * 2 * kv * dim,
        lone * 2 * qo * dim,
        in_packs * pack["tokens"] * 2 * qo * dim,
    ]


def _least_squares(columns: NDArray[np.float64], goal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares without negative results: a column that would get one is left out."""
    scale = columns.max(axis=0, initial=0.0)
    scale[scale == 0] = 1.0
    found: NDArray[np.float64] = np.zeros(len(scale))
    used = list(range(len(scale)))
    while used:
        values = np.linalg.lstsq(columns[:, used] / scale[used], goal)[0]
        if values.min() >= 0:
            found[used] = values
            break
        del used[int(values.argmin())]
    found /= scale
    return found


def _rounded(value: float) -> float:
    """To two significant digits, fewer than two runs agree in."""
    return float(f"{value:.{_DIGITS}g}")


class ProfileRun(BenchRun):
    """The run of `bench profile`; it has no options."""

    kind, file_name = "bench-profile", "profile.json"

    def use(self, options: Mapping[str, Any]) -> None:
        """There are none."""

    def prepare(self) -> None:
        """Measure what the machine reads, which is the unit of all costs."""
        self._clock = clock_for(torch.device("cpu"), dry=self.data["dry"])
        reads = [self._clock.bandwidth() for _ in range(_READS)]
        self.data["limits"] = {"read_bytes_per_s": max(reads)}

    def cases(self) -> list[Case]:
        """Of both executors, all heads and dtypes; in a dry run small heads and one dtype."""
        dry = self.data["dry"]
        heads = ("4:2:16",) if dry else _HEADS
        return [
            Case(f"{executor}/{name}/{dtype}", executor, partial(self._measure, *key))
            for key in product(CPU_PROFILES, heads, _DTYPES[1:] if dry else _DTYPES)
            for executor, name, dtype in [key]
        ]

    def conclude(self) -> None:
        """Fit the profile of each executor of which there are cases."""
        profiles = {}
        for executor in CPU_PROFILES:
            cases = [case for case in self.data["cases"] if case["executor"] == executor]
            if cases:
                profiles[executor] = fit_profile(cases, self.data["limits"]["read_bytes_per_s"])
        self.data["profiles"] = profiles

    def _measure(self, executor: str, heads: str, dtype: str) -> dict[str, Any]:
        kind, seed = getattr(torch, dtype), self.data["seed"]
        return measure_packs(executor, Heads.parse(heads), kind, self._clock, seed)


def write_profiles(result_file: Path, table: Path = PROFILES_FILE) -> str:
    """Make a result file the table of CPU profiles.

    Returns:
        What was written, for a reader.

    Raises:
        ValueError: the file is no whole result of `bench profile`, a dry run's, for which ``table``
            must be another file, or stands outside the repository.
        OSError: the table cannot be written.
    """
    data = read_result(result_file, ProfileRun.kind)
    source = check_source(result_file, data, table, PROFILES_FILE)
    if missing := [*data["not_run"], *data["failed"]]:
        raise ValueError(f"{result_file} lacks {missing[0]}; legal: a run that measured all")
    profiles = {
        executor: {name: found[name] for name in FITTED}
        for executor, found in data["profiles"].items()
    }
    text = json.dumps({"result_file": source, "profiles": profiles}, indent=1) + "\n"
    write_checked(table, text, load_cpu_profiles)
    return f"{table}: the profiles of {', '.join(profiles)}; commit it with {result_file}"
