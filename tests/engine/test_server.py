"""The server, started through the CLI and spoken to over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from sglang_prefix.bench.engine import free_port, kill_session
from sglang_prefix.cli.main import app
from sglang_prefix.explain.record import read_record
from sglang_prefix.explain.segments import explain
from tests.engine.releases import BACKEND_FLAG, has

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples"
CLI = (sys.executable, "-m", "sglang_prefix.cli.main", "exec", "--")
START_S = 240
CALL_S = 120


@dataclass
class Server:
    """A server that runs."""

    process: subprocess.Popen[bytes]
    port: int
    model: str
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=CALL_S) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def counters(self) -> dict[str, Any]:
        (backend,) = self.call("/server_info")["internal_states"][0]["sglang_prefix"]
        return dict(backend)

    def metrics(self) -> dict[str, float]:
        """Our metrics by name, labels other than those that we add summed over."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=CALL_S) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("sglang_prefix_") and sample.name.endswith("_total"):
                    path = sample.labels.get("path", sample.labels.get("reason"))
                    name = sample.name + (f"/{path}" if path else "")
                    found[name] = found.get(name, 0.0) + sample.value
                    assert sample.labels["model_name"] == self.model
                    assert sample.labels["tp_rank"] == "0"
        return found

    def is_healthy(self) -> bool:
        try:
            self.call("/health")
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def server(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the backend; the last test of this module ends it."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    flags = ["--device", "cpu", "--dtype", "float32"]
    flags += [f"--{BACKEND_FLAG.replace('_', '-')}", "prefix"]
    flags += ["--mem-fraction-static", "0.7", "--max-total-tokens", "20000"]
    flags += ["--enable-metrics", "--decode-log-interval", "5"]
    flags += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*CLI, "sglang", "serve", "--model-path", models["llama"], *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SGLANG_PREFIX_KEEP_PLAN": "1"},
            start_new_session=True,
        )
    running = Server(process, port, models["llama"], log)
    try:
        deadline = time.monotonic() + START_S
        while not running.is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield running
    finally:
        kill_session(process)


def running_in_session(session: int) -> list[str]:
    """The processes of a session that have not ended; zombies have, whoever is to reap them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, its_session = file.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(file.read_text())
    return found


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
    before = server.counters()
    sampling = {"n": 8, "temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    prompt = "Every branch grows from the same trunk. " * 12
    answers = server.call("/generate", {"text": prompt, "sampling_params": sampling})
    assert len(answers) == 8
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1
    assert_shared(before, server.counters(), 0.4)


def test_chat_completions_share_their_prompt(server: Server) -> None:
    before = server.counters()
    message = {"role": "user", "content": "Name a tree that keeps its leaves. " * 14}
    answer = server.call(
        "/v1/chat/completions",
        {
            "model": server.model,
            "messages": [message],
            "n": 6,
            "temperature": 0,
            "max_tokens": 20,
            "ignore_eos": True,
        },
    )
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(texts) == 6
    assert len(set(texts)) == 1
    assert_shared(before, server.counters(), 0.4)


def test_explain_shows_the_last_plan(server: Server, tmp_path: Path) -> None:
    sampling = {"n": 5, "temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    server.call("/generate", {"text": "Roots drink first. " * 30, "sampling_params": sampling})
    target, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    arguments = ["--base-url", server.url, "--json", str(target), "--svg", str(picture)]
    shown = CliRunner().invoke(app, ["explain", *arguments])
    assert shown.exit_code == 0, shown.output
    explanation = explain(read_record(target))
    counters = server.counters()
    assert explanation.stats.num_packs == counters["num_packs"]
    assert explanation.stats.num_partials == counters["num_partials"]
    (node, *tails) = explanation.parts
    assert node.num_readers == len(tails) == 5
    assert node.tokens > 100
    assert explanation.record.answer.reason is None
    assert f"node 0: {node.tokens:,} tokens, 5 readers" in shown.output
    # Counts, and not a word of the prompt.
    assert "Roots" not in target.read_text() + json.dumps(counters)


@pytest.mark.extended  # `test_bench_serving.py` has the same load and more
def test_bench_serving_with_shared_prefixes(server: Server, tmp_path: Path) -> None:
    before = server.counters()
    report = tmp_path / "report.jsonl"
    flags = f"""
        --backend sglang --host 127.0.0.1 --port {server.port}
        --model {server.model} --tokenizer {server.model}
        --dataset-name generated-shared-prefix --gsp-num-groups 2 --gsp-prompts-per-group 8
        --gsp-system-prompt-len 400 --gsp-question-len 16 --gsp-output-len 24
        --num-prompts 16 --request-rate inf --max-concurrency 16 --seed 1 --flush-cache
        --output-file {report}
    """.split()
    if has("shared-prefixes-as-tokens"):
        flags.append("--tokenize-prompt")
    run_program("-m", "sglang.bench_serving", *flags)
    assert json.loads(report.read_text().splitlines()[-1])["completed"] == 16
    assert_shared(before, server.counters(), 0.4)


def test_the_counters_stand_on_metrics_and_move(server: Server) -> None:
    counters, before = server.counters(), server.metrics()  # the first call brings the second up
    assert before["sglang_prefix_plans_total"] == counters["plans"]
    assert before["sglang_prefix_steps_total/packed"] == counters["packed_steps"]
    sampling = {"n": 6, "temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
    server.call("/generate", {"text": "A root. " * 40, "sampling_params": sampling})
    counters, after = server.counters(), server.metrics()
    assert (
        after["sglang_prefix_plans_total"]
        == counters["plans"]
        > before["sglang_prefix_plans_total"]
    )
    for path in ("packed", "stock", "fallback"):
        assert after[f"sglang_prefix_steps_total/{path}"] == counters[f"{path}_steps"]
    assert after["sglang_prefix_steps_total/packed"] > before["sglang_prefix_steps_total/packed"]
    read, logical = (
        after[name] - before[name]
        for name in ("sglang_prefix_kv_tokens_read_total", "sglang_prefix_kv_tokens_logical_total")
    )
    assert 0 < read < 0.4 * logical


def test_the_log_says_what_was_packed(server: Server) -> None:
    log = server.log.read_text(errors="replace")
    assert "prefix attention: 2 of 2 layers, executor torch, stock backend torch_native" in log
    lines = [line for line in log.splitlines() if "Decode batch" in line]
    assert lines
    assert all("prefix packed: " in line for line in lines)
    assert any(re.search(r"prefix packed: 100%, .*prefix kv read: 0\.\d\d", line) for line in lines)


# The programs in examples/ that need a server run against this one.


def test_example_of_the_frontend_language(server: Server) -> None:
    before = server.counters()
    printed = run_program(str(EXAMPLES / "frontend_fork.py"), "--base-url", server.url)
    assert printed.count("->") == 4
    assert_shared(before, server.counters(), 0.6)


def test_example_of_the_openai_client(server: Server) -> None:
    before = server.counters()
    printed = run_program(str(EXAMPLES / "openai_n.py"), "--base-url", server.url, "--n", "8")
    assert len(printed.strip().splitlines()) >= 8
    assert_shared(before, server.counters(), 0.6)


def test_sigterm_ends_the_server_and_all_its_processes(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    assert not server.is_healthy()
    deadline = time.monotonic() + 30
    while left := running_in_session(server.process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.extended  # an engine of its own, and nothing that the server has not
def test_example_of_the_offline_engine(models: dict[str, str]) -> None:
    printed = run_program(str(EXAMPLES / "offline_rollouts.py"), "--model-path", models["llama"])
    assert printed.count("sample") >= 16
    ratio = float(printed.rsplit("KV tokens read / KV tokens:", 1)[1].split()[0])
    assert ratio < 0.4


def assert_shared(before: dict[str, Any], after: dict[str, Any], max_ratio: float) -> None:
    """What happened in between was packed, and read less KV than ``max_ratio``."""
    packed = after["packed_steps"] - before["packed_steps"]
    others = sum(after[name] - before[name] for name in ("stock_steps", "fallback_steps"))
    assert packed >= max(1, 0.9 * (packed + others))
    read = after["kv_tokens_read"] - before["kv_tokens_read"]
    logical = after["kv_tokens_logical"] - before["kv_tokens_logical"]
    assert read / logical < max_ratio
