"""The demo's forked workload: one system prompt, branches, and questions below each branch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

__all__ = ["ForkedWorkload", "build_workload", "decode"]

_RULE = "Rule {n}: an answer names its source, states its unit, and says when it is not sure. "
_TOPIC = "Part {n} deals with case {n}: read what follows as a note taken on day {n}, in order. "
_QUESTION = "Question {n}: what follows from case {n}, and for whom?"


@dataclass(frozen=True, slots=True)
class ForkedWorkload:
    """Prompts as token ids, with what they share.

    Attributes:
        prompts: one list of token ids per request.
        system_tokens, branch_tokens: lengths of the two shared levels.
        num_branches: branches below the system prompt; the requests are spread over them evenly.
        new_tokens: tokens to generate for each request.
    """

    prompts: list[list[int]]
    system_tokens: int
    branch_tokens: int
    num_branches: int
    new_tokens: int

    @property
    def ideal_read_ratio(self) -> float:
        """KV tokens with every shared one read once, over all KV tokens, halfway through decode."""
        logical = sum(len(p) + self.new_tokens // 2 for p in self.prompts)
        shared = (len(self.prompts) - 1) * self.system_tokens
        shared += (len(self.prompts) - self.num_branches) * self.branch_tokens
        return (logical - shared) / logical


def build_workload(
    tokenizer: Any,
    *,
    num_requests: int,
    system_tokens: int,
    branch_tokens: int,
    num_branches: int,
    new_tokens: int,
) -> ForkedWorkload:
    """Write the prompts as text and cut them to length as token ids.

    Args:
        tokenizer: a transformers tokenizer.
        num_requests: questions in all, spread evenly over the branches.
        system_tokens, branch_tokens: tokens of the system prompt and of each branch.
        num_branches: branches below the system prompt.
        new_tokens: tokens to generate for each request.
    """
    system = _filled(tokenizer, _RULE, 1, system_tokens)
    branches = [_filled(tokenizer, _TOPIC, n + 1, branch_tokens) for n in range(num_branches)]
    prompts = []
    for request in range(num_requests):
        question = _QUESTION.format(n=request + 1) * (1 + request % 2)  # of uneven length
        tail = tokenizer.encode(question, add_special_tokens=False)
        prompts.append(system + branches[request % num_branches] + tail)
    return ForkedWorkload(prompts, system_tokens, branch_tokens, num_branches, new_tokens)


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
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    outputs: dict[int, list[int]] = {}
    began = time.perf_counter()
    for chunk in engine.generate(input_ids=prompts, sampling_params=sampling, stream=True):
        if chunk["index"] not in outputs:
            began = time.perf_counter()
        outputs[chunk["index"]] = chunk["output_ids"]
    return [outputs[index] for index in sorted(outputs)], time.perf_counter() - began
