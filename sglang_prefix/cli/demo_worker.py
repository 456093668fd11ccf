"""One engine of the demo, in a process of its own: ``python -m sglang_prefix.cli.demo_worker DIR``.

Reads ``DIR/job.json``, appends what happens to ``DIR/events.jsonl``, writes ``DIR/result.json``.

Engine processes are spawned and so import this module again. That is how the control gets into
the scheduler: while ``DIR/control`` exists, packed decode gives zeros. A demo that could not tell
would prove nothing by equal tokens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

_CONTROL_FILE = "SGLANG_PREFIX_DEMO_CONTROL_FILE"


def _install_control() -> None:
    """Wrap the plan runner; does nothing in processes that are not the demo's."""
    path = os.environ.get(_CONTROL_FILE)
    if path is None:
        return
    from sglang_prefix.runner import PlanRunner

    original = PlanRunner.run

    def run(self: PlanRunner, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if os.path.exists(path):
            args[3].zero_()  # the output

    PlanRunner.run = run  # type: ignore[method-assign]


if __name__ == "__mp_main__":
    _install_control()


def _die_with_parent() -> None:
    """Kill this process group, engine and all, when the other end of standard input closes."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def main(directory: Path) -> None:
    """Run the job in ``directory``. Must lead a process group of its own."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    job = json.loads((directory / "job.json").read_text())
    events = (directory / "events.jsonl").open("a", buffering=1)

    def tell(event: str) -> None:
        events.write(json.dumps({"event": event}) + "\n")

    control = directory / "control"
    if job["control"]:
        os.environ[_CONTROL_FILE] = str(control)
    import sglang

    tell("start")
    engine = sglang.Engine(**job["engine"])
    try:
        tell("warming up")
        first, _ = _generate(engine, job)
        decode_seconds = []
        for number in range(job["rounds"]):
            tell(f"round {number + 1} of {job['rounds']}")
            outputs, seconds = _generate(engine, job)
            decode_seconds.append(seconds)
            if outputs != first:
                raise RuntimeError("greedy decoding gave other tokens the second time")
        state = engine.get_server_info()["internal_states"][0]
        result = {
            "output_ids": outputs,
            "decode_seconds": decode_seconds,
            "counters": state.get("sglang_prefix", []),
        }
        if job["control"]:
            tell("control")
            control.touch()
            result["control_output_ids"], _ = _generate(engine, job)
        (directory / "result.json").write_text(json.dumps(result))
        tell("done")
    finally:
        engine.shutdown()


def _generate(engine: Any, job: dict[str, Any]) -> tuple[list[list[int]], float]:
    """Output ids of all requests, and the seconds from the last first token to the end.

    Prefill is the stock backend's on both sides; what is timed is decode at the full batch.
    """
    sampling = {"temperature": 0, "max_new_tokens": job["new_tokens"], "ignore_eos": True}
    outputs: dict[int, list[int]] = {}
    began = time.perf_counter()
    chunks = engine.generate(input_ids=job["prompts"], sampling_params=sampling, stream=True)
    for chunk in chunks:
        if chunk["index"] not in outputs:
            began = time.perf_counter()
        outputs[chunk["index"]] = chunk["output_ids"]
    return [outputs[index] for index in sorted(outputs)], time.perf_counter() - began


if __name__ == "__main__":
    main(Path(sys.argv[1]))
