"""For a model that answers: questions about one document, and samples of one more request."""

from __future__ import annotations

import time
from typing import Any

from sglang_prefix.bench.engine import counter_difference, counters, flush, greedy
from sglang_prefix.bench.serving.engine_calls import full_batch, top_logprobs

__all__ = ["SAMPLED", "ask", "document_prompts", "questions", "read_document"]

# Country, capital, language, currency, river or coast.
_COUNTRIES = (
    ("France", "Paris", "French", "the euro", "the Seine"),
    ("Japan", "Tokyo", "Japanese", "the yen", "the Pacific Ocean"),
    ("Egypt", "Cairo", "Arabic", "the Egyptian pound", "the Nile"),
    ("Brazil", "Brasilia", "Portuguese", "the real", "the Amazon"),
    ("Italy", "Rome", "Italian", "the euro", "the Tiber"),
    ("Kenya", "Nairobi", "Swahili and English", "the shilling", "the Indian Ocean"),
    ("Canada", "Ottawa", "English and French", "the Canadian dollar", "the Ottawa River"),
    ("Spain", "Madrid", "Spanish", "the euro", "the Ebro"),
    ("India", "New Delhi", "Hindi and English", "the rupee", "the Ganges"),
    ("Norway", "Oslo", "Norwegian", "the krone", "the North Sea"),
    ("Peru", "Lima", "Spanish", "the sol", "the Pacific Ocean"),
    ("Greece", "Athens", "Greek", "the euro", "the Aegean Sea"),
    ("Poland", "Warsaw", "Polish", "the zloty", "the Vistula"),
    ("Turkey", "Ankara", "Turkish", "the lira", "the Black Sea"),
    ("Cuba", "Havana", "Spanish", "the peso", "the Caribbean Sea"),
    ("Austria", "Vienna", "German", "the euro", "the Danube"),
    ("Germany", "Berlin", "German", "the euro", "the Rhine"),
    ("China", "Beijing", "Chinese", "the yuan", "the Yangtze"),
    ("Thailand", "Bangkok", "Thai", "the baht", "the Chao Phraya"),
    ("Portugal", "Lisbon", "Portuguese", "the euro", "the Tagus"),
    ("Sweden", "Stockholm", "Swedish", "the krona", "the Baltic Sea"),
    ("Ireland", "Dublin", "English and Irish", "the euro", "the Liffey"),
    ("Mexico", "Mexico City", "Spanish", "the peso", "the Gulf of Mexico"),
    ("Vietnam", "Hanoi", "Vietnamese", "the dong", "the Red River"),
    ("Hungary", "Budapest", "Hungarian", "the forint", "the Danube"),
    ("Chile", "Santiago", "Spanish", "the peso", "the Pacific Ocean"),
    ("Finland", "Helsinki", "Finnish and Swedish", "the euro", "the Baltic Sea"),
    ("Morocco", "Rabat", "Arabic and Berber", "the dirham", "the Atlantic Ocean"),
    ("Russia", "Moscow", "Russian", "the ruble", "the Volga"),
    ("Denmark", "Copenhagen", "Danish", "the krone", "the North Sea"),
    ("Iceland", "Reykjavik", "Icelandic", "the krona", "the Atlantic Ocean"),
    ("Argentina", "Buenos Aires", "Spanish", "the peso", "the Rio de la Plata"),
)
_FACT = (
    "The capital of {0} is {1}. In {0} people speak {2}, and they pay with {3}. Travellers who "
    "come to {1} can be at {4} on the same day, and they will find that a guide to {0} who speaks "
    "{2} is not hard to find in {1}.\n"
)
_TASK = "Answer in one short sentence, with what this text says.\n\n"
_ASKED = (
    "What is the capital of {0}?",
    "Which language do people speak in {0}?",
    "What do people pay with in {0}?",
)
SAMPLED = "Write one sentence that invites a friend to Paris."
_TEMPERATURE = 0.7
_TOP = 5


def questions(count: int) -> list[str]:
    """The first ``count`` questions; up to 96 differ."""
    return [
        _ASKED[(number + number // len(_COUNTRIES)) % len(_ASKED)].format(
            *_COUNTRIES[number % len(_COUNTRIES)]
        )
        for number in range(count)
    ]


def document_prompts(tokenizer: Any, asked: list[str], document_tokens: int) -> list[list[int]]:
    """One prompt for each question, all about the same document.

    Args:
        tokenizer: a transformers tokenizer; one without a chat template gets plain text.
        asked: what is asked below the document.
        document_tokens: length of the document.

    Returns:
        Token ids of each request.
    """
    document = tokenizer.decode(_document(tokenizer, document_tokens))
    prompts = []
    for question in asked:
        messages = [
            {"role": "system", "content": _TASK + document},
            {"role": "user", "content": question},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    return prompts


def _document(tokenizer: Any, length: int) -> list[int]:
    """Exactly ``length`` tokens of facts."""
    tokens: list[int] = []
    while len(tokens) < length:
        for country in _COUNTRIES:
            tokens += tokenizer.encode(_FACT.format(*country), add_special_tokens=False)
    return tokens[:length]


def ask(engine: Any, prompts: list[list[int]], num_greedy: int, tokens: int) -> dict[str, Any]:
    """Answers to all prompts at once; runs in the engine's process, which has read the document.

    Args:
        engine: SGLang's.
        prompts: token ids of each request.
        num_greedy: so many are answered greedily, those after them are sampled.
        tokens: length of every answer.

    Returns:
        "tokens": ids by request. "logprobs": of the greedy ones, see `top_logprobs`. "ttft_s":
        seconds until each request has its first token. "first_s" and "rest_s": until all have it,
        and from there on. "step_us": see `full_batch`. "counters": what was added to them.
    """
    before = counters(engine)
    sampling = [
        greedy(tokens) | ({} if number < num_greedy else {"temperature": _TEMPERATURE})
        for number in range(len(prompts))
    ]
    times: dict[int, list[tuple[float, int]]] = {}
    newest: dict[int, dict[str, Any]] = {}
    began = time.perf_counter()
    for chunk in engine.generate(
        input_ids=prompts,
        sampling_params=sampling,
        stream=True,
        return_logprob=True,
        top_logprobs_num=_TOP,
    ):
        index, meta = chunk["index"], chunk["meta_info"]
        times.setdefault(index, []).append((time.perf_counter(), meta["completion_tokens"]))
        newest[index] = chunk
    done = [newest[index] for index in range(len(prompts))]
    finished = [times[index][-1][0] for index in range(len(prompts))]
    firsts = [times[index][0][0] for index in range(len(prompts))]
    return {
        "tokens": [one["output_ids"] for one in done],
        "logprobs": [top_logprobs(one["meta_info"]) for one in done[:num_greedy]],
        "ttft_s": [first - began for first in firsts],
        "first_s": max(firsts) - began,
        "rest_s": max(finished) - max(firsts),
        "step_us": full_batch(times[len(prompts) - 1], finished),
        "counters": counter_difference(before, counters(engine)),
    }


def read_document(engine: Any, prompt: list[int]) -> float:
    """Seconds to prefill a prompt, with which the cache begins anew; in that process, too."""
    flush(engine)
    began = time.perf_counter()
    engine.generate(input_ids=[prompt], sampling_params=greedy(1))
    return time.perf_counter() - began
