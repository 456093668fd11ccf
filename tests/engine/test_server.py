"""The server, started through the CLI and spoken to over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from sglang_prefix.bench.serving.servers import (
    RunningServer,
    launch,
    wait_until_ready,
)
from sglang_prefix.cli.main import app
from sglang_prefix.explain.record import read_record
from sglang_prefix.explain.segments import explain
from tests.engine.releases import BACKEND_FLAG, has

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples"
CLI = (sys.executable, "-m", "sglang_prefix.cli.main", "exec", "--")
START_S = 240
CALL_S = 120


class Server:
    """A server with the backend."""

    def __init__(self, running: RunningServer, model: str) -> None:
        self.running, self.url, self.model = running, running.url, model

    def call(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The answer to a request: GET, or POST of a body."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=CALL_S) as answer:
            text: bytes = answer.read()
        return text

    def generate(self, text: str, n: int, max_new_tokens: int) -> list[dict[str, Any]]:
        """Parallel samples of a prompt, all alike."""
        sampling = {"n": n, "temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        answer = self.call("/generate", {"text": text, "sampling_params": sampling})
        found: list[dict[str, Any]] = json.loads(answer)
        return found

    def counters(self) -> dict[str, Any]:
        """All counters of the backend."""
        (backend,) = json.loads(self.call("/server_info"))["internal_states"][0]["sglang_prefix"]
        return dict(backend)

    def metrics(self) -> dict[str, float]:
        """Our metrics by name, labels other than those that we add summed over."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.call("/metrics").decode()):
            for sample in family.samples:
                if sample.name.startswith("sglang_prefix_") and sample.name.endswith("_total"):
                    path = sample.labels.get("path", sample.labels.get("reason"))
                    name = sample.name + (f"/{path}" if path else "")
                    found[name] = found.get(name, 0.0) + sample.value
                    assert sample.labels["model_name"] == self.model
                    assert sample.labels["tp_rank"] == "0"
        return found

    @contextlib.contextmanager
    def shares(self, max_ratio: float) -> Iterator[None]:
        """A block that is packed, and reads less KV than ``max_ratio``."""
        before = self.counters()
        yield
        after = self.counters()
        added = {name: after[name] - before[name] for name in after if name.endswith("_steps")}
        others = added["stock_steps"] + added["fallback_steps"]
        assert added["packed_steps"] >= max(1, 0.9 * (added["packed_steps"] + others))
        read, logical = (after[n] - before[n] for n in ("kv_tokens_read", "kv_tokens_logical"))
        assert read / logical < max_ratio


@pytest.fixture(scope="module")
def server(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the backend; the last test of this module ends it."""
    flags = ["--model-path", models["llama"], "--device", "cpu", "--dtype", "float32"]
    flags += [f"--{BACKEND_FLAG.replace('_', '-')}", "prefix"]
    flags += ["--mem-fraction-static", "0.7", "--max-total-tokens", "20000"]
    flags += ["--enable-metrics", "--decode-log-interval", "5"]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SGLANG_PREFIX_KEEP_PLAN": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    running = launch("prefix", flags, None, log, settings)
    try:
        wait_until_ready(running, START_S)
        yield Server(running, models["llama"])
    finally:
        running.stop()


def run_program(*command: str) -> str:
    """Run a client to its end and return what it printed."""
    done = subprocess.run(
        [*CLI, sys.executable, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_parallel_samples_share_their_prompt(server: Server) -> None:
    with server.shares(0.4):
        answers = server.generate("Every branch grows from the same trunk. " * 12, 8, 24)
    assert len(answers) == 8
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1


def test_chat_completions_share_their_prompt(server: Server) -> None:
    message = {"role": "user", "content": "Name a tree that keeps its leaves. " * 14}
    body = {"model": server.model, "messages": [message], "n": 6, "temperature": 0}
    with server.shares(0.4):
        answer = server.call("/v1/chat/completions", body | {"max_tokens": 20, "ignore_eos": True})
    texts = [choice["message"]["content"] for choice in json.loads(answer)["choices"]]
    assert len(texts) == 6
    assert len(set(texts)) == 1


def test_explain_shows_the_last_plan(server: Server, tmp_path: Path) -> None:
    server.generate("Roots drink first. " * 30, 5, 12)
    target, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    arguments = ["--base-url", server.url, "--json", str(target), "--svg", str(picture)]
    shown = CliRunner().invoke(app, ["explain", *arguments])
    assert shown.exit_code == 0, shown.output
    explanation = explain(read_record(target))
    counters = server.counters()
    assert explanation.stats.num_packs == counters["num_packs"]
    assert explanation.stats.num_partials == counters["num_partials"]
    (node, *tails) = explanation.segments
    assert node.num_readers == len(tails) == 5
    assert node.tokens > 100
    assert explanation.record.answer.reason is None
    assert f"node 0: {node.tokens:,} tokens, 5 readers" in shown.output
    # Counts, and not a word of the prompt.
    assert "Roots" not in target.read_text() + json.dumps(counters)


@pytest.mark.extended  # `test_bench_serving.py` has the same load and more
def test_bench_serving_with_shared_prefixes(server: Server, tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    flags = f"""
        --backend sglang --base-url {server.url}
        --model {server.model} --tokenizer {server.model}
        --dataset-name generated-shared-prefix --gsp-num-groups 2 --gsp-prompts-per-group 8
        --gsp-system-prompt-len 400 --gsp-question-len 16 --gsp-output-len 24
        --num-prompts 16 --request-rate inf --max-concurrency 16 --seed 1 --flush-cache
        --output-file {report}
    """.split()
    if has("shared-prefixes-as-tokens"):
        flags.append("--tokenize-prompt")
    with server.shares(0.4):
        run_program("-m", "sglang.bench_serving", *flags)
    assert json.loads(report.read_text().splitlines()[-1])["completed"] == 16


def test_the_counters_stand_on_metrics_and_move(server: Server) -> None:
    counters, before = server.counters(), server.metrics()  # the first call brings the second up
    assert before["sglang_prefix_plans_total"] == counters["plans"]
    assert before["sglang_prefix_steps_total/packed"] == counters["packed_steps"]
    server.generate("A root. " * 40, 6, 30)
    counters, after = server.counters(), server.metrics()
    assert after["sglang_prefix_plans_total"] == counters["plans"]
    assert counters["plans"] > before["sglang_prefix_plans_total"]
    for path in ("packed", "stock", "fallback"):
        assert after[f"sglang_prefix_steps_total/{path}"] == counters[f"{path}_steps"]
    assert after["sglang_prefix_steps_total/packed"] > before["sglang_prefix_steps_total/packed"]
    read, logical = (
        after[name] - before[name]
        for name in ("sglang_prefix_kv_tokens_read_total", "sglang_prefix_kv_tokens_logical_total")
    )
    assert 0 < read < 0.4 * logical


def test_the_log_says_what_was_packed(server: Server) -> None:
    assert server.running.log is not None
    log = server.running.log.read_text(errors="replace")
    assert "prefix attention: 2 of 2 layers, executor torch, stock backend torch_native" in log
    lines = [line for line in log.splitlines() if "Decode batch" in line]
    assert lines
    assert all("prefix packed: " in line for line in lines)
    assert any(re.search(r"prefix packed: 100%, .*prefix kv read: 0\.\d\d", line) for line in lines)


# The programs in examples/ that need a server run against this one.


def test_example_of_the_frontend_language(server: Server) -> None:
    with server.shares(0.6):
        printed = run_program(str(EXAMPLES / "frontend_fork.py"), "--base-url", server.url)
    assert printed.count("->") == 4


def test_example_of_the_openai_client(server: Server) -> None:
    example = str(EXAMPLES / "openai_n.py")
    with server.shares(0.6):
        printed = run_program(example, "--base-url", server.url, "--n", "8")
    assert len(printed.strip().splitlines()) >= 8


def test_sigterm_ends_the_server_and_all_its_processes(server: Server) -> None:
    assert server.running.process is not None
    (process,) = psutil.Process(server.running.process.pid).children()
    below = process.children(recursive=True)
    assert below
    process.terminate()
    _, left = psutil.wait_procs([process, *below], timeout=60)
    # A zombie has ended, whoever is to reap it.
    assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.extended  # an engine of its own, and nothing that the server has not
def test_example_of_the_offline_engine(models: dict[str, str]) -> None:
    printed = run_program(str(EXAMPLES / "offline_rollouts.py"), "--model-path", models["llama"])
    assert printed.count("sample") >= 16
    ratio = float(printed.rsplit("KV tokens read / KV tokens:", 1)[1].split()[0])
    assert ratio < 0.4
