"""What a decode step costs the host in the real engine: ``python -m benchmarks.cpu_engine FILE``.

Reads the backend's own clocks: those of steps that went on under their plan, of plans, and of the
hook around each forward pass. Nothing here is the time of attention.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["measure_engine"]

NEW_TOKENS = 60
# Rollouts: prompts of 8 groups, all samples of a group alike.
GROUPS, PROMPT_TOKENS = 8, 200


def measure_engine(num_requests: int) -> dict[str, Any]:
    """Run ``num_requests`` requests in a process of their own; microseconds per step and plan."""
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        job.write_text(json.dumps({"num_requests": num_requests, "model": folder}))
        command = [sys.executable, "-m", "benchmarks.cpu_engine", str(job), str(result)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        counters: dict[str, Any] = json.loads(result.read_text())
    per_plan = 1e6 / counters["plans"]
    return {
        "num_requests": num_requests,
        "counters": counters,
        "us": {
            "step that goes on under its plan (median)": counters["kept_step_us"],
            "hook around a forward pass (median)": counters["hook_us"],
            "plan, with slots and path call (mean)": per_plan * counters["plan_seconds"],
            "path call of it (mean)": per_plan * counters["path_seconds"],
        },
    }


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
        max_total_tokens=60_000,
        max_running_requests=job["num_requests"],
        mem_fraction_static=0.7,
        log_level="error",
    )
    groups = [
        [(7 * group + token) % 256 for token in range(PROMPT_TOKENS)] for group in range(GROUPS)
    ]
    prompts = [groups[request % GROUPS] for request in range(job["num_requests"])]
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    try:
        engine.generate(input_ids=prompts, sampling_params=sampling)
        state = engine.get_server_info()["internal_states"][0]
        result_file.write_text(json.dumps(state["sglang_prefix"][0]))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
