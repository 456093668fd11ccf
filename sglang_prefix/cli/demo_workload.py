"""The demo's forked workload: one system prompt, branches, and questions below each branch."""

from __future__ import annotations

import time
from typing import Any

from sglang_prefix.bench.engine import greedy

__all__ = ["decode", "forked_prompts"]

_RULE = "Rule {n}: an answer names its source, states its unit, and says when it is not sure. "
_TOPIC = "Part {n} deals with case {n}: read what follows as a note taken on day {n}, in order. "
_QUESTION = "Question {n}: what follows from case {n}, and for whom?"


def forked_prompts(
    tokenizer: Any, *, requests: int, system_tokens: int, branch_tokens: int, branches: int
) -> list[list[int]]:
    """Write the prompts as text and cut them to length as token ids.

    Args:
        tokenizer: a transformers tokenizer.
        requests: questions in all, spread evenly over the branches.
        system_tokens, branch_tokens: tokens of the system prompt and of each branch.
        branches: branches below the system prompt.

    Returns:
        Token ids of each request.
    """
    system = _filled(tokenizer, _RULE, 1, system_tokens)
    forks = [_filled(tokenizer, _TOPIC, n + 1, branch_tokens) for n in range(branches)]
    prompts = []
    for request in range(requests):
        question = _QUESTION.format(n=request + 1) * (1 + request % 2)  # of uneven length
        tail = tokenizer.encode(question, add_special_tokens=False)
        prompts.append(system + forks[request % branches] + tail)
    return prompts


def _filled(tokenizer: Any, template: str, first: int, length: int) -> list[int]:
    """Exactly ``length`` tokens of numbered sentences; different from the first word on."""
    tokens: list[int] = []
    number = first
    while len(tokens) < length:
        tokens += tokenizer.encode(template.format(n=number), add_special_tokens=False)
        number += 7
    return tokens[:length]


def decode(engine: Any, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], float]:
    """Greedy tokens of all requests, and the seconds from the last first token to the end.

    Prefill is the stock backend's on both sides; what is timed is decode at the full batch. Runs
    in the engine's process.
    """
    outputs: dict[int, list[int]] = {}
    began = time.perf_counter()
    sampling = greedy(new_tokens)
    for chunk in engine.generate(input_ids=prompts, sampling_params=sampling, stream=True):
        if chunk["index"] not in outputs:
            began = time.perf_counter()
        outputs[chunk["index"]] = chunk["output_ids"]
    return [outputs[index] for index in sorted(outputs)], time.perf_counter() - began
