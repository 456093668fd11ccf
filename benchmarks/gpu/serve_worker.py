"""One engine of `serve` in a process of its own: ``python -m benchmarks.gpu.serve_worker FD JOB``.

Answers commands on an inherited connection until it closes. A process of its own because SGLang
ends all processes that it finds below itself when one engine is shut down or fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import traceback
from importlib.metadata import entry_points
from itertools import pairwise
from multiprocessing.connection import Connection
from random import Random
from typing import Any

from benchmarks.gpu.serve_cells import Load, prompts

__all__ = ["full_batch"]

_WARM_TOKENS = 8
_TOP = 5
_FLUSH_TRIES = 50
# Requests of "churn" that come after the first of the load, for each of these.
_CHURN_FACTOR = 8
# Not counted up by the backend.
_STATES = ("delegated_layers", "num_packs", "num_partials", "predicted_packed_us",
           "predicted_stock_us", "kv_read_ratio")  # fmt: skip


def main() -> None:
    """Start the engine, then serve commands."""
    connection = Connection(int(sys.argv[1]))
    job = json.loads(sys.argv[2])
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        worker = Worker(job)
        answer: Any = worker.describe()
        while True:
            connection.send({"result": answer})
            name, arguments = connection.recv()
            answer = getattr(worker, name)(**arguments)
    except EOFError:
        return
    except BaseException:
        connection.send({"error": traceback.format_exc()})
        raise
    finally:
        os.killpg(0, signal.SIGKILL)


def _die_with_parent() -> None:
    """Kill this process group, engine and all, when the other end of standard input closes."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


class Worker:
    """An engine and what can be asked of it; every public method is a command.

    Args:
        job: "engine", keyword arguments of ``sglang.Engine``; "vocab_size" and "seed" of prompts.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        began = time.perf_counter()
        import sglang

        self._job = job
        self._engine: Any = sglang.Engine(**job["engine"])
        self._started_s = time.perf_counter() - began
        self._version = sglang.__version__

    def describe(self) -> dict[str, Any]:
        """What this engine is."""
        info = self._engine.get_server_info()
        points = entry_points(group="sglang.srt.plugins", name="prefix")
        return {
            "sglang": self._version,
            "started_s": self._started_s,
            "arguments": self._job["engine"],
            "settings": {k: v for k, v in os.environ.items() if k.startswith("SGLANG_")},
            "max_total_num_tokens": info["max_total_num_tokens"],
            "attention_backend": info.get("attention_backend"),
            # The distribution through which SGLang finds our backend.
            "plugin": [str(getattr(point.dist, "_path", "")) for point in points],
        }

    def prepare(self, load: dict[str, Any]) -> None:
        """Empty the cache, fill it with the prompts of a load, decode a little at full batch."""
        chosen = _load(load)
        self._flush()
        ids = self._prompts(chosen)
        distinct = [list(prompt) for prompt in dict.fromkeys(map(tuple, ids))]
        self._run([self._generate(prompt, 1) for prompt in distinct[:1]])
        self._run([self._generate(prompt, 1) for prompt in distinct[1:]])
        self._run([self._generate(prompt, _WARM_TOKENS) for prompt in ids])

    def decode(self, load: dict[str, Any]) -> dict[str, Any]:
        """Time the steps of a load at full batch; the last request tells of every token."""
        chosen = _load(load)
        *others, last = self._prompts(chosen)
        times: list[tuple[float, int]] = []
        before = self.counters()
        began = time.perf_counter()
        work = [self._generate(prompt, chosen.output_tokens) for prompt in others]
        done = self._run([*work, self._generate(last, chosen.output_tokens, times=times)])
        seconds = time.perf_counter() - began
        steps = full_batch(times, [one["finished"] for one in done])
        return {
            "step_us": steps,
            "seconds": seconds,
            "cached_tokens": min(one["meta_info"]["cached_tokens"] for one in done),
            "finish_spread_s": done[-1]["finished"] - min(one["finished"] for one in done),
            "counters": _difference(before, self.counters()),
        }

    def logprobs(self, load: dict[str, Any], together: bool) -> list[list[dict[str, float]]]:
        """Greedy answers: by request and position the log probabilities of the first tokens."""
        chosen = _load(load)
        work = [
            self._generate(prompt, chosen.output_tokens, logprobs=True)
            for prompt in self._prompts(chosen)
        ]
        done = self._run(work) if together else [self._run([one])[0] for one in work]
        found = []
        for one in done:
            tops = one["meta_info"]["output_top_logprobs"]
            chosen_tokens = one["meta_info"]["output_token_logprobs"]
            found.append(
                [
                    # The chosen token first; JSON knows no integer keys.
                    {str(token[1]): token[0]} | {str(entry[1]): entry[0] for entry in top}
                    for token, top in zip(chosen_tokens, tops, strict=True)
                ]
            )
        return found

    def churn(self, load: dict[str, Any]) -> dict[str, Any]:
        """Let requests of uneven lengths join as others leave, never more at once than given."""
        chosen = _load(load)
        rng = Random(self._job["seed"])
        ids = self._prompts(chosen) * _CHURN_FACTOR
        before = self.counters()

        async def run() -> list[dict[str, Any]]:
            places = asyncio.Semaphore(chosen.num_requests)

            async def one(prompt: list[int], tokens: int) -> dict[str, Any]:
                async with places:
                    return await self._generate(prompt, tokens)

            least, most = chosen.output_tokens // 2, chosen.output_tokens * 3 // 2
            work = [one(prompt, rng.randint(least, most)) for prompt in ids]
            return list(await asyncio.gather(*work))

        done: list[dict[str, Any]] = self._engine.loop.run_until_complete(run())
        return {"requests": len(done), "counters": _difference(before, self.counters())}

    def counters(self) -> dict[str, Any]:
        """The backend's counters; empty for stock."""
        states = self._engine.get_server_info()["internal_states"][0].get("sglang_prefix", [{}])
        return dict(states[0])

    def _flush(self) -> None:
        """Empty the cache; an engine is not idle at once when the last answer is out."""
        for _ in range(_FLUSH_TRIES):
            if self._engine.flush_cache().success:
                return
            time.sleep(0.1)
        raise RuntimeError("the engine would not empty its cache")

    def _prompts(self, load: Load) -> list[list[int]]:
        return prompts(load, self._job["vocab_size"], self._job["seed"])

    def _run(self, work: list[Any]) -> list[dict[str, Any]]:
        async def all_of_it() -> list[dict[str, Any]]:
            return list(await asyncio.gather(*work))

        found: list[dict[str, Any]] = self._engine.loop.run_until_complete(all_of_it())
        return found

    async def _generate(
        self,
        prompt: list[int],
        num_tokens: int,
        *,
        logprobs: bool = False,
        times: list[tuple[float, int]] | None = None,
    ) -> dict[str, Any]:
        """One request, and when it was done; ``times`` gets (seconds, tokens so far) of each."""
        options: dict[str, Any] = {}
        if logprobs:
            options = {"return_logprob": True, "top_logprobs_num": _TOP}
        answer = await self._engine.async_generate(
            input_ids=prompt,
            sampling_params={
                "temperature": 0,
                "max_new_tokens": num_tokens,
                "ignore_eos": True,
            },
            stream=times is not None,
            **options,
        )
        if times is not None:
            async for chunk in answer:
                times.append((time.perf_counter(), chunk["meta_info"]["completion_tokens"]))
            answer = chunk
        return {"meta_info": answer["meta_info"], "finished": time.perf_counter()}


def full_batch(times: list[tuple[float, int]], finished: list[float]) -> list[float]:
    """Microseconds per token of one request while all requests decode.

    Args:
        times: seconds, and tokens so far, whenever the request said something.
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


def _load(given: dict[str, Any]) -> Load:
    levels = tuple((nodes, tokens) for nodes, tokens in given["levels"])
    return Load(given["name"], given["num_requests"], levels, given["output_tokens"])


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was added to the counters; the newest of what does not add up."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        if name in _STATES:
            found[name] = value
        elif isinstance(value, dict):
            old = before.get(name, {})
            found[name] = {k: n - old.get(k, 0) for k, n in value.items() if n > old.get(k, 0)}
        else:
            found[name] = value - before.get(name, 0)
    if found.get("kv_tokens_logical"):
        found["kv_read_ratio"] = found["kv_tokens_read"] / found["kv_tokens_logical"]
    return found


if __name__ == "__main__":
    main()
