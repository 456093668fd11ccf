"""How the workloads of `bench serving` are sent to a server; runs in the client process.

SGLang's load generator needs SGLang to import, which on a host without a GPU takes the stand-in
kernels, and it prints a lot. So it runs in a process of its own: a :class:`Client` in a
`bench.child.ChildProcess`. The key of a server comes with the environment, where the tool looks.

Every driver sends one set of requests in two ways: ``ask`` for the token ids, which also warms
the server up, and ``measure`` for the times. Sampling is greedy, so two servers must answer alike.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np
import requests

from prefix_patches import load_generator
from sglang_prefix.api_key import ApiKey, ask, why_failed
from sglang_prefix.bench.serving.stream import Answer, add_chunk
from sglang_prefix.bench.serving.workloads import (
    Forks,
    Questions,
    Rollouts,
    Trace,
    Workload,
    scale_trace,
)
from sglang_prefix.bench.workloads.traces import read_trace

__all__ = ["Answer", "BenchServing", "Client", "Driver", "ForkDriver", "start_client", "summarize"]

_DOCUMENT = "Rule {n} of part {part}: an answer names its source and says when it is not sure. "
_SECTION = "Note {n} on case {part}: read it as taken on that day, in this order. "
_QUESTION = "\nQuestion {part}: what follows from note {n}, and for whom?\nAnswer:"
_FLUSH_TRIES = 100
_FLUSH_PAUSE_S = 0.1
_ADMIN_KEY = "A server started with --admin-api-key opens it to that key alone: start without"


class Client:
    """Makes the requests of workloads and sends them.

    Args:
        model: folder or name of the model.
        tokenizer: of its tokenizer; None for the model's.
        trace: file of a trace, or None.
        seed: of all requests.

    Raises:
        RuntimeError: this SGLang lacks something that the load generator needs.
        ValueError: there is no tokenizer.
    """

    def __init__(self, model: str, tokenizer: str | None, trace: str | None, seed: int) -> None:
        if missing := load_generator.missing():
            raise RuntimeError(f"this SGLang lacks {', '.join(missing)}")
        tokenizer = tokenizer or model
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
        """Send a workload on a fresh cache; the token ids of its answers, in order."""
        return [answer.ids for answer in self._ready(name, url).ask(url)]

    def measure(self, name: str, url: str) -> dict[str, Any]:
        """Send a workload for its times, on a fresh cache; see :func:`summarize`."""
        return self._ready(name, url).measure(url)

    def _ready(self, name: str, url: str) -> Driver:
        """The driver of a workload, when the cache holds what it shall and nothing else."""
        _flush(url)
        self._drivers[name].fill_cache(url)
        return self._drivers[name]


def start_client(**settings: Any) -> tuple[Client, dict[str, Any]]:
    """A client with these arguments, for a `bench.child.ChildProcess`."""
    return Client(**settings), {}


def _flush(url: str) -> None:
    """Empty a server's cache; it is not idle at once when the last answer is out."""
    key = ApiKey.find()
    for _ in range(_FLUSH_TRIES):
        try:
            ask(f"{url}/flush_cache", key, timeout_s=60, method="POST")
            return
        except requests.HTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403):
                why = why_failed(error, url, key)
                # SGLang then wants that one for this call, and the other for all others.
                raise RuntimeError(f"{url}/flush_cache: {why}. {_ADMIN_KEY}") from None
        time.sleep(_FLUSH_PAUSE_S)
    raise RuntimeError(f"{url} would not empty its cache: does it serve other requests?")


def summarize(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Aggregate as SGLang's bench_serving does.

    Args:
        answers: with one chunk at least each.
        seconds: from the first request to the last answer.

    Returns:
        Median and 99th percentile of the time to the first token, of the time per output token
        after it (one value per answer) and of the time between tokens (one value per token), in
        ms; throughputs; "texts" of the answers.
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
    return {
        "ttft_ms": _quantiles(first),
        "tpot_ms": _quantiles(per_token),
        "itl_ms": _quantiles(between),
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
    """A set of requests that can be sent to any server.

    Args:
        requests: plain values, equal for equal requests; here bodies of ``/generate``.
        concurrency: of them in flight at most; None for all at once.
        before: bodies that are answered first, and not timed.

    Attributes:
        replay_s: seconds over which they are sent.
    """

    replay_s = 0.0

    def __init__(
        self, requests: list[Any], concurrency: int | None = None, before: Sequence[Any] = ()
    ) -> None:
        self.requests = requests
        self._concurrency = concurrency
        self._before = before

    def ask(self, url: str) -> list[Answer]:
        """All answers, in the order of the requests."""
        return asyncio.run(_ask_all(url, self.requests, self._concurrency))

    def fill_cache(self, url: str) -> None:
        """Send what is answered first."""
        asyncio.run(_ask_all(url, self._before, None))

    def measure(self, url: str) -> dict[str, Any]:
        """What :func:`summarize` returns."""
        began = time.perf_counter()
        answers = self.ask(url)
        return summarize(answers, time.perf_counter() - began)


class BenchServing(Driver):
    """SGLang's bench_serving with one of its own data sets, or with the client's trace.

    Args:
        client: whose tokenizer and seed it uses.
        flags: of the tool, without dashes.
        trace: what to replay instead of a data set.

    Raises:
        ValueError: the tool refuses the flags.
    """

    def __init__(self, client: Client, flags: dict[str, Any], trace: Trace | None = None) -> None:
        given = {**flags, **client.flags, "warmup-requests": 0, "output-file": "/dev/null"}
        words = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        words += ["--flush-cache", "--disable-tqdm", "--output-details"]
        self._arguments = load_generator.parse(words)
        self._speed = trace["speed"] if trace else None
        if trace is None:
            self._rows = load_generator.load_requests(self._arguments, client.tokenizer)
        else:
            found = read_trace(client.trace)[: trace["requests"]]
            scaled = scale_trace(found, client.token_ids, trace, client.flags["seed"])
            self._rows = [load_generator.dataset_row(*row) for row in scaled]
            self.replay_s = (found[-1].timestamp - found[0].timestamp) / 1000 / trace["speed"]
        bodies = [_body(row.prompt, row.output_len) for row in self._rows]
        super().__init__(bodies, self._arguments.max_concurrency)

    def measure(self, url: str) -> dict[str, Any]:
        """See :class:`Driver`; the times are the tool's."""
        found = load_generator.run(self._arguments, self._rows, url, self._speed)
        errors = [error for error in found["errors"] if error]
        if errors or found["completed"] < len(self._rows):
            why = errors[0].strip().splitlines()[-1] if errors else "no reason given"
            missing = len(self._rows) - found["completed"]
            raise RuntimeError(f"{missing} of {len(self._rows)} requests failed: {why}")
        times = {
            name: {kind: found[f"{kind}_{name}"] for kind in ("median", "p99")}
            for name in ("ttft_ms", "tpot_ms", "itl_ms")
        }
        return {
            **times,
            "output_tokens_per_s": found["output_throughput"],
            "requests_per_s": found["request_throughput"],
            "duration_s": found["duration"],
            "output_tokens": found["total_output_tokens"],
            "texts": found["generated_texts"],
        }


def _trace(client: Client, shape: Trace) -> Driver:
    """A replay of the client's trace; the data set that is named to the tool is not made."""
    flags = {"dataset-name": "random-ids", "max-concurrency": shape["max_concurrency"]}
    return BenchServing(client, flags, shape)


def _rollouts(client: Client, shape: Rollouts) -> Driver:
    """``n`` samples of random prompts; all prompts at once.

    bench_serving takes the samples of one stream for one answer, so it cannot send them.
    """
    rng, ids = np.random.default_rng(client.flags["seed"]), np.asarray(client.token_ids)
    size = (shape["prompts"], shape["prompt_tokens"])
    prompts = ids[rng.integers(len(ids), size=size)].tolist()
    return Driver([_body(p, shape["output_tokens"], shape["samples"]) for p in prompts])


def _questions(client: Client, shape: Questions) -> Driver:
    """Random questions about random documents; all at once, when the documents are cached."""
    rng, ids = np.random.default_rng(client.flags["seed"]), np.asarray(client.token_ids)

    def draw(*size: int) -> list[list[int]]:
        found: list[list[int]] = ids[rng.integers(len(ids), size=size)].tolist()
        return found

    documents = draw(shape["documents"], shape["document_tokens"])
    prompts = [
        document + question
        for document in documents
        for question in draw(shape["questions"], shape["question_tokens"])
    ]
    bodies = [_body(prompt, shape["output_tokens"]) for prompt in prompts]
    return Driver(bodies, before=[_body(document, 1) for document in documents])


class ForkDriver(Driver):
    """Trees of text through SGLang's frontend language; all documents at once.

    The language has no load generator of its own, and asks for whole answers. So what it asks for
    is sent, streamed and timed as the requests of the other drivers are.
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
        trees = [
            {
                "document": fill(_DOCUMENT, n, shape["document_tokens"]),
                "sections": sections,
                "questions": questions,
                "tokens": shape["output_tokens"],
            }
            for n in range(shape["documents"])
        ]
        super().__init__(trees)

    def ask(self, url: str) -> list[Answer]:
        """All answers, in the order of the leaves."""
        import sglang

        def generate(prompt: str, tokens: int) -> tuple[str, dict[str, Any]]:
            (answer,) = asyncio.run(_ask_all(url, [_body(prompt, tokens)], None))
            return answer.text, {"answer": answer}

        endpoint = load_generator.endpoint(url, generate, ApiKey.find().value)
        program = sglang.function(_tree)
        with ThreadPoolExecutor(len(self.requests)) as pool:
            states = list(
                pool.map(lambda tree: program.run(**tree, backend=endpoint), self.requests)
            )
        for state in states:
            if (error := state.error()) is not None:
                raise RuntimeError(f"the frontend language failed: {error}")
        found = [meta and meta["answer"] for state in states for meta in state["answers"]]
        if not all(found):
            raise RuntimeError("the frontend language lost an answer: did the server fail?")
        return found


def _tree(s: Any, document: str, sections: list[str], questions: list[str], tokens: int) -> None:
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
            leaf += gen("answer", max_tokens=tokens)
        leaves += list(below)
    s["answers"] = [leaf.get_meta_info("answer") for leaf in leaves]


_DRIVERS: dict[str, Any] = {
    "bench_serving": BenchServing,
    "trace": _trace,
    "rollouts": _rollouts,
    "questions": _questions,
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
    async with aiohttp.ClientSession(
        timeout=timeout, read_bufsize=2**23, headers=ApiKey.find().headers
    ) as session:
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
            said = await response.content.read(1 << 16)
            text = " ".join(said.decode(errors="replace").split())
            raise RuntimeError(f"the server answered {response.status}: {text[:300]}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                add_chunk(answers, line[len(b"data: ") :], body["sampling_params"])
    if not all(a.chunks and len(a.ids) == a.chunks[-1][1] for a in answers):
        raise RuntimeError("the server ended a stream before the whole of every answer had come")
    return answers
