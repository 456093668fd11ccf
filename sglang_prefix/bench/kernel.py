"""`bench kernel`: decode attention of ours and of others, on the CPU and on a GPU alike.

Every output is checked against the oracle before it is timed; a provider that is wrong, or fails,
is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any

import torch

from prefix_kernels.executor import why_torch
from sglang_prefix.bench.cases import KernelOptions, kernel_cases
from sglang_prefix.bench.providers.base import ProviderMaker, check_memory
from sglang_prefix.bench.providers.find import find_providers
from sglang_prefix.bench.providers.ours import chains, our_providers
from sglang_prefix.bench.run import BenchRun, Case, NotRunError
from sglang_prefix.bench.settings import chosen_settings
from sglang_prefix.bench.targets import evaluate
from sglang_prefix.bench.timing import (
    Clock,
    clock_for,
    interleaved,
    prepare_each,
    undisturbed,
)
from sglang_prefix.bench.workloads.inputs import AttentionInputs, OutputCheck
from sglang_prefix.bench.workloads.registry import KernelCase

__all__ = ["KernelRun", "measure_case"]

_QUICK_SECONDS = 3.0
# On a GPU a step is as many layers as hold KV of their own in this many bytes, up to a usual depth.
_GPU_LAYERS = 32
_GPU_KV_BYTES = 6 << 30
_LIMITS = "what the machine reaches"
_WAITED = "waited"
_OUR_PREFIXES = ("native/", "torch/", "triton/", "chain/")

Progress = Callable[[str], None]


class KernelRun(BenchRun):
    """The run of `bench kernel`; its options are :class:`KernelOptions`."""

    kind, file_name = "bench-kernel", "kernel.json"
    _others: Mapping[str, ProviderMaker] = MappingProxyType({})
    _pace = 0.0  # seconds per element of KV, of the case before

    def use(self, options: Mapping[str, Any]) -> None:
        """Read the options, set torch's threads, find the cases."""
        try:
            self.options = KernelOptions(**options)
        except TypeError as error:
            raise ValueError(f"{self.path} cannot be resumed: options: {error}") from None
        self._cases = kernel_cases(self.options)
        if self.options.threads:
            torch.set_num_threads(self.options.threads)

    @property
    def order(self) -> list[str]:
        """As the user asked for them."""
        return [case.name for case in self._cases]

    def prepare(self) -> None:
        """Look for kernels of others, which imports SGLang, and measure the device's limits."""
        self._device = torch.device(self.data["environment"]["device"])
        self._host = "interpreter" if self.options.dry else self._device.type
        if not self.options.ours:
            self._others, self.data["absent"] = find_providers(self._host)
        dtypes = {getattr(torch, case.dtype) for case in self._cases}
        # Compiles it, the first time.
        reason = why_torch(self._device, torch.float32, torch.float32)
        self._is_compiled = self._host == "cpu" and reason is None
        if self._host == "cpu" and reason:
            self.data["absent"]["native"] = reason
        self._clock = clock_for(self._device, dry=self.options.dry)
        if self.options.quick:
            self._clock.seconds = min(self._clock.seconds, _QUICK_SECONDS)
        self.data["limits"] = self._clock.limits(*sorted(dtypes, key=str))

    def cases(self) -> list[Case]:
        """Small batches first, so that a budget leaves out the largest, except in a suite."""
        in_order = sorted(self._cases, key=lambda case: (case.rank, case.logical_elements))
        # On a GPU compiling takes most of the time, at any size.
        expected = self._expected_s if self._host == "cpu" else None
        return [
            Case(c.name, c.group, partial(self._measure, c), expected and partial(expected, c))
            for c in in_order
        ]

    def _expected_s(self, case: KernelCase) -> float:
        """By the time per element of KV of the case before."""
        return self._pace * case.logical_elements

    def conclude(self) -> None:
        """See what the project has promised."""
        self.data["targets"] = evaluate(self.data)

    def own_failures(self, case: Mapping[str, Any]) -> Mapping[str, str]:
        """Those of ours; others may fail."""
        return {n: why for n, why in case["failed"].items() if n.startswith(_OUR_PREFIXES)}

    def _measure(self, case: KernelCase) -> dict[str, Any]:
        if not self.options.dry:
            self._check_size(case)
        began = time.monotonic()
        measured = measure_case(
            case,
            self._providers(case),
            self._clock,
            self.data["limits"],
            seed=self.options.seed,
            rounds=self.options.rounds,
            progress=self.progress,
        )
        self._pace = (time.monotonic() - began) / case.logical_elements
        return measured

    def _providers(self, case: KernelCase) -> dict[str, ProviderMaker]:
        dry, policies = self.options.dry, self.options.policies
        if case.is_chain:
            if self._host == "cpu":
                raise NotRunError("needs a GPU: launches are measured")
            return chains(dry=dry)
        ours = our_providers(
            policies,
            self._host,
            compiled=self._is_compiled,
            all_launches=case.is_of_suite,
            settings=chosen_settings(self.options.settings),
            dry=dry,
        )
        return {**self._others, **ours}

    def _check_size(self, case: KernelCase) -> None:
        tokens, most = int(case.tree.length.sum()), self.options.max_tokens
        if most is not None and tokens > most:
            raise NotRunError(f"{tokens} KV tokens, over --max-tokens {most}")
        if self._device.type == "cpu":
            elements = tokens * case.heads.token_elements
            check_memory(elements * getattr(torch, case.dtype).itemsize, "KV")


class _Timed:
    """A provider whose output is right, ready to be timed.

    Args:
        make: makes the provider.
        inputs: of the case.
        check: compares its first layer with the oracle.
        clock: captures its layers.

    Raises:
        Exception: of anyone's kernel; NotRunError, MismatchError among them.
    """

    def __init__(
        self, make: ProviderMaker, inputs: AttentionInputs, check: OutputCheck, clock: Clock
    ) -> None:
        self.provider = provider = make(inputs)
        for part in provider.step_parts:
            getattr(provider, part)()
        inputs.out.fill_(torch.nan)
        out = provider.run(inputs.k[0], inputs.v[0])
        self.error = None if provider.kind == "chain" else check(out)
        self._clock = clock
        self._replay = clock.replayable(provider.run_layers)
        planner = provider
        if clock.device.type == "cuda" and provider.kind in ("stock", "peer"):
            # Its plan may move tensors whose addresses the graph has: one of its own makes them.
            planner = make(inputs)
        self._host = {part: getattr(planner, part) for part in provider.step_parts}
        self._alone = {
            part: clock.replayable(partial(_repeat, getattr(provider, part), clock.repeats))
            for part in provider.parts_alone
        }
        self._rounds = 0

    def step(self) -> dict[str, float]:
        """Time one step: seconds by part, "run" among them, and "step" for the whole; and "waited",
        how long threads waited for a core meanwhile.

        After the first rounds it is the run alone, where plans take too long.
        """
        clock = self._clock
        self._rounds += 1
        if self._rounds > clock.planned_rounds:
            return {"run": clock.seconds_of(self._replay), _WAITED: 0.0}
        before = clock.waited_seconds()
        parts = {part: clock.host_seconds_of(work) for part, work in self._host.items()}
        parts["run"] = clock.seconds_of(self._replay)
        parts["step"] = sum(parts.values())
        parts[_WAITED] = clock.waited_seconds() - before
        return parts | {part: clock.seconds_of(work) for part, work in self._alone.items()}


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def measure_case(
    case: KernelCase,
    makers: Mapping[str, ProviderMaker],
    clock: Clock,
    limits: Mapping[str, float],
    *,
    seed: int,
    rounds: int | None = None,
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """Check and time all providers on one batch.

    One whose output is wrong, or that fails, is not timed: it stands in "failed" with the reason.
    One that cannot run such a batch stands in "absent".

    Args:
        case: the batch.
        makers: providers by name.
        clock: of the device.
        limits: of the device, from :meth:`Clock.limits` of this run.
        seed: of the inputs.
        rounds: timed rounds; None for as many as fit.
        progress: is told what happens now, in a few words.

    Returns:
        What the result file has of a case, without its name and group: see `schema.KernelCase`.

    Raises:
        MemoryError, RuntimeError: memory does not suffice for the inputs, the oracle or a timed
            step.
    """
    progress("laying out")
    dtype = getattr(torch, case.dtype)
    on_gpu = clock.device.type == "cuda"
    inputs = AttentionInputs.lay_out(
        case.tree,
        case.heads,
        clock.device,
        seed,
        dtype=dtype,
        page_size=case.page_size,
        scattered=case.scattered,
        query_tokens=case.query_tokens,
        max_layers=_GPU_LAYERS if on_gpu and not case.is_chain else 1,
        max_kv_bytes=_GPU_KV_BYTES,
    )
    progress("oracle")
    check = OutputCheck(inputs, seed)
    timed = {name: partial(_Timed, make, inputs, check, clock) for name, make in makers.items()}
    ready, absent, failed = prepare_each(timed, clock, progress)
    works = {name: one.step for name, one in ready.items()}
    steps = interleaved(
        {**works, _LIMITS: lambda: {"read": clock.bandwidth(), "peak": clock.peak(dtype)}},
        rounds or clock.rounds_within(),
        warmups=0 if clock.dry else 1,
        progress=progress,
    )
    # Those of the run are of its beginning, and the clock of a processor goes up and down.
    reached = steps.pop(_LIMITS)
    reads, peaks = ([each[key] for each in reached] for key in ("read", "peak"))
    floor = _floor(
        inputs,
        flop_per_s=max(*peaks, limits[f"flop_per_s_{case.dtype}"]),
        bytes_per_s=max(*reads, limits["read_bytes_per_s"]),
        launch_us=limits["empty_launch_us"],
    )
    providers = {n: _facts(ready[n], steps[n], inputs, floor["us"], clock) for n in ready}
    tokens = {"ideal": inputs.unique_tokens, "logical": inputs.logical_tokens}
    return {
        "tree": case.notation,
        "note": case.note,
        "batch": inputs.batch.batch_size,
        "query_tokens": case.query_tokens,
        "heads": asdict(case.heads),
        "dtype": case.dtype,
        "page_size": case.page_size,
        "slots": "scattered" if case.scattered else "consecutive",
        "layers": inputs.num_layers,
        "tokens": tokens,
        "bytes": {name: count * inputs.token_bytes for name, count in tokens.items()},
        "flop": inputs.flop,
        "floor": floor,
        "target": case.target,
        "bandwidth_gb_s": median(reads) / 1e9,
        "absent": absent,
        "failed": failed,
        "providers": providers,
    }


def _floor(
    inputs: AttentionInputs, *, flop_per_s: float, bytes_per_s: float, launch_us: float
) -> dict[str, float]:
    """Time of a layer that no kernel can beat: bytes, operations, one launch."""
    kv_bytes = inputs.unique_tokens * inputs.token_bytes
    parts = {
        "bytes_us": (kv_bytes + inputs.q.nbytes + inputs.out.nbytes) / bytes_per_s * 1e6,
        "flop_us": inputs.flop / flop_per_s * 1e6,
        "launch_us": launch_us,
    }
    return {**parts, "us": max(parts.values())}


def _facts(
    timed: _Timed,
    steps: Sequence[Mapping[str, float]],
    inputs: AttentionInputs,
    floor_us: float,
    clock: Clock,
) -> dict[str, Any]:
    """A provider in the result file, without what needs the others."""
    provider = timed.provider
    waited = [step[_WAITED] for step in steps]
    quiet = undisturbed(waited, [step.get("step", step["run"]) for step in steps])
    counted = [steps[number] for number in quiet]
    found_ms = {part: [1e3 * s[part] for s in counted if part in s] for part in steps[0]}
    ms = {part: median(times) for part, times in found_ms.items()}
    kernel_us = 1e3 * ms["run"] / (provider.layers or inputs.num_layers)
    return {
        "kind": provider.kind,
        "executor": provider.executor or provider.name,
        **provider.facts,
        "ms": ms["step"],
        "raw_ms": [1e3 * step["step"] for step in steps if "step" in step],
        "waited_ms": [1e3 * each for each in waited],
        "disturbed": len(steps) - len(quiet),
        "plan_ms": ms.get("plan"),
        "copy_ms": ms.get("copy"),
        "append_ms": ms["append"] / clock.repeats if "append" in ms else None,
        "forward_ms": _forward_ms(found_ms["run"], found_ms.get("merge")),
        "merge_ms": ms.get("merge"),
        "kernel_us": kernel_us,
        "over_floor": None if provider.kind == "chain" else kernel_us / floor_us,
        "bytes_read": provider.kv_tokens_read * inputs.token_bytes,
        "kv_read_ratio": provider.kv_tokens_read / inputs.logical_tokens,
        "max_abs_error": timed.error,
    }


def _forward_ms(runs: Sequence[float], merges: Sequence[float] | None) -> float | None:
    """The run without its merge, which is timed elsewhere: noise can leave nothing of it."""
    pairs = zip(runs, merges or [0.0] * len(runs), strict=True)
    value = median(run - merge for run, merge in pairs)
    return value if value > 0 else None
