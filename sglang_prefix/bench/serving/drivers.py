"""How the workloads of `bench serving` are sent to a server; runs in the client process.

Every driver sends one set of requests in two ways: ``check`` for the token ids, which also warms
the server up, and ``measure`` for the times. Greedy, so that two servers must say the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import aiohttp
import numpy as np
import requests

from prefix_patches import load_generator
from sglang_prefix.bench.serving.trace import scale_trace
from sglang_prefix.bench.serving.workloads import Rollouts, Trace, Workload
from sglang_prefix.bench.workloads.traces import read_trace

__all__ = ["Answer", "BenchServing", "Driver", "RolloutDriver", "flush", "summarize", "token_ids"]

_FLUSH_TRIES = 100
_FLUSH_PAUSE_S = 0.1
_FIELDS = ("ttft_ms", "tpot_ms", "itl_ms")


class Driver(Protocol):
    """A workload that can be sent to any server."""

    def fingerprint(self) -> str:
        """Equal for equal requests."""

    def check(self, url: str) -> list[list[int]]:
        """Token ids of all answers, in the order of the requests."""

    def measure(self, url: str) -> dict[str, Any]:
        """Times, as :func:`summarize` returns them, and "texts", the answers in the same order."""


@dataclass(slots=True)
class Answer:
    """One streamed answer: when it was asked for, and (seconds, tokens so far) of what came."""

    began: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""

    def take(self, chunk: dict[str, Any]) -> None:
        """Note a chunk of ``/generate``'s stream."""
        self.chunks.append((time.perf_counter(), chunk["meta_info"]["completion_tokens"]))
        self.text = chunk["text"]


def summarize(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Sum up as SGLang's bench_serving does.

    Args:
        answers: with one chunk at least each.
        seconds: from the first request to the last answer.

    Returns:
        Median and 99th percentile of the time to the first token, of the time per output token
        after it (one value per answer) and of the time between tokens (one value per token), in
        ms; throughputs.
    """
    first = [a.chunks[0][0] - a.began for a in answers]
    per_token = [
        (a.chunks[-1][0] - a.chunks[0][0]) / (a.chunks[-1][1] - a.chunks[0][1])
        for a in answers
        if a.chunks[-1][1] > a.chunks[0][1]
    ]
    between = [
        (then - now) / (has - had)
        for a in answers
        for (now, had), (then, has) in pairwise(a.chunks)
        for _ in range(has - had)
    ]
    tokens = sum(a.chunks[-1][1] for a in answers)
    values = zip(_FIELDS, (first, per_token, between), strict=True)
    return {
        **{name: _quantiles(found) for name, found in values},
        "output_tokens_per_s": tokens / seconds,
        "requests_per_s": len(answers) / seconds,
        "duration_s": seconds,
        "output_tokens": tokens,
        "texts": [a.text for a in answers],
    }


def _quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    median, p99 = np.percentile(np.asarray(seconds) * 1e3, (50, 99))
    return {"median": float(median), "p99": float(p99)}


def token_ids(tokenizer: Any) -> list[int]:
    """Ids to draw random prompts from: all but the special ones."""
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))


def flush(url: str) -> None:
    """Empty a server's cache; it is not idle at once when the last answer is out.

    Raises:
        RuntimeError: it would not.
    """
    for _ in range(_FLUSH_TRIES):
        if requests.post(f"{url}/flush_cache", timeout=60).status_code == 200:
            return
        time.sleep(_FLUSH_PAUSE_S)
    raise RuntimeError(f"{url} would not empty its cache: does it serve other requests?")


def fingerprint(data: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _sampling(tokens: int, samples: int = 1) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "n": samples}


class BenchServing:
    """SGLang's bench_serving: its own data sets, or a trace replay with the rows made here.

    Args:
        workload: of the driver "bench_serving" or "trace".
        model: folder or name, for the tool.
        tokenizer_name, tokenizer: of the model.
        trace: file, for "trace".
        seed: of the requests.

    Raises:
        ValueError: the tool refuses the flags, or the trace is none.
    """

    def __init__(
        self,
        workload: Workload,
        model: str,
        tokenizer_name: str,
        tokenizer: Any,
        trace: str | None,
        seed: int,
    ) -> None:
        given = dict(workload.parameters)
        shape = Trace(**given) if workload.driver == "trace" else None
        if shape:
            given = {
                "dataset-name": "mooncake",
                "mooncake-slowdown-factor": 1 / shape.speed,
                "num-prompts": shape.requests,
                "max-concurrency": shape.max_concurrency,
            }
        given |= {"model": model, "tokenizer": tokenizer_name, "seed": seed, "warmup-requests": 0}
        self.flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        self.flags += ["--flush-cache", "--disable-tqdm", "--output-details"]
        arguments = self._arguments("http://127.0.0.1")
        self._concurrency = arguments.max_concurrency
        if shape:
            rows = scale_trace(
                read_trace(trace or "")[: shape.requests],
                token_ids(tokenizer),
                block_tokens=shape.block_tokens,
                max_prompt_tokens=shape.max_prompt_tokens,
                max_output_tokens=shape.max_output_tokens,
                seed=seed,
            )
            self.replay_s = (rows[-1].timestamp - rows[0].timestamp) / 1000 / shape.speed
            self._rows: list[Any] = [
                load_generator.dataset_row(row.prompt, row.output_len, row.timestamp)
                for row in rows
            ]
        else:
            self.replay_s = 0.0
            self._rows = load_generator.load_requests(arguments, tokenizer)

    def _arguments(self, url: str, output: str = "/dev/null") -> load_generator.Namespace:
        return load_generator.parse([*self.flags, "--base-url", url, "--output-file", output])

    def fingerprint(self) -> str:
        """See :class:`Driver`."""
        return fingerprint([(row.prompt, row.output_len, row.timestamp) for row in self._rows])

    def check(self, url: str) -> list[list[int]]:
        """See :class:`Driver`."""
        bodies = [_body(row.prompt, _sampling(row.output_len)) for row in self._rows]
        answers = asyncio.run(_ask_all(url, bodies, self._concurrency))
        return [answer["output_ids"] for answer in answers]

    def measure(self, url: str) -> dict[str, Any]:
        """See :class:`Driver`."""
        found = load_generator.run(self._arguments(url), self._rows)
        errors = [error for error in found["errors"] if error]
        if errors or found["completed"] < len(self._rows):
            why = errors[0].strip().splitlines()[-1] if errors else "no reason given"
            missing = len(self._rows) - found["completed"]
            raise RuntimeError(f"{missing} of {len(self._rows)} requests failed: {why}")
        quantiles = {
            name: {kind: found[f"{kind}_{name}"] for kind in ("median", "p99")} for name in _FIELDS
        }
        return {
            **quantiles,
            "output_tokens_per_s": found["output_throughput"],
            "requests_per_s": found["request_throughput"],
            "duration_s": found["duration"],
            "output_tokens": found["total_output_tokens"],
            "texts": found["generated_texts"],
        }


def _body(prompt: Any, sampling: dict[str, Any]) -> dict[str, Any]:
    return {"text" if isinstance(prompt, str) else "input_ids": prompt, "sampling_params": sampling}


class RolloutDriver:
    """``n`` samples of random prompts through ``/generate``; all prompts at once.

    bench_serving takes the samples of one stream for one answer, so this has its own client.
    """

    def __init__(self, shape: Rollouts, tokenizer: Any, seed: int) -> None:
        rng, ids = np.random.default_rng(seed), np.asarray(token_ids(tokenizer))
        drawn = rng.integers(len(ids), size=(shape.prompts, shape.prompt_tokens))
        self._samples = shape.samples
        sampling = _sampling(shape.output_tokens, shape.samples)
        self._bodies = [_body(prompt, sampling) for prompt in ids[drawn].tolist()]

    def fingerprint(self) -> str:
        """See :class:`Driver`."""
        return fingerprint(self._bodies)

    def check(self, url: str) -> list[list[int]]:
        """See :class:`Driver`."""
        found = asyncio.run(_ask_all(url, self._bodies, None))
        per_prompt = (answer if isinstance(answer, list) else [answer] for answer in found)
        return [sample["output_ids"] for samples in per_prompt for sample in samples]

    def measure(self, url: str) -> dict[str, Any]:
        """See :class:`Driver`."""
        began = time.perf_counter()
        answers = asyncio.run(self._stream_all(url))
        return summarize(answers, time.perf_counter() - began)

    async def _stream_all(self, url: str) -> list[Answer]:
        async with _session() as session:
            work = [self._stream(session, url, body) for body in self._bodies]
            return [answer for answers in await asyncio.gather(*work) for answer in answers]

    async def _stream(
        self, session: aiohttp.ClientSession, url: str, body: dict[str, Any]
    ) -> list[Answer]:
        began = time.perf_counter()
        answers = [Answer(began) for _ in range(self._samples)]
        async with session.post(f"{url}/generate", json=body | {"stream": True}) as response:
            await _accept(response)
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[len(b"data: ") :])
                    answers[chunk.get("index", 0)].take(chunk)
        if not all(answer.chunks for answer in answers):
            raise RuntimeError(f"the server ended a stream before all {self._samples} samples")
        return answers


def _session() -> aiohttp.ClientSession:
    # Requests wait as long as the server needs; lines of long answers are long.
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**23, raise_for_status=False
    )


async def _accept(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        text = " ".join((await response.text()).split())
        raise RuntimeError(f"the server answered {response.status}: {text[:300]}")


async def _ask_all(
    url: str, bodies: Iterable[dict[str, Any]], concurrency: int | None
) -> list[Any]:
    """Answers to all requests, in order; never more than ``concurrency`` in flight."""
    async with _session() as session:
        bodies = list(bodies)
        places = asyncio.Semaphore(concurrency or len(bodies))

        async def ask(body: dict[str, Any]) -> Any:
            async with places, session.post(f"{url}/generate", json=body) as response:
                await _accept(response)
                return await response.json()

        return list(await asyncio.gather(*map(ask, bodies)))
