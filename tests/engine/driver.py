"""One real engine in a process of its own: runs sections of requests, writes what came out.

The tests call :func:`run_scenario`; it starts this file as a program in its own session, because
SGLang's launcher kills the whole process tree that it finds itself in when an engine fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.engine.trainer import Step, take_steps

HOOKS = Path(__file__).parent / "hooks"
ROOT = Path(__file__).parents[2]
MODE_FILE = "SGLANG_PREFIX_TEST_MODE_FILE"
HOLD_FILE = "SGLANG_PREFIX_TEST_HOLD_FILE"
# Most engines are up within 30 s and done within 60 s on two cores.
TIMEOUT_S = 600


@dataclass(frozen=True)
class Request:
    """One request of a workload.

    Attributes:
        rid: its id; a repeated one is sent when the first of that id is done.
        prompt: token ids.
        max_new_tokens: tokens to generate, never fewer, since the end token is ignored.
        after: joins when this many requests of the section have finished.
        abort_after: aborted by the client when it has this many tokens.
        beam_width: beam search with this many beams, all of which come back.
        lora: name of the adapter.
    """

    rid: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    after: int = 0
    abort_after: int | None = None
    beam_width: int | None = None
    lora: str | None = None


@dataclass(frozen=True)
class Section:
    """Requests that run together on a flushed engine.

    Attributes:
        name: key of the result.
        requests: what is sent.
        mode: what ``hooks/sitecustomize.py`` does meanwhile.
        one_batch: send all at once behind a prefill that keeps the scheduler busy, so that they
            are prefilled in one batch.
        logprobs: ask for them; SGLang then mixes no prefill into a decode batch.
        input_logprobs: ask for those of the prompt too.
        hold: the decode pass before which the scheduler is held until the first of ``steps`` has
            reached it; all engines then do the steps at the same tokens. Needs the hooks. 0 takes
            the steps before the requests are sent.
        steps: what a trainer does to the engine meanwhile, see ``trainer.py``.
    """

    name: str
    requests: tuple[Request, ...]
    mode: str = "none"
    one_batch: bool = False
    logprobs: bool = True
    input_logprobs: bool = False
    hold: int = 0
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """One engine start.

    Attributes:
        model: folder of the model.
        sections: run one after the other.
        engine: keyword arguments of ``sglang.Engine``.
        env: environment variables.
        hooks: whether ``hooks/sitecustomize.py`` is loaded in the engine's processes.
    """

    model: str
    sections: tuple[Section, ...]
    engine: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    hooks: bool = False


@dataclass(frozen=True)
class SectionResult:
    """What came out of a section.

    Attributes:
        requests: by rid, "RID aborted" for one that the client aborts: output_ids, logprobs,
            input_logprobs, cached_tokens, finish (the type of the reason). With beams, output_ids
            are those of all beams, best first, and logprobs the scores of the beams. Without
            logprobs asked for, an empty list.
        counters: the backend's counters, what this section added to them.
        load_format: how the engine got its weights; "dummy" ones would prove nothing.
    """

    requests: dict[str, dict[str, Any]]
    counters: dict[str, Any]
    load_format: str


@dataclass(frozen=True)
class ScenarioResult:
    """What came out of an engine: its sections by name, its log, the seconds that it took."""

    sections: dict[str, SectionResult]
    log: str
    seconds: float


def run_scenario(scenario: Scenario, folder: Path) -> ScenarioResult:
    """Run a scenario in a fresh process and wait for it.

    Raises:
        RuntimeError: the engine failed or took too long; the message ends with its log.
    """
    folder.mkdir(parents=True)
    (folder / "scenario.json").write_text(json.dumps(asdict(scenario)))
    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.driver", str(folder)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=engine_environment(scenario, folder),
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill_session(process)
    text = (folder / "log").read_text(errors="replace")
    if status != 0 or not (folder / "result.json").exists():
        raise RuntimeError(f"engine ended with status {status}:\n{text[-6000:]}")
    found = json.loads((folder / "result.json").read_text())
    sections = {name: SectionResult(**section) for name, section in found.items()}
    return ScenarioResult(sections, text, time.monotonic() - began)


def engine_environment(scenario: Scenario, folder: Path) -> dict[str, str]:
    """The environment of a scenario: what ``sglang-prefix exec`` would set, and the hooks."""
    from sglang_prefix.cli.exec import find_sgl_kernel, sglang_environment

    base = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_PREFIX_")}
    env = sglang_environment(find_sgl_kernel(), base)
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", MODE_FILE: str(folder / "mode")}
    env |= {HOLD_FILE: str(folder / "hold")}
    if scenario.hooks:
        env["PYTHONPATH"] = os.pathsep.join([str(HOOKS), env.get("PYTHONPATH", "")])
    return env | dict(scenario.env)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what a process started with ``start_new_session`` has left behind, and itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A TCP port that nothing listens on, nor on the next, and far from others that this returns.

    With DP attention the processes of an engine talk on ports from 233 above it on. Ports that the
    system hands out for connections, from 32768 on, may be taken between the choice and their use.
    """
    bases = list(range(10_000, 32_000, 275))
    random.SystemRandom().shuffle(bases)
    for port in bases:
        if all(map(_is_free, (port, port + 1, *range(port + 233, port + 243)))):
            return port
    raise RuntimeError("no free TCP port between 10000 and 32000")


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        return listener.connect_ex(("127.0.0.1", port)) != 0


def main() -> None:
    """Run the scenario in the folder that is the only argument."""
    import sglang

    folder = Path(sys.argv[1])
    scenario = json.loads((folder / "scenario.json").read_text())
    port = free_port()
    options = {
        "device": "cpu",
        "dtype": "float32",
        "mem_fraction_static": 0.7,  # the pool is bounded by tokens; this only has to be enough
        "random_seed": 0,
        # One batch for the plug, as the default has it in 0.5.23; in 0.5.17 that is 2048.
        "chunked_prefill_size": 4096,
        "log_level": "info",
        "port": port,  # with DP attention, processes of an engine talk on ports from here on
        "nccl_port": port + 1,  # left to itself, SGLang before 0.5.22 takes one that may be gone
    } | scenario["engine"]
    engine = sglang.Engine(model_path=scenario["model"], **options)
    (folder / "mode").write_text("none")
    results = {}
    for section in scenario["sections"]:
        assert engine.flush_cache().success
        (folder / "mode").write_text(section["mode"])
        before = _counters(engine)
        requests = engine.loop.run_until_complete(_run_section(engine, section, folder / "hold"))
        counters = _difference(before, _counters(engine))
        results[section["name"]] = {
            "requests": requests,
            "counters": counters,
            "load_format": engine.server_args.load_format,
        }
    (folder / "unfinished.json").write_text(json.dumps(results))
    (folder / "unfinished.json").rename(folder / "result.json")
    engine.shutdown()


async def _run_section(engine: Any, section: dict[str, Any], hold: Path) -> dict[str, Any]:
    finished = 0
    progress = asyncio.Condition()
    results: dict[str, Any] = {}
    running: dict[str, asyncio.Lock] = {}

    async def serve(request: dict[str, Any]) -> None:
        nonlocal finished
        async with progress:
            await progress.wait_for(lambda: finished >= request["after"])
        async with running.setdefault(request["rid"], asyncio.Lock()):
            name = request["rid"] if request["abort_after"] is None else f"{request['rid']} aborted"
            results[name] = await _generate(
                engine, request, section["logprobs"], section["input_logprobs"]
            )
        async with progress:
            finished += 1
            progress.notify_all()

    tasks: list[asyncio.Task[Any]] = []
    if section["hold"]:
        hold.write_text(str(section["hold"]))
    elif section["steps"]:
        await take_steps(engine, section["steps"], hold)
    if section["one_batch"]:
        plug = asdict(Request("plug", (3,) * 4000, 1))
        tasks.append(asyncio.create_task(_generate(engine, plug)))
        await asyncio.sleep(0.25)  # its prefill takes about a second
    tasks += [asyncio.create_task(serve(request)) for request in section["requests"]]
    if section["hold"]:
        tasks.append(asyncio.create_task(take_steps(engine, section["steps"], hold)))
    await asyncio.gather(*tasks)
    return results


async def _generate(
    engine: Any,
    request: dict[str, Any],
    wants_logprobs: bool = True,
    wants_input_logprobs: bool = False,
) -> dict[str, Any]:
    beam_width = request["beam_width"]
    stream = await engine.async_generate(
        input_ids=list(request["prompt"]),
        sampling_params={
            "temperature": 0,
            "max_new_tokens": request["max_new_tokens"],
            "ignore_eos": True,
        }
        | ({} if beam_width is None else {"beam_width": beam_width, "n": beam_width}),
        return_logprob=wants_logprobs and beam_width is None,  # SGLang refuses the two together
        logprob_start_len=0 if wants_input_logprobs else None,
        stream=True,
        rid=request["rid"],
        lora_path=request["lora"],
    )
    chunk: dict[str, Any] = {}
    abort_after = request["abort_after"]
    async for chunk in stream:
        if abort_after is not None and len(chunk["output_ids"]) >= abort_after:
            engine.tokenizer_manager.abort_request(request["rid"])
            abort_after = None
    meta = chunk["meta_info"]
    if beam_width is None:
        output_ids = chunk["output_ids"]
        logprobs = [entry[0] for entry in meta.get("output_token_logprobs", ())]
    else:
        beams = meta["beam_results"]
        output_ids = [token for beam in beams for token in beam["output_ids"]]
        logprobs = [beam["meta_info"]["sequence_score"] for beam in beams]
    return {
        "output_ids": output_ids,
        "logprobs": logprobs,
        # The first token has none.
        "input_logprobs": [entry[0] for entry in (meta.get("input_token_logprobs") or ())[1:]],
        # SGLang leaves it out where a request was aborted while it waited to run again.
        "cached_tokens": meta.get("cached_tokens"),
        "finish": (meta["finish_reason"] or {}).get("type"),
    }


def _counters(engine: Any) -> dict[str, Any]:
    states = engine.get_server_info()["internal_states"][0].get("sglang_prefix", [{}])
    assert len(states) == 1  # one model runner of the first rank, hence one backend
    return dict(states[0])


# Not counted up.
_STATES = (
    "delegated_layers",
    "num_packs",
    "num_partials",
    "predicted_packed_us",
    "predicted_stock_us",
    "reused_step_us",
    "hook_us",
)


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    for name, value in after.items():
        if name in _STATES:
            delta[name] = value
        elif name.endswith("_reasons"):
            old = before.get(name, {})
            delta[name] = {k: n - old.get(k, 0) for k, n in value.items() if n > old.get(k, 0)}
        elif name != "kv_read_ratio":
            delta[name] = value - before.get(name, 0)
    if delta.get("kv_tokens_logical"):
        delta["kv_read_ratio"] = delta["kv_tokens_read"] / delta["kv_tokens_logical"]
    return delta


if __name__ == "__main__":
    main()
