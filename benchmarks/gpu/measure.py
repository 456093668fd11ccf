"""One cell of gpu-bench: every candidate checked against the oracle, then timed, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.timing import Meter, wall_us
from benchmarks.gpu.workloads import Cell, Workload
from prefix_kernels.triton_executor import LAUNCH_MODES, MERGE_MODES
from sglang_prefix.bench.baselines import Baseline
from sglang_prefix.bench.output_check import OutputCheck
from sglang_prefix.bench.packed_attention import PackedAttention
from sglang_prefix.packing import POLICIES
from sglang_prefix.packing.layout import CostedPlan

__all__ = ["LAYERS", "OURS", "measure_cell"]

# Layers that share one plan, or one step's metadata: a usual depth for these head configurations.
LAYERS = 32
_SECONDS_PER_CELL = 1.2
_ROUNDS = 50

# (policy, launch mode, merge mode, launches fixed as in a graph that serves any plan).
OURS = (
    *(("pat", mode, merge, True) for mode in LAUNCH_MODES for merge in MERGE_MODES),
    *(
        (policy, mode, MERGE_MODES[0], True)
        for policy in POLICIES
        if policy != "pat"
        for mode in LAUNCH_MODES
    ),
    ("pat", LAUNCH_MODES[0], MERGE_MODES[0], False),
)


@dataclass
class _Candidate:
    """Something to time on a workload.

    Attributes:
        kind: "ours", "stock" or "other".
        run: one layer, from its caches to the output.
        host: what it does once per step before the layers, by name, in order.
        facts: what else goes into the result.
        append: what is captured once per step, in front of the layers.
    """

    kind: str
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    host: dict[str, Callable[[], object]]
    facts: dict[str, Any] = field(default_factory=dict)
    append: Callable[[], object] | None = None


def measure_cell(
    cell: Cell,
    device: torch.device,
    meter: Meter,
    limits: dict[str, Any],
    seed: int,
    baselines: dict[type[Baseline], str | None],
) -> dict[str, Any]:
    """Check and time all candidates on one cell.

    Args:
        cell: what to attend to.
        device, meter: where, and with which clock.
        limits: from :meth:`Meter.limits` of this run.
        seed: of the inputs.
        baselines: each with the reason why it is missing here, None if it is not.
    """
    workload = Workload.build(cell, device, seed, dry=meter.dry)
    results: dict[str, dict[str, Any]] = {}
    ready: dict[str, _Candidate] = {}
    replays: dict[str, Callable[[], object]] = {}
    check = OutputCheck(workload, seed)
    ours = _ours_in(cell, dry=meter.dry)
    for name, make in _makers(workload, ours, baselines).items():
        try:
            candidate = make()
            for step in candidate.host.values():
                step()
            workload.out.fill_(torch.nan)
            error = check(candidate.run(workload.k[0], workload.v[0]))
            replay = meter.replayable(_layers(candidate, workload))
        except _MissingError as missing:
            results[name] = {"status": "n/a", "reason": str(missing)}
        except Exception as error:  # of anyone's kernel: the others are still worth their time
            meter.synchronize()  # raises again where the device itself is lost
            reason = f"{type(error).__name__}: {error}"
            results[name] = {"status": "failed", "reason": reason[:500]}
        else:
            results[name] = {"status": "done", "kind": candidate.kind, "error": error}
            results[name] |= candidate.facts
            ready[name], replays[name] = candidate, replay
    append_us = _append_us(ready.values(), meter)
    rounds = meter.rounds_for(replays, _SECONDS_PER_CELL, _ROUNDS)
    for name, seconds in meter.interleaved(replays, rounds).items():
        host = {step: wall_us(work, meter) for step, work in ready[name].host.items()}
        results[name] |= _times(seconds, host, workload, ready[name].kind == "ours", append_us)
    floor = _floor(workload, limits)
    for name in ready:
        results[name]["over_floor"] = results[name]["kernel_us"] / floor["us"]
    cell_result: dict[str, Any] = {
        "status": "done",
        "shape": _shape(workload),
        "floor": floor,
        "candidates": results,
    }
    for name in (_name(*own) for own in ours):
        if results[name]["status"] == "failed":
            cell_result |= {"status": "failed", "reason": f"{name}: {results[name]['reason']}"}
    return cell_result


class _MissingError(Exception):
    """A baseline is not here, or cannot run this workload."""


def _ours_in(cell: Cell, *, dry: bool) -> list[tuple[str, str, str, bool]]:
    """What of ours is measured in a cell; in a dry run no policy but pat in every mode.

    Fitted launches are compiled for every length of pack: only where that tells something.
    """
    fitted = cell.group in ("rollouts", "fixed", "trees") and cell.heads.kv in (1, 8)
    fitted = fitted and cell.page_size == 1
    return [
        own
        for own in OURS
        if (own[-1] or fitted) and not (dry and own[0] != "pat" and own[1] != LAUNCH_MODES[0])
    ]


def _name(policy: str, mode: str, merge: str, fixed: bool) -> str:
    return f"{policy}/{mode}/{merge}" + ("" if fixed else "/fitted")


def _makers(
    workload: Workload,
    ours: list[tuple[str, str, str, bool]],
    baselines: dict[type[Baseline], str | None],
) -> dict[str, Callable[[], _Candidate]]:
    """What makes each candidate; may raise."""
    makers: dict[str, Callable[[], _Candidate]] = {
        _name(*own): lambda own=own: _ours(workload, *own)  # type: ignore[misc]
        for own in ours
    }
    for baseline, reason in baselines.items():
        makers[baseline.name] = lambda b=baseline, r=reason: _theirs(workload, b, r)  # type: ignore[misc]
    return makers


def _ours(w: Workload, policy: str, mode: str, merge: str, fixed: bool) -> _Candidate:
    shape = w.cell.heads.shape(w.q.dtype, w.k.dtype)
    attention = PackedAttention(shape, w.q.device, policy=policy, mode=mode, merge=merge)
    plan = attention.plan(w.batch.forest())
    if fixed:
        attention.fix_capacity([plan], w.req_to_token, w.rows, rows=w.batch.batch_size)
    plans: list[CostedPlan] = [plan]
    # The newest token again: the same lengths, the same slots.
    newest = w.req_to_token[w.rows, w.seq_lens - 1]

    def run(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attention.run(w.q, k, v, w.out, sm_scale=w.sm_scale)
        return w.out

    def make_plan() -> None:
        plans[0] = attention.plan(w.batch.forest())

    def load() -> None:
        attention.load(plans[0], w.req_to_token, w.rows)

    return _Candidate(
        "ours",
        run,
        {"plan": make_plan, "load": load},
        {"policy": policy, "mode": mode, "merge": merge, "fixed": fixed, **asdict(plan.stats())},
        lambda: attention.executor.append(w.seq_lens, newest),
    )


def _theirs(w: Workload, kind: type[Baseline], reason: str | None) -> _Candidate:
    reason = reason or kind.inapplicable(w)
    if reason:
        raise _MissingError(reason)
    baseline = kind(w)
    return _Candidate("stock" if kind.stock else "other", baseline.run, {"plan": baseline.plan})


def _layers(candidate: _Candidate, workload: Workload) -> Callable[[], None]:
    def run() -> None:
        for layer in range(workload.num_layers):
            candidate.run(workload.k[layer], workload.v[layer])

    return run


def _append_us(candidates: Iterable[_Candidate], meter: Meter) -> float:
    """Time of the append kernel, which is the same for all of ours."""
    append = next((c.append for c in candidates if c.append is not None), None)
    if append is None:
        return 0.0

    count = 1 if meter.dry else LAYERS

    def appends() -> None:
        for _ in range(count):
            append()

    replay = meter.replayable(appends)
    return median(meter.interleaved({"append": replay}, 5)["append"]) / count * 1e6


def _times(
    seconds: list[float],
    host: dict[str, list[float]],
    workload: Workload,
    ours: bool,
    append_us: float,
) -> dict[str, Any]:
    """Medians per layer in us, with and without what is done once per step or per plan."""
    kernel_us = median(seconds) / workload.num_layers * 1e6
    middle = {f"{step}_us": median(times) for step, times in host.items()}
    if ours:
        middle["append_us"] = append_us
    total = kernel_us + sum(middle.values()) / LAYERS
    return {
        "kernel_us": kernel_us,
        **middle,
        "total_us": total,  # a new plan in every step
        "total_kept_us": kernel_us + append_us / LAYERS if ours else total,  # the last step's plan
        "kernel_seconds": seconds,
        "host_us": host,
    }


def _shape(w: Workload) -> dict[str, Any]:
    return {
        "group": w.cell.group,
        "batch": w.batch.batch_size,
        **asdict(w.cell.heads),
        "dtype": str(w.q.dtype).removeprefix("torch."),
        "page_size": w.cell.page_size,
        "pages": "random order",
        "kv_tokens": int(w.batch.seq_lens.sum()),
        "kv_tokens_unique": w.unique_tokens,
        "kv_bytes_unique": w.kv_bytes_unique,
        "layers_per_replay": w.num_layers,
    }


def _floor(w: Workload, limits: dict[str, Any]) -> dict[str, float]:
    """What no kernel can beat: bytes, operations, one launch."""
    parts = {
        "bytes_us": w.floor_bytes / limits["read_bytes_per_s"] * 1e6,
        "flop_us": w.flop / limits["bf16_flop_per_s"] * 1e6,
        "launch_us": limits["empty_launch_us"],
    }
    return {"bytes": w.floor_bytes, "flop": w.flop, **parts, "us": max(parts.values())}
