"""What a decode step costs the host in the real engine.

Two engines. One does the model's arithmetic on the CPU, and the backend's own clocks are read: of
steps that reuse their plan, of plans, and of the hook around each forward pass. The other runs
SGLang's graph runner with graphs that do nothing (`hooks.step_clock`), so that the CPU does what it
does beside a GPU, and all of our code in a step is on the clock. Neither is the time of attention.

Where asked to, a real model as well: its decode step on the CPU, and attention's part of it, by
stock and by our executors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sglang_prefix.bench.engine import EngineProcess, counters, engine_environment, greedy
from sglang_prefix.bench.hooks import step_clock
from sglang_prefix.bench.model_step import NUM_REQUESTS, measure_model
from sglang_prefix.bench.run import BenchRun, Case
from sglang_prefix.files import read_json, write_file
from sglang_prefix.tiny_model import build_tiny_model

__all__ = ["HostRun", "decode_rollouts"]

MIN_REUSED_STEPS = 100
_ENGINE_REQUESTS = 256

# Most microseconds by group of cases, number of requests and stage of "us".
_REUSED_STEP = "step that reuses its plan, all hooks (median)"
TARGETS_US = {
    ("planning", 256): {
        "plan_batch": 300,
        "plan_batch_newcomers": 300,
        "native_load": 300,
        "native_step": 20,
        "reused_step": 20,
        "reused_verify_step": 30,
        "native_layers": 300,
    },
    ("planning", 1024): {"plan_batch": 1000, "plan_batch_newcomers": 1000},
    ("host", 256): {_REUSED_STEP: 20},
}

NEW_TOKENS = 240
# Of the first requests, one after another ends early, so that the batch is planned anew.
ENDS_EARLY = range(20, 220, 8)
# Rollouts: prompts of 8 groups, all samples of a group alike.
GROUPS, PROMPT_TOKENS = 8, 200


class HostRun(BenchRun):
    """The run of `bench host`: planning alone, then a decode step in the real engine.

    Options are "requests" of the batches that are planned, "rounds", and whether to start an
    "engine" and one with a real "model", which take most of the time.
    """

    kind, file_name = "bench-host", "host.json"

    def use(self, options: Mapping[str, Any]) -> None:
        """Keep them."""
        try:
            self._requests = [int(count) for count in options["requests"]]
            self._rounds, self._engine = int(options["rounds"]), bool(options["engine"])
            self._model = bool(options.get("model", False))  # older files have none
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be resumed: options: {error!r}") from None

    def cases(self) -> list[Case]:
        """Planning of every size, then the two engines."""
        found = [("planning", n, self._plan) for n in self._requests]
        if self._engine:
            found.append(("engine", _ENGINE_REQUESTS, _measure_engine))
            found.append(("host", _ENGINE_REQUESTS, _measure_host))
        if self._model:
            found.append(("model", NUM_REQUESTS, measure_model))
        return [Case(f"{group}/{n}", group, partial(measure, n)) for group, n, measure in found]

    def conclude(self) -> None:
        """Compare what was measured with :data:`TARGETS_US`."""
        cases = {(case["group"], case["num_requests"]): case for case in self.data["cases"]}
        self.data["targets"] = {
            f"{group}/{n}: {stage}": _target(cases.get((group, n)), stage, most)
            for (group, n), stages in TARGETS_US.items()
            for stage, most in stages.items()
        }

    def _plan(self, num_requests: int) -> dict[str, Any]:
        from sglang_prefix.bench.planning import measure_planning

        return measure_planning(num_requests, self._rounds, self.data["seed"])


def _target(case: Mapping[str, Any] | None, stage: str, most_us: float) -> dict[str, Any]:
    value = case["us"].get(stage) if case else None
    status = "not measured" if value is None else "met" if value <= most_us else "missed"
    return {"value": value, "status": status, "meaning": f"at most {most_us} us"}


def _measure_engine(num_requests: int) -> dict[str, Any]:
    """Decode with the model's arithmetic on the CPU: what `schema.HostCase` has of a case."""
    found, _ = _decode(num_requests, is_device_elsewhere=False)
    per_plan = 1e6 / found["plans"]
    times = {
        "step that reuses its plan (median)": found["reused_step_us"],
        "hook around a forward pass (median)": found["hook_us"],
        "plan, with slots and path call (mean)": per_plan * found["plan_seconds"],
        "path call of it (mean)": per_plan * found["path_seconds"],
    }
    return {"num_requests": num_requests, "counters": found, "us": times}


def _measure_host(num_requests: int) -> dict[str, Any]:
    """The same with the device elsewhere, and all our code in a decode step on the clock.

    Raises:
        RuntimeError: too few steps reused their plan for a median.
    """
    found, steps = _decode(num_requests, is_device_elsewhere=True)
    if len(steps["reused"]) < MIN_REUSED_STEPS:
        raise RuntimeError(f"only {len(steps['reused'])} steps reused their plan: not reported")
    times = {
        _REUSED_STEP: 1e6 * median(steps["reused"]),
        "step that plans, all hooks (median)": 1e6 * median(steps["planned"]),
    }
    return {"num_requests": num_requests, "counters": found, "seconds": steps, "us": times}


def _decode(num_requests: int, *, is_device_elsewhere: bool) -> tuple[dict[str, Any], Any]:
    """Decode the rollouts in one engine: the backend's counters, and what the clock has written."""
    arguments = {
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "prefix",
        "max_total_tokens": 80_000,
        "max_running_requests": num_requests,
        "mem_fraction_static": 0.7,
        "log_level": "error",
    }
    settings = {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        model, times, log = (Path(name, part) for part in ("model", "times.json", "log"))
        write_file(times, '{"reused": []}')
        if is_device_elsewhere:
            arguments["torch_compile_max_bs"] = num_requests  # which bounds graphs on the CPU
            settings |= {
                step_clock.FILE_VARIABLE: str(times),
                step_clock.BATCH_VARIABLE: str(num_requests),
                "SGLANG_PREFIX_EXECUTOR": "triton",
                "SGLANG_PREFIX_GATE": "always",
                "TRITON_INTERPRET": "1",
                "OMP_NUM_THREADS": "1",  # of the device's work, copies and memory sets are left
            }
        build_tiny_model(model)
        with EngineProcess(
            arguments | {"model_path": str(model)},
            environment=engine_environment(
                settings, hooks=[step_clock.__name__] if is_device_elsewhere else []
            ),
            log=log,
        ) as engine:
            found = engine.ask(f"{__name__}:decode_rollouts", num_requests=num_requests)
            return found, read_json(times)


def decode_rollouts(engine: Any, num_requests: int) -> dict[str, Any]:
    """Decode all requests at once, of which some end early; in the engine's process."""
    groups = [
        [(7 * group + token) % 256 for token in range(PROMPT_TOKENS)] for group in range(GROUPS)
    ]
    prompts = [groups[request % GROUPS] for request in range(num_requests)]
    ends = [*ENDS_EARLY, *[NEW_TOKENS] * num_requests][:num_requests]
    engine.generate(input_ids=prompts, sampling_params=[*map(greedy, ends)])
    return counters(engine)
