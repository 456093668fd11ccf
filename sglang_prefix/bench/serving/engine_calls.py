"""What `bench serving --engine` asks of an engine: functions that run in its process.

They take the engine, the prompts of a load as token ids, and what each request generates. See
:class:`sglang_prefix.bench.engine.EngineProcess`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from itertools import pairwise
from random import Random
from typing import Any

from sglang_prefix.bench.engine import counter_difference, counters, flush, greedy

__all__ = ["churn", "decode", "full_batch", "logprobs", "prepare", "top_logprobs"]

Prompts = list[list[int]]

_WARM_TOKENS = 8
_TOP = 5
# Requests of `churn` that come after the first of the load, for each of these.
_CHURN_FACTOR = 8


def prepare(engine: Any, prompts: Prompts, tokens: int) -> None:
    """Empty the cache, fill it with the prompts of a load, decode a little at full batch."""
    flush(engine)
    distinct = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    for some, num_tokens in ((distinct[:1], 1), (distinct[1:], 1), (prompts, _WARM_TOKENS)):
        if some:
            engine.generate(input_ids=some, sampling_params=greedy(num_tokens))


def decode(engine: Any, prompts: Prompts, tokens: int) -> dict[str, Any]:
    """Time the steps of a load at full batch; the last request reports every token."""
    *others, last = prompts
    times: list[tuple[float, int]] = []
    before = counters(engine)
    work = [_generate(engine, prompt, tokens) for prompt in others]
    work.append(_generate(engine, last, tokens, times))
    done = _run(engine, work)
    return {
        "step_us": full_batch(times, [one["finished"] for one in done]),
        "cached_tokens": min(one["meta_info"]["cached_tokens"] for one in done),
        "counters": counter_difference(before, counters(engine)),
    }


def logprobs(engine: Any, prompts: Prompts, tokens: int, together: bool) -> dict[str, Any]:
    """Greedy answers, all at once or one by one.

    Returns:
        "answers": by request and position the log probabilities of the first tokens, the chosen
        one first. "counters": what was added to them.
    """
    before = counters(engine)
    asked = {"sampling_params": greedy(tokens), "return_logprob": True, "top_logprobs_num": _TOP}
    if together:
        done = engine.generate(input_ids=prompts, **asked)
    else:
        done = [engine.generate(input_ids=prompt, **asked) for prompt in prompts]
    answers = [top_logprobs(one["meta_info"]) for one in done]
    return {"answers": answers, "counters": counter_difference(before, counters(engine))}


def top_logprobs(meta_info: Mapping[str, Any]) -> list[dict[str, float]]:
    """Log probabilities of the first tokens at each position, the chosen token first."""
    chosen, tops = (meta_info[f"output_{name}_logprobs"] for name in ("token", "top"))
    # JSON has no integer keys.
    return [
        {str(token[1]): token[0]} | {str(entry[1]): entry[0] for entry in top}
        for token, top in zip(chosen, tops, strict=True)
    ]


def churn(engine: Any, prompts: Prompts, tokens: int) -> dict[str, Any]:
    """Let requests of uneven lengths join as others leave, never more at once than in the load."""
    rng = Random(str(prompts))
    least, most = tokens // 2, tokens * 3 // 2
    places = asyncio.Semaphore(len(prompts))
    before = counters(engine)

    async def one(prompt: list[int], num_tokens: int) -> dict[str, Any]:
        async with places:
            return await _generate(engine, prompt, num_tokens)

    work = [one(prompt, rng.randint(least, most)) for prompt in prompts * _CHURN_FACTOR]
    done = _run(engine, work)
    return {"requests": len(done), "counters": counter_difference(before, counters(engine))}


def _run(engine: Any, work: Sequence[Coroutine[Any, Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    async def all_of_it() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*work))

    found: list[dict[str, Any]] = engine.loop.run_until_complete(all_of_it())
    return found


async def _generate(
    engine: Any, prompt: list[int], num_tokens: int, times: list[tuple[float, int]] | None = None
) -> dict[str, Any]:
    """One request, and when it was done; ``times`` gets (seconds, tokens so far) of each chunk."""
    answer = await engine.async_generate(
        input_ids=prompt, sampling_params=greedy(num_tokens), stream=times is not None
    )
    if times is not None:
        async for chunk in answer:
            times.append((time.perf_counter(), chunk["meta_info"]["completion_tokens"]))
        answer = chunk
    return {"meta_info": answer["meta_info"], "finished": time.perf_counter()}


def full_batch(times: list[tuple[float, int]], finished: list[float]) -> list[float]:
    """Microseconds per token of one request while all requests decode.

    Args:
        times: seconds, and tokens so far, at each chunk of the request.
        finished: seconds at which each request was done, that one's last. All generate equally
            much, so what was done later than it began that much later too.

    Returns:
        One value per token. Tokens that came at once share the time since the ones before.
    """
    begin = times[0][0] + max(0.0, max(finished) - finished[-1])
    end = min(finished)
    inside = [(at, tokens) for at, tokens in times if begin <= at <= end]
    steps: list[float] = []
    for (before, had), (at, has) in pairwise(inside):
        if has > had:
            steps += [round((at - before) / (has - had) * 1e6, 1)] * (has - had)
    return steps
