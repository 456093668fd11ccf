"""How the workloads of `bench serving` are sent to a server; runs in the client process.

SGLang's load generator needs SGLang to import, which on a host without a GPU takes the stand-in
kernels, and it prints a lot. So it runs in a process of its own: a :class:`Client` in a
`bench.child.ChildProcess`.

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
from typing import Any

import aiohttp
import numpy as np
import requests

from prefix_patches import load_generator
from sglang_prefix.bench.serving.workloads import Forks, Rollouts, Trace, Workload, scale_trace
from sglang_prefix.bench.workloads.traces import read_trace

__all__ = [
    "Answer",
    "BenchServing",
    "Client",
    "Driver",
    "ForkDriver",
    "RolloutDriver",
    "TraceDriver",
    "start_client",
    "summarize",
]

_FIELDS = ("ttft_ms", "tpot_ms", "itl_ms")
_DOCUMENT = "Rule {n} of part {part}: an answer names its source and says when it is not sure. "
_SECTION = "Note {n} on case {part}: read it as taken on that day, in this order. "
_QUESTION = "\nQuestion {part}: what follows from note {n}, and for whom?\nAnswer:"
_ANSWER = "sglang_prefix_answer"
_FLUSH_TRIES = 100
_FLUSH_PAUSE_S = 0.1


class Client:
    """Makes the requests of workloads and sends them.

    Args:
        model: folder or name of the model; tokenizer: of its tokenizer.
        trace: file of a trace, or None.
        seed: of all requests.

    Raises:
        RuntimeError: this SGLang lacks something that the load generator needs.
        ValueError: there is no tokenizer.
    """

    def __init__(self, model: str, tokenizer: str, trace: str | None, seed: int) -> None:
        if missing := load_generator.missing():
            raise RuntimeError(f"this SGLang lacks {', '.join(missing)}")
        self.flags: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "seed": seed}
        self.trace = trace or ""
        try:
            self.tokenizer = load_generator.load_tokenizer(tokenizer)
        except (OSError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise ValueError(f"cannot load a tokenizer from {tokenizer}: {cause}") from None
        # Ids to draw random prompts from: all but the special ones.
        special = set(self.tokenizer.all_special_ids)
        self.token_ids = sorted(set(self.tokenizer.get_vocab().values()) - special)
        self._drivers: dict[str, Driver] = {}

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Make the requests of a workload.

        Returns:
            "fingerprint", equal for equal requests, and "replay_s", over which they are sent.
        """
        driver = _DRIVERS[workload.driver](self, workload.parameters)
        self._drivers[workload.name] = driver
        hashed = hashlib.sha256(json.dumps(driver.requests).encode()).hexdigest()
        return {"fingerprint": hashed, "replay_s": driver.replay_s}

    def check(self, name: str, url: str) -> list[list[int]]:
        """Send a workload for its token ids, on an empty cache."""
        _flush(url)
        return self._drivers[name].check(url)

    def measure(self, name: str, url: str) -> dict[str, Any]:
        """Send a workload for its times, on an empty cache."""
        _flush(url)
        return self._drivers[name].measure(url)


def start_client(**settings: Any) -> tuple[Client, dict[str, Any]]:
    """A client with these arguments, for a `bench.child.ChildProcess`."""
    return Client(**settings), {}


def _flush(url: str) -> None:
    """Empty a server's cache; it is not idle at once when the last answer is out."""
    for _ in range(_FLUSH_TRIES):
        if requests.post(f"{url}/flush_cache", timeout=60).status_code == 200:
            return
        time.sleep(_FLUSH_PAUSE_S)
    raise RuntimeError(f"{url} would not empty its cache: does it serve other requests?")


@dataclass(slots=True)
class Answer:
    """One streamed answer.

    Attributes:
        began: when it was asked for.
        chunks: (seconds, tokens so far) of what came.
        text, ids: of the whole answer.
    """

    began: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)

    def take(self, chunk: dict[str, Any]) -> None:
        """Note a chunk of ``/generate``'s stream."""
        self.chunks.append((time.perf_counter(), chunk["meta_info"]["completion_tokens"]))
        self.text, self.ids = chunk["text"], chunk.get("output_ids", [])


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


class Driver:
    """A set of requests that can be sent to any server, as bodies of ``/generate``.

    Attributes:
        requests: plain values, equal for equal requests.
        replay_s: seconds over which they are sent; 0 for at once.
    """

    requests: list[Any]
    replay_s = 0.0
    _concurrency: int | None = None

    def check(self, url: str) -> list[list[int]]:
        """Token ids of all answers, in the order of the requests."""
        return [answer.ids for answer in self._ask(url, with_ids=True)]

    def measure(self, url: str) -> dict[str, Any]:
        """Times, as :func:`summarize` returns them, and "texts", the answers in the same order."""
        began = time.perf_counter()
        answers = self._ask(url, with_ids=False)
        return summarize(answers, time.perf_counter() - began)

    def _ask(self, url: str, *, with_ids: bool) -> list[Answer]:
        return asyncio.run(_ask_all(url, self.requests, self._concurrency))


class BenchServing(Driver):
    """SGLang's bench_serving with one of its own data sets.

    Args:
        client: whose tokenizer and seed it uses.
        flags: of the tool, without dashes.

    Raises:
        ValueError: the tool refuses the flags.
    """

    def __init__(self, client: Client, flags: dict[str, Any]) -> None:
        given = {**flags, **client.flags, "warmup-requests": 0}
        self._flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        self._flags += ["--flush-cache", "--disable-tqdm", "--output-details"]
        arguments = self._arguments("http://127.0.0.1")
        self._concurrency = arguments.max_concurrency
        self._rows = self._make_rows(arguments, client)
        self.requests = [_body(row.prompt, row.output_len) for row in self._rows]

    def _make_rows(self, arguments: load_generator.Namespace, client: Client) -> list[Any]:
        return load_generator.load_requests(arguments, client.tokenizer)

    def _arguments(self, url: str) -> load_generator.Namespace:
        return load_generator.parse([*self._flags, "--base-url", url, "--output-file", "/dev/null"])

    def measure(self, url: str) -> dict[str, Any]:
        """See :class:`Driver`; the times are the tool's."""
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
    """bench_serving's replay of the client's trace, with the rows made here."""

    def __init__(self, client: Client, shape: Trace) -> None:
        self._shape, speed = shape, shape["speed"]
        self._trace = read_trace(client.trace)[: shape["requests"]]
        self.replay_s = (self._trace[-1].timestamp - self._trace[0].timestamp) / 1000 / speed
        replay = {
            "dataset-name": "mooncake",
            "mooncake-slowdown-factor": 1 / speed,
            "num-prompts": shape["requests"],
            "max-concurrency": shape["max_concurrency"],
        }
        super().__init__(client, replay)

    def _make_rows(self, arguments: load_generator.Namespace, client: Client) -> list[Any]:
        rows = scale_trace(self._trace, client.token_ids, self._shape, client.flags["seed"])
        make = load_generator.dataset_row
        return [make(row.prompt, row.output_len, row.timestamp) for row in rows]


class RolloutDriver(Driver):
    """``n`` samples of random prompts through ``/generate``; all prompts at once.

    bench_serving takes the samples of one stream for one answer, so this has its own client.
    """

    def __init__(self, client: Client, shape: Rollouts) -> None:
        rng, ids = np.random.default_rng(client.flags["seed"]), np.asarray(client.token_ids)
        size = (shape["prompts"], shape["prompt_tokens"])
        prompts = ids[rng.integers(len(ids), size=size)].tolist()
        tokens, samples = shape["output_tokens"], shape["samples"]
        self.requests = [_body(prompt, tokens, samples) for prompt in prompts]


class ForkDriver(Driver):
    """Trees of text through SGLang's frontend language; all documents at once.

    The language has no load generator of its own. Its endpoint is extended so that every ``gen``
    streams and its tokens are timed; what it sends is the language's.
    """

    def __init__(self, client: Client, shape: Forks) -> None:
        def fill(template: str, part: int, length: int) -> str:
            """Numbered sentences of ``length`` tokens at least."""
            text, number = "", 0
            while len(client.tokenizer.encode(text, add_special_tokens=False)) < length:
                text += template.format(n=number, part=part)
                number += 1
            return text

        sections = [fill(_SECTION, n, shape["section_tokens"]) for n in range(shape["sections"])]
        questions = [_QUESTION.format(part=q, n=7 * q) for q in range(shape["questions"])]
        self.requests = [
            {
                "document": fill(_DOCUMENT, n, shape["document_tokens"]),
                "sections": sections,
                "questions": questions,
                "tokens": shape["output_tokens"],
            }
            for n in range(shape["documents"])
        ]

    def _ask(self, url: str, *, with_ids: bool) -> list[Answer]:
        import sglang

        endpoint = load_generator.streaming_endpoint(url, _timed)
        program = sglang.function(_tree)
        jobs = [tree | {"ids": with_ids} for tree in self.requests]
        with ThreadPoolExecutor(len(jobs)) as pool:
            states = list(pool.map(lambda job: program.run(**job, backend=endpoint), jobs))
        for state in states:
            if (error := state.error()) is not None:
                raise RuntimeError(f"the frontend language failed: {error}")
        answers = [meta and meta[_ANSWER] for state in states for meta in state["answers"]]
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
    """An answer from its stream, which is also in its meta information."""
    answer = Answer(time.perf_counter())
    meta: dict[str, Any] = {}
    for text, meta in chunks:
        # Of each token its log probability, its id and, perhaps, its text.
        ids = [token[1] for token in meta.get("output_token_logprobs") or ()]
        answer.take({"text": answer.text + text, "output_ids": ids, "meta_info": meta})
    if not answer.chunks:
        raise RuntimeError("the server ended a stream before its first token")
    return answer.text, {**meta, _ANSWER: answer}


_DRIVERS: dict[str, Any] = {
    "bench_serving": BenchServing,
    "trace": TraceDriver,
    "rollouts": RolloutDriver,
    "forks": ForkDriver,
}


def _body(prompt: str | list[int], tokens: int, samples: int = 1) -> dict[str, Any]:
    """A request of ``/generate`` for greedy answers of a fixed length."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "n": samples}
    key = "text" if isinstance(prompt, str) else "input_ids"
    return {key: prompt, "sampling_params": sampling, "stream": True}


async def _ask_all(
    url: str, bodies: Sequence[dict[str, Any]], concurrency: int | None
) -> list[Answer]:
    """Answers to all requests, in order; never more than ``concurrency`` in flight."""
    # Requests wait as long as the server needs; lines of long answers are long.
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=2**23) as session:
        places = asyncio.Semaphore(concurrency or len(bodies))

        async def ask(body: dict[str, Any]) -> list[Answer]:
            async with places:
                return await _ask(session, url, body)

        return [answer for some in await asyncio.gather(*map(ask, bodies)) for answer in some]


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[Answer]:
    """The samples of one request."""
    began = time.perf_counter()
    answers = [Answer(began) for _ in range(body["sampling_params"]["n"])]
    async with session.post(f"{url}/generate", json=body) as response:
        if response.status != 200:
            text = " ".join((await response.text()).split())
            raise RuntimeError(f"the server answered {response.status}: {text[:300]}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[len(b"data: ") :])
                if "error" in chunk:
                    raise RuntimeError(f"the server failed: {str(chunk['error'])[:300]}")
                answers[chunk.get("index", 0)].take(chunk)
    if not all(answer.chunks and len(answer.ids) == answer.chunks[-1][1] for answer in answers):
        raise RuntimeError("the server ended a stream before the whole of every answer had come")
    return answers
