"""What a decode step costs the host in the real engine: ``python -m benchmarks.cpu_engine FILE``.

Two engines. One does its arithmetic on the CPU; the backend's own clocks are read, those of steps
that went on under their plan, of plans, and of the hook around each forward pass. The other runs
SGLang's graph runner with graphs that do nothing (``host_hooks``), so that the CPU does what it
does beside a GPU, and all of our code in a step is on the clock. Nothing here is the time of
attention.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["measure_engine", "measure_host"]

ROOT = Path(__file__).parents[1]
HOOKS = Path(__file__).parent / "host_hooks"
MIN_KEPT_STEPS = 100

NEW_TOKENS = 240
# Of the first requests, one after another ends early, so that the rest is planned anew.
ENDS_EARLY = range(20, 220, 8)
# Rollouts: prompts of 8 groups, all samples of a group alike.
GROUPS, PROMPT_TOKENS = 8, 200


def measure_engine(num_requests: int) -> dict[str, Any]:
    """Run ``num_requests`` requests with the model's arithmetic on the CPU; microseconds."""
    counters, _ = _run(num_requests, {}, {})
    per_plan = 1e6 / counters["plans"]
    return {
        "num_requests": num_requests,
        "counters": counters,
        "us": {
            "step that goes on under its plan (median)": counters["reused_step_us"],
            "hook around a forward pass (median)": counters["hook_us"],
            "plan, with slots and path call (mean)": per_plan * counters["plan_seconds"],
            "path call of it (mean)": per_plan * counters["path_seconds"],
        },
    }


def measure_host(num_requests: int) -> dict[str, Any]:
    """The same with the device elsewhere: microseconds of all our code in a decode step."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HOOKS), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "SGLANG_PREFIX_HOST_TIMES_BATCH": str(num_requests),
        "SGLANG_PREFIX_EXECUTOR": "triton",
        "SGLANG_PREFIX_GATE": "always",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",  # what is left of the device's work: copies and memory sets
    }
    options = {"torch_compile_max_bs": num_requests}  # which bounds graphs on the CPU
    counters, steps = _run(num_requests, options, environment)
    if len(steps["kept"]) < MIN_KEPT_STEPS:
        raise RuntimeError(
            f"only {len(steps['kept'])} steps went on under their plan: not reported"
        )
    microseconds = {name: 1e6 * median(seconds) for name, seconds in steps.items() if seconds}
    return {
        "num_requests": num_requests,
        "counters": counters,
        "steps": {name: len(seconds) for name, seconds in steps.items()},
        "seconds": steps,
        "us": {
            "step that goes on under its plan, all hooks (median)": microseconds["kept"],
            "step that plans, all hooks (median)": microseconds["planned"],
        },
    }


def _run(
    num_requests: int, options: dict[str, Any], environment: dict[str, str]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Run one engine in a process of its own; the backend's counters, and the hook's times."""
    with tempfile.TemporaryDirectory() as folder:
        job, result, times = (Path(folder, name) for name in ("job.json", "result.json", "times"))
        times.write_text("{}")
        job.write_text(
            json.dumps({"num_requests": num_requests, "model": folder, "engine": options})
        )
        command = [sys.executable, "-m", "benchmarks.cpu_engine", str(job), str(result)]
        if environment:
            environment = environment | {"SGLANG_PREFIX_HOST_TIMES_FILE": str(times)}
        run = subprocess.run(
            command,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if run.returncode:
            raise RuntimeError(
                f"the engine ended with status {run.returncode}:\n{run.stdout[-4000:]}"
            )
        return json.loads(result.read_text()), json.loads(times.read_text())


def main(job_file: Path, result_file: Path) -> None:
    """Run one engine; write its counters."""
    import sglang

    from sglang_prefix.tiny_model import build_tiny_model

    job = json.loads(job_file.read_text())
    build_tiny_model(job["model"])
    engine = sglang.Engine(
        model_path=job["model"],
        device="cpu",
        dtype="float32",
        attention_backend="prefix",
        max_total_tokens=80_000,
        max_running_requests=job["num_requests"],
        mem_fraction_static=0.7,
        log_level="error",
        **job["engine"],
    )
    groups = [
        [(7 * group + token) % 256 for token in range(PROMPT_TOKENS)] for group in range(GROUPS)
    ]
    prompts = [groups[request % GROUPS] for request in range(job["num_requests"])]
    ends = [*ENDS_EARLY, *[NEW_TOKENS] * len(prompts)]
    sampling = [
        {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        for tokens, _ in zip(ends, prompts, strict=False)
    ]
    try:
        engine.generate(input_ids=prompts, sampling_params=sampling)
        state = engine.get_server_info()["internal_states"][0]
        result_file.write_text(json.dumps(state["sglang_prefix"][0]))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
