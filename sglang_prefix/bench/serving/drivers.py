"""How the workloads of `bench serving` are sent to a server; runs in the client process.

Every driver sends one set of requests in two ways: ``check`` for the token ids, which also warms
the server up, and ``measure`` for the times. Sampling is greedy, so two servers must answer alike.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import aiohttp
import numpy as np

from prefix_patches import load_generator
from sglang_prefix.bench.serving.workloads import Forks, Rollouts, Trace, scale_trace
from sglang_prefix.bench.workloads.traces import read_trace

__all__ = [
    "Answer",
    "BenchServing",
    "Driver",
    "ForkDriver",
    "RolloutDriver",
    "TraceDriver",
    "summarize",
]

_FIELDS = ("ttft_ms", "tpot_ms", "itl_ms")
_DOCUMENT = "Rule {n} of part {part}: an answer names its source and says when it is not sure. "
_SECTION = "Note {n} on case {part}: read it as taken on that day, in this order. "
_QUESTION = "\nQuestion {part}: what follows from note {n}, and for whom?\nAnswer:"
_TIMES = "sglang_prefix_times"


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
    """Aggregate as SGLang's bench_serving does.

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


class BenchServing:
    """SGLang's bench_serving with one of its own data sets.

    Args:
        flags: of the tool, without dashes.
        tokenizer: of the model.

    Raises:
        ValueError: the tool refuses the flags.
    """

    def __init__(self, flags: dict[str, Any], tokenizer: Any) -> None:
        given = flags | {"warmup-requests": 0}
        self.flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        self.flags += ["--flush-cache", "--disable-tqdm", "--output-details"]
        arguments = self._arguments("http://127.0.0.1")
        self._concurrency = arguments.max_concurrency
        self._rows = self._make_rows(arguments, tokenizer)

    def _make_rows(self, arguments: load_generator.Namespace, tokenizer: Any) -> list[Any]:
        return load_generator.load_requests(arguments, tokenizer)

    def _arguments(self, url: str) -> load_generator.Namespace:
        return load_generator.parse([*self.flags, "--base-url", url, "--output-file", "/dev/null"])

    def fingerprint(self) -> str:
        """See :class:`Driver`."""
        return _fingerprint([(row.prompt, row.output_len, row.timestamp) for row in self._rows])

    def check(self, url: str) -> list[list[int]]:
        """See :class:`Driver`."""
        bodies = [_body(row.prompt, row.output_len) for row in self._rows]
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


class TraceDriver(BenchServing):
    """bench_serving's replay of a trace, with the rows made here.

    Args:
        shape: of the replay.
        flags: model, tokenizer and seed.
        tokenizer: of the model.
        trace: its file.

    Raises:
        ValueError: the tool refuses the flags, or the file holds no trace.
    """

    def __init__(self, shape: Trace, flags: dict[str, Any], tokenizer: Any, trace: str) -> None:
        self._shape = shape
        self._trace = read_trace(trace)[: shape.requests]
        self.replay_s = (self._trace[-1].timestamp - self._trace[0].timestamp) / 1000 / shape.speed
        replay = {
            "dataset-name": "mooncake",
            "mooncake-slowdown-factor": 1 / shape.speed,
            "num-prompts": shape.requests,
            "max-concurrency": shape.max_concurrency,
        }
        super().__init__(replay | flags, tokenizer)

    def _make_rows(self, arguments: load_generator.Namespace, tokenizer: Any) -> list[Any]:
        rows = scale_trace(
            self._trace,
            _token_ids(tokenizer),
            block_tokens=self._shape.block_tokens,
            max_prompt_tokens=self._shape.max_prompt_tokens,
            max_output_tokens=self._shape.max_output_tokens,
            seed=arguments.seed,
        )
        make = load_generator.dataset_row
        return [make(row.prompt, row.output_len, row.timestamp) for row in rows]


class RolloutDriver:
    """``n`` samples of random prompts through ``/generate``; all prompts at once.

    bench_serving takes the samples of one stream for one answer, so this has its own client.
    """

    def __init__(self, shape: Rollouts, tokenizer: Any, seed: int) -> None:
        rng, ids = np.random.default_rng(seed), np.asarray(_token_ids(tokenizer))
        prompts = ids[rng.integers(len(ids), size=(shape.prompts, shape.prompt_tokens))].tolist()
        self._samples = shape.samples
        self._bodies = [_body(prompt, shape.output_tokens, shape.samples) for prompt in prompts]

    def fingerprint(self) -> str:
        """See :class:`Driver`."""
        return _fingerprint(self._bodies)

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


class ForkDriver:
    """Trees of text through SGLang's frontend language; all documents at once.

    The language has no load generator of its own. Its endpoint is extended so that every ``gen``
    streams and its tokens are timed; what it sends is the language's.
    """

    def __init__(self, shape: Forks, tokenizer: Any) -> None:
        def fill(template: str, part: int, length: int) -> str:
            """Numbered sentences of ``length`` tokens at least."""
            text, number = "", 0
            while len(tokenizer.encode(text, add_special_tokens=False)) < length:
                text += template.format(n=number, part=part)
                number += 1
            return text

        sections = [fill(_SECTION, n, shape.section_tokens) for n in range(shape.sections)]
        self._trees = [
            {
                "document": fill(_DOCUMENT, n, shape.document_tokens),
                "sections": sections,
                "questions": [_QUESTION.format(part=q, n=7 * q) for q in range(shape.questions)],
                "tokens": shape.output_tokens,
            }
            for n in range(shape.documents)
        ]

    def fingerprint(self) -> str:
        """See :class:`Driver`."""
        return _fingerprint(self._trees)

    def check(self, url: str) -> list[list[int]]:
        """See :class:`Driver`."""
        answers = self._run(load_generator.endpoint(url), ids=True)
        # Of each token its log probability, its id and, perhaps, its text.
        return [[token[1] for token in meta["output_token_logprobs"]] for meta in answers]

    def measure(self, url: str) -> dict[str, Any]:
        """See :class:`Driver`."""
        endpoint = load_generator.streaming_endpoint(url, _timed)
        began = time.perf_counter()
        answers = self._run(endpoint, ids=False)
        return summarize([meta[_TIMES] for meta in answers], time.perf_counter() - began)

    def _run(self, endpoint: Any, *, ids: bool) -> list[dict[str, Any]]:
        import sglang

        program = sglang.function(_tree)
        jobs = [tree | {"ids": ids} for tree in self._trees]
        with ThreadPoolExecutor(len(jobs)) as pool:
            states = list(pool.map(lambda job: program.run(**job, backend=endpoint), jobs))
        for state in states:
            if (error := state.error()) is not None:
                raise RuntimeError(f"the frontend language failed: {error}")
        answers: list[dict[str, Any]] = [meta for state in states for meta in state["answers"]]
        if not all(answers):
            raise RuntimeError("the frontend language lost an answer: did the server fail?")
        return answers


def _tree(
    s: Any, document: str, sections: list[str], questions: list[str], tokens: int, ids: bool
) -> None:
    """One document; all sections below it at once, all questions below each at once."""
    from sglang import gen

    s += document
    s.text()  # `fork` sends the common prefix ahead only if its text is already known
    leaves = []
    for section, branch in zip(sections, s.fork(len(sections)), strict=True):
        branch += section
        branch.text()
        below = branch.fork(len(questions))
        for question, leaf in zip(questions, below, strict=True):
            leaf += question
            leaf += gen(
                "answer",
                max_tokens=tokens,
                temperature=0,
                ignore_eos=True,
                return_logprob=ids or None,
            )
        leaves += list(below)
    s["answers"] = [leaf.get_meta_info("answer") for leaf in leaves]


def _timed(chunks: Iterable[tuple[str, dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    """An answer from its stream, with its times in its meta information."""
    answer = Answer(time.perf_counter())
    meta: dict[str, Any] = {}
    for text, meta in chunks:
        answer.take({"text": answer.text + text, "meta_info": meta})
    if not answer.chunks:
        raise RuntimeError("the server ended a stream before its first token")
    return answer.text, {**meta, _TIMES: answer}


def _token_ids(tokenizer: Any) -> list[int]:
    """Ids to draw random prompts from: all but the special ones."""
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))


def _fingerprint(data: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _body(prompt: str | list[int], tokens: int, samples: int = 1) -> dict[str, Any]:
    """A request of ``/generate`` for greedy answers of a fixed length."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "n": samples}
    return {"text" if isinstance(prompt, str) else "input_ids": prompt, "sampling_params": sampling}


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
    url: str, bodies: Sequence[dict[str, Any]], concurrency: int | None
) -> list[Any]:
    """Answers to all requests, in order; never more than ``concurrency`` in flight."""
    async with _session() as session:
        places = asyncio.Semaphore(concurrency or len(bodies))

        async def ask(body: dict[str, Any]) -> Any:
            async with places, session.post(f"{url}/generate", json=body) as response:
                await _accept(response)
                return await response.json()

        return list(await asyncio.gather(*map(ask, bodies)))
