"""SmolLM2 in the real engine: questions about a document get stock's answers, and true ones.

Where the model is neither in the cache nor can be fetched, the tests are skipped and say so.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sglang_prefix.bench.engine import EngineProcess, engine_environment
from sglang_prefix.bench.hooks import decode_watch
from sglang_prefix.bench.serving.compare import compare_logprobs
from sglang_prefix.bench.serving.questions import document_prompts, questions
from sglang_prefix.explain.sources import load_tokenizer
from sglang_prefix.files import write_file
from sglang_prefix.smollm2 import build_smollm2
from tests.engine.comparisons import LOGPROB_TOLERANCE
from tests.engine.releases import BACKEND_FLAG

# Extended for its seconds: two engines, over a minute.
pytestmark = [pytest.mark.engine, pytest.mark.extended, pytest.mark.timeout(900)]

NUM_QUESTIONS, TOKENS, DOCUMENT_TOKENS = 8, 10, 300
LOAD = "sglang_prefix.bench.serving.questions"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was answered by an engine without our backend, and by one with it in each mode."""
    root = tmp_path_factory.mktemp("smollm2")
    model = root / "model"
    try:
        build_smollm2(model)
    except RuntimeError as error:
        pytest.skip(f"no real model: {error}")
    tokenizer = load_tokenizer(str(model))
    prompts = document_prompts(tokenizer, questions(NUM_QUESTIONS), DOCUMENT_TOKENS)
    load = {"prompts": prompts, "num_greedy": NUM_QUESTIONS, "tokens": TOKENS}
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        alone = stack.enter_context(start(root / "alone", model, attention_backend="torch_native"))
        ours = stack.enter_context(start(root / "ours", model, **{BACKEND_FLAG: "prefix"}))
        for engine in (alone, ours):
            engine.ask(f"{LOAD}:read_document", prompt=prompts[0])
        found["alone"] = engine_answers(alone, load)
        for mode in ("stock", "prefix", "zeros"):
            write_file(decode_watch.mode_file(root / "ours"), mode)
            found[mode] = engine_answers(ours, load)
        times = {mode: decode_watch.step_times(root / "ours", mode) for mode in ("stock", "prefix")}
    for mode, measured in times.items():
        found[mode]["times"] = measured
    for one in found.values():
        one["texts"] = [tokenizer.decode(tokens) for tokens in one["tokens"]]
    return found


def start(folder: Path, model: Path, **arguments: Any) -> EngineProcess:
    """An engine, watched if our backend decodes in it."""
    folder.mkdir()
    settings = {decode_watch.FOLDER_VARIABLE: str(folder), "OMP_NUM_THREADS": "1"}
    given = {"model_path": str(model), "device": "cpu", "dtype": "float32", "random_seed": 0}
    given["sleep_on_idle"] = True  # the other engine needs the core
    return EngineProcess(
        {**given, "max_total_tokens": 8000, "mem_fraction_static": 0.7, **arguments},
        environment=engine_environment(settings, hooks=[decode_watch.__name__]),
        log=folder / "log",
    )


def engine_answers(engine: EngineProcess, load: dict[str, Any]) -> dict[str, Any]:
    """See `questions.ask`."""
    found: dict[str, Any] = engine.ask(f"{LOAD}:ask", **load)
    return found


@pytest.mark.parametrize("mode", ["stock", "prefix"])
def test_answers_are_those_of_an_engine_without_us(
    mode: str, answers: dict[str, dict[str, Any]]
) -> None:
    """Up to a tie of two best tokens, where both go on as they like."""
    compared = compare_logprobs(answers[mode]["logprobs"], answers["alone"]["logprobs"])
    assert compared["positions"] > NUM_QUESTIONS * TOKENS / 2
    assert compared["max"] < LOGPROB_TOLERANCE
    assert "The capital of France is Paris." in answers[mode]["texts"][0]


def test_prefix_decode_packs_and_stock_decode_does_not(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["alone"]["counters"] == {}
    stock, prefix = answers["stock"]["counters"], answers["prefix"]["counters"]
    assert (stock["packed_steps"], prefix["stock_steps"], prefix["fallback_steps"]) == (0, 0, 0)
    assert stock["stock_steps"] >= TOKENS - 1
    assert prefix["packed_steps"] >= TOKENS - 1
    assert prefix["kv_read_ratio"] < 0.4
    for mode in ("stock", "prefix"):
        times = answers[mode]["times"]
        assert 0 < times["attention_ms"] < times["step_ms"]


def test_broken_decode_changes_answers(answers: dict[str, dict[str, Any]]) -> None:
    pairs = zip(answers["zeros"]["tokens"], answers["alone"]["tokens"], strict=True)
    assert sum(broken != whole for broken, whole in pairs) > NUM_QUESTIONS / 2
