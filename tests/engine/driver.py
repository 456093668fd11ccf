"""Runs sections of requests on a real engine in a child process, and says what came out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_prefix.bench.engine import (
    EngineProcess,
    counter_difference,
    counters,
    engine_environment,
    flush,
)
from sglang_prefix.files import write_file
from tests.engine.trainer import Step, take_steps

MODE_FILE = "SGLANG_PREFIX_TEST_MODE_FILE"
HOLD_FILE = "SGLANG_PREFIX_TEST_HOLD_FILE"
# Most engines are up within 30 s and done within two minutes on two cores.
TIMEOUT_S = 1700


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
        mode: what ``hooks/controls.py`` does meanwhile.
        max_ratio: the share of the KV tokens that our decode may read at most. Such a section is
            compared with stock and with a control, see ``comparison`` in ``scenarios.py``.
        like: the section whose stock answers and control are this one's, too; itself if empty.
        one_batch: send all in one message, so that they are prefilled in one batch. SGLang
            does so for no beams, and not with DP attention.
        logprobs: ask for them; SGLang then mixes no prefill into a decode batch.
        input_logprobs: ask for those of the prompt too, from this token on. SGLang computes it
            from there on anew, whatever is cached.
        hold: the decode pass before which the scheduler is held until the first of ``steps`` has
            reached it; all engines then do the steps at the same tokens. Needs the hooks. 0 takes
            the steps before the requests are sent.
        steps: what a trainer does to the engine meanwhile, see ``trainer.py``; names of models
            stand for their folders.
    """

    name: str
    requests: tuple[Request, ...]
    mode: str = "none"
    max_ratio: float | None = None
    like: str = ""
    one_batch: bool = False
    logprobs: bool = True
    input_logprobs: int | None = None
    hold: int = 0
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """One engine start.

    Attributes:
        sections: run one after the other.
        engine: keyword arguments of ``sglang.Engine``; a draft model is named as ``model`` is.
        env: environment variables.
        hooks: modules of ``tests.engine.hooks`` that are loaded in the engine's processes.
        model: one of ``models.py``.
        needs: a feature of ``releases.py`` without which nothing is compared.
    """

    sections: tuple[Section, ...]
    engine: Mapping[str, Any]
    env: Mapping[str, str] = field(default_factory=dict)
    hooks: tuple[str, ...] = ("controls",)
    model: str = "llama"
    needs: str | None = None


@dataclass(frozen=True)
class SectionResult:
    """What came out of a section.

    Attributes:
        requests: by rid, "RID aborted" for one that the client aborts: output_ids, logprobs,
            input_logprobs, cached_tokens, finish (the type of the reason). With beams, output_ids
            are those of all beams, best first, and logprobs the scores of the beams. Without
            logprobs asked for, an empty list.
        counters: the backend's counters, what this section added to them.
    """

    requests: dict[str, dict[str, Any]]
    counters: dict[str, Any]


@dataclass(frozen=True)
class ScenarioResult:
    """What came out of an engine: its sections by name, and its log."""

    sections: dict[str, SectionResult]
    log: str


def run_scenario(scenario: Scenario, models: Mapping[str, str], folder: Path) -> ScenarioResult:
    """Run a scenario in a fresh process and wait for it.

    Args:
        scenario: what to run.
        models: folder of each model and adapter.
        folder: is made, for the log and for what steers the hooks.

    Raises:
        RuntimeError: the engine failed; the message ends with its log.
        TimeoutError: it took too long.
    """
    folder.mkdir(parents=True)
    mode, hold, log = (folder / name for name in ("mode", "hold", "log"))
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **scenario.env}
    settings |= {MODE_FILE: str(mode), HOLD_FILE: str(hold)}
    hooks = [f"tests.engine.hooks.{name}" for name in scenario.hooks]
    options = {
        "model_path": models[scenario.model],
        "device": "cpu",
        "dtype": "float32",
        "mem_fraction_static": 0.7,  # the pool is bounded by tokens; this only has to be enough
        "random_seed": 0,
        # One batch for the plug, as the default has it in 0.5.23; in 0.5.17 that is 2048.
        "chunked_prefill_size": 4096,
        "log_level": "info",
        **scenario.engine,
    }
    if (draft := options.get("speculative_draft_model_path")) is not None:
        options["speculative_draft_model_path"] = models[draft]
    if adapters := {r.lora for section in scenario.sections for r in section.requests if r.lora}:
        options["lora_paths"] = {name: models[name] for name in sorted(adapters)}
    deadline = time.monotonic() + TIMEOUT_S
    environment = engine_environment(settings, hooks=hooks)
    with EngineProcess(options, environment=environment, log=log) as engine:
        engine.wait_until_ready(deadline)
        # With SGLang's dummy weights a zeroed attention gives the same tokens.
        assert engine.description["load_format"] == "auto"
        sections = {}
        for section in scenario.sections:
            write_file(mode, section.mode)
            steps = tuple(tuple(models.get(word, word) for word in step) for step in section.steps)
            stepping = replace(section, steps=steps)
            found = engine.ask(f"{__name__}:run_section", deadline, section=stepping, hold=hold)
            sections[section.name] = SectionResult(**found)
    return ScenarioResult(sections, log.read_text(errors="replace"))


# In the engine's process.


def run_section(engine: Any, section: Section, hold: Path) -> dict[str, Any]:
    """Run a section; ``hold`` is the file that holds the scheduler, see ``hooks/controls.py``."""
    flush(engine)
    before = counters(engine)
    requests = engine.loop.run_until_complete(_run_requests(engine, section, hold))
    added = counter_difference(before, counters(engine))
    return {"requests": requests, "counters": added}


async def _run_requests(engine: Any, section: Section, hold: Path) -> dict[str, Any]:
    finished = 0
    progress = asyncio.Condition()
    results: dict[str, Any] = {}
    running: dict[str, asyncio.Lock] = {}

    async def serve(request: Request) -> None:
        nonlocal finished
        async with progress:
            await progress.wait_for(lambda: finished >= request.after)
        async with running.setdefault(request.rid, asyncio.Lock()):
            name = request.rid if request.abort_after is None else f"{request.rid} aborted"
            results[name] = await _generate(engine, request, section)
        async with progress:
            finished += 1
            progress.notify_all()

    async def serve_all() -> None:
        results.update(await _generate_together(engine, section))

    tasks: list[asyncio.Task[Any]] = []
    if section.hold:
        hold.write_text(str(section.hold))
    elif section.steps:
        await take_steps(engine, section.steps, hold)
    if section.one_batch:
        tasks.append(asyncio.create_task(serve_all()))
    else:
        tasks += [asyncio.create_task(serve(request)) for request in section.requests]
    if section.hold:
        tasks.append(asyncio.create_task(take_steps(engine, section.steps, hold)))
    await asyncio.gather(*tasks)
    return results


async def _generate(engine: Any, request: Request, section: Section) -> dict[str, Any]:
    width, abort_after = request.beam_width, request.abort_after
    several = {} if width is None else {"beam_width": width, "n": width}
    stream = await engine.async_generate(
        input_ids=list(request.prompt),
        sampling_params=_sampling(request) | several,
        return_logprob=section.logprobs and width is None,  # SGLang refuses the two together
        logprob_start_len=section.input_logprobs,
        stream=True,
        rid=request.rid,
        lora_path=request.lora,
    )
    chunk: dict[str, Any] = {}
    async for chunk in stream:
        if abort_after is not None and len(chunk["output_ids"]) >= abort_after:
            engine.tokenizer_manager.abort_request(request.rid)
            abort_after = None
    return _result(chunk, beams=width is not None)


async def _generate_together(engine: Any, section: Section) -> dict[str, Any]:
    """Results by id. SGLang sends token ids of several requests on in one message."""
    requests = section.requests
    adapters = [request.lora for request in requests]
    stream = await engine.async_generate(
        input_ids=[list(request.prompt) for request in requests],
        sampling_params=[_sampling(request) for request in requests],
        return_logprob=section.logprobs,
        logprob_start_len=section.input_logprobs,
        stream=True,
        rid=[request.rid for request in requests],
        lora_path=adapters if any(adapters) else None,
    )
    newest = {chunk["index"]: chunk async for chunk in stream}
    return {request.rid: _result(newest[i]) for i, request in enumerate(requests)}


def _sampling(request: Request) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": request.max_new_tokens, "ignore_eos": True}


def _result(chunk: dict[str, Any], *, beams: bool = False) -> dict[str, Any]:
    """What came of a request, by the last that was heard of it."""
    meta = chunk["meta_info"]
    if beams:
        output_ids = [token for beam in meta["beam_results"] for token in beam["output_ids"]]
        logprobs = [beam["meta_info"]["sequence_score"] for beam in meta["beam_results"]]
    else:
        output_ids = chunk["output_ids"]
        logprobs = [entry[0] for entry in meta.get("output_token_logprobs", ())]
    return {
        "output_ids": output_ids,
        "logprobs": logprobs,
        # The first token has none.
        "input_logprobs": [entry[0] for entry in (meta.get("input_token_logprobs") or ())[1:]],
        # SGLang leaves it out where a request was aborted while it waited to run again.
        "cached_tokens": meta.get("cached_tokens"),
        "finish": (meta["finish_reason"] or {}).get("type"),
    }
