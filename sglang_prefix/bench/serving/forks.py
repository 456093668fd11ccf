"""Forks of several levels through SGLang's frontend language; runs in the client process.

The language has no load generator of its own. Its endpoint is extended so that every ``gen``
streams and its tokens are timed; what it sends is the language's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sglang as sgl

from prefix_patches import load_generator
from sglang_prefix.bench.serving.drivers import Answer, fingerprint, summarize
from sglang_prefix.bench.serving.workloads import Forks

__all__ = ["ForkDriver"]

_DOCUMENT = "Rule {n} of part {part}: an answer names its source and says when it is not sure. "
_SECTION = "Note {n} on case {part}: read it as taken on that day, in this order. "
_QUESTION = "\nQuestion {part}: what follows from note {n}, and for whom?\nAnswer:"
_TIMES = "sglang_prefix_times"


def _timed(chunks: Iterable[tuple[str, dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    """An answer from its stream, with its times in its meta information."""
    answer = Answer(time.perf_counter())
    meta: dict[str, Any] = {}
    for text, meta in chunks:
        answer.take({"text": answer.text + text, "meta_info": meta})
    if not answer.chunks:
        raise RuntimeError("the server ended a stream before its first token")
    return answer.text, {**meta, _TIMES: answer}


@sgl.function  # type: ignore[untyped-decorator]
def _tree(
    s: Any, document: str, sections: list[str], questions: list[str], tokens: int, ids: bool
) -> None:
    """One document; all sections below it at once, all questions below each at once."""
    s += document
    s.text()  # `fork` sends the common prefix ahead only if its text is already known
    branches = s.fork(len(sections))
    leaves = []
    for section, branch in zip(sections, branches, strict=True):
        branch += section
        branch.text()
        below = branch.fork(len(questions))
        for question, leaf in zip(questions, below, strict=True):
            leaf += question
            leaf += sgl.gen(
                "answer",
                max_tokens=tokens,
                temperature=0,
                ignore_eos=True,
                return_logprob=ids or None,
            )
        leaves += list(below)
    s["answers"] = [leaf.get_meta_info("answer") for leaf in leaves]


class ForkDriver:
    """Trees of text through the frontend language; all documents at once."""

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
        """See :class:`~sglang_prefix.bench.serving.drivers.Driver`."""
        return fingerprint(self._trees)

    def check(self, url: str) -> list[list[int]]:
        """See :class:`~sglang_prefix.bench.serving.drivers.Driver`."""
        answers = self._run(load_generator.endpoint(url), ids=True)
        # Of each token its log probability, its id and, perhaps, its text.
        return [[token[1] for token in meta["output_token_logprobs"]] for meta in answers]

    def measure(self, url: str) -> dict[str, Any]:
        """See :class:`~sglang_prefix.bench.serving.drivers.Driver`."""
        endpoint = load_generator.streaming_endpoint(url, _timed)
        began = time.perf_counter()
        answers = self._run(endpoint, ids=False)
        return summarize([meta[_TIMES] for meta in answers], time.perf_counter() - began)

    def _run(self, endpoint: Any, *, ids: bool) -> list[dict[str, Any]]:
        jobs = [tree | {"ids": ids} for tree in self._trees]
        with ThreadPoolExecutor(len(jobs)) as pool:
            states = list(pool.map(lambda job: _tree.run(**job, backend=endpoint), jobs))
        for state in states:
            if (error := state.error()) is not None:
                raise RuntimeError(f"the frontend language failed: {error}")
        answers: list[dict[str, Any]] = [meta for state in states for meta in state["answers"]]
        if not all(answers):
            raise RuntimeError("the frontend language lost an answer: did the server fail?")
        return answers
