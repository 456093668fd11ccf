"""The server, started through the CLI and spoken to over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from sglang_prefix.api_key import ApiKey, ask
from sglang_prefix.backend.counters import KINDS
from sglang_prefix.bench.engine import counter_difference
from sglang_prefix.bench.serving.drivers import start_client
from sglang_prefix.bench.serving.servers import (
    RunningServer,
    describe,
    launch,
    wait_until_ready,
)
from sglang_prefix.bench.serving.workloads import load_workloads
from sglang_prefix.cli import watch
from sglang_prefix.cli.main import app
from sglang_prefix.explain.record import read_record
from sglang_prefix.explain.segments import explain
from tests.dashboard import queries, unknown_names
from tests.engine.comparisons import assert_packed
from tests.engine.releases import BACKEND_FLAG

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).parents[2] / "examples"
CLI = (sys.executable, "-m", "sglang_prefix.cli.main", "exec", "--")
START_S = 600
CALL_S = 120
# The server has one, so that everything that speaks to it proves to send it.
KEY = ApiKey("SGLANG_API_KEY", "s3cr3t-key-of-the-test")


class Server:
    """A server with the backend."""

    def __init__(self, running: RunningServer, model: str) -> None:
        self.running, self.url, self.model = running, running.url, model

    def get(self, path: str) -> str:
        """A page."""
        return ask(self.url + path, KEY, timeout_s=CALL_S).decode()

    def generate(self, text: str, n: int, max_new_tokens: int) -> list[dict[str, Any]]:
        """Parallel samples of a prompt, all alike."""
        sampling = {"n": n, "temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        body: dict[str, Any] = {"text": text, "sampling_params": sampling}
        url = f"{self.url}/generate"
        answer = requests.post(url, json=body, timeout=CALL_S, headers=KEY.headers)
        found: list[dict[str, Any]] = answer.json()
        return found

    def stream(self, text: str, max_new_tokens: int) -> None:
        """A request whose answer comes in pieces."""
        sampling = {"max_new_tokens": max_new_tokens, "ignore_eos": True}
        body: Any = {"text": text, "sampling_params": sampling, "stream": True}
        url = f"{self.url}/generate"
        assert requests.post(url, json=body, timeout=CALL_S, headers=KEY.headers).content

    def counters(self) -> dict[str, Any]:
        """All counters of the backend."""
        (backend,) = json.loads(self.get("/server_info"))["internal_states"][0]["sglang_prefix"]
        return dict(backend)

    def metrics(self) -> dict[str, float]:
        """Our totals by name and the labels that we add."""
        families = text_string_to_metric_families(self.get("/metrics"))
        samples = [s for f in families for s in f.samples if s.name.startswith("sglang_prefix_")]
        found = {}
        for sample in (s for s in samples if s.name.endswith("_total")):
            assert sample.labels.pop("model_name") == self.model
            assert sample.labels.pop("tp_rank") == "0"
            ours = [sample.labels[n] for n in ("kind", "path", "reason") if n in sample.labels]
            found["/".join([sample.name, *ours])] = sample.value
        return found

    @contextlib.contextmanager
    def shares(self, max_ratio: float) -> Iterator[None]:
        """A block that is packed, and reads less KV than ``max_ratio``."""
        before = self.counters()
        yield
        assert_packed(counter_difference(before, self.counters()), max_ratio)


@pytest.fixture(scope="module")
def server(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the backend; the last test of this module ends it."""
    flags = ["--model-path", models["llama"], "--device", "cpu", "--dtype", "float32"]
    flags += [f"--{BACKEND_FLAG.replace('_', '-')}", "prefix"]
    flags += ["--mem-fraction-static", "0.7", "--max-total-tokens", "20000"]
    flags += ["--enable-metrics", "--decode-log-interval", "5", "--api-key", str(KEY.value)]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SGLANG_PREFIX_KEEP_PLAN": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    running = launch("prefix", flags, None, log, settings)
    try:
        wait_until_ready(running, START_S)
        running.key = KEY
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
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | KEY.environment,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_parallel_samples_share_their_prompt(server: Server) -> None:
    with server.shares(0.4):
        answers = server.generate("Every branch grows from the same trunk. " * 12, 8, 24)
    assert len(answers) == 8
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1


def test_explain_shows_the_last_plan(server: Server, tmp_path: Path) -> None:
    target, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    arguments = ["--base-url", server.url, "--json", str(target), "--svg", str(picture)]
    for _ in range(5):  # a sample may come late, and then decodes the last tokens alone
        server.generate("Roots drink first. " * 30, 5, 12)
        shown = CliRunner().invoke(app, ["explain", *arguments], env=KEY.environment)
        assert shown.exit_code == 0, shown.output
        explanation = explain(read_record(target))
        if len(explanation.segments) == 6:
            break
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
    # SGLang's answer holds the server's key; ours do not.
    assert str(KEY.value) in server.get("/server_info")
    assert str(KEY.value) not in target.read_text() + picture.read_text() + shown.output


def test_watch_shows_what_came_since_the_last_look(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests between two looks, then Ctrl-C."""
    before, now = server.counters(), 0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 2
        if now > 2:
            raise KeyboardInterrupt
        server.generate("Buds open late. " * 30, 6, 16)

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now, strftime=time.strftime)
    monkeypatch.setattr(watch, "time", clock)
    arguments = ["explain", "--base-url", server.url, "--watch", "--interval", "0.2"]
    shown = CliRunner().invoke(app, arguments, env=KEY.environment)
    assert shown.exit_code == 0, shown.output
    first, second = shown.stdout.splitlines()
    after = counter_difference(before, server.counters())
    assert f" total: decode steps {before['packed_steps']:,}, packed 100.0%, " in first
    assert f" last 2.0 s: decode steps {after['packed_steps'] / 2:.1f}/s, " in second
    interval, total = second.split("; total: ")
    assert f"KV read ratio {after['kv_read_ratio']:.3f}, " in interval
    assert f"KV read ratio {server.counters()['kv_read_ratio']:.3f}, " in total
    newest = server.counters()
    for kind, counts in (("decode steps", newest), ("extends", newest["extend"])):
        assert f"newest plan for {kind}: {counts['num_packs']} pack" in total
    extends = after["extend"]["packed_steps"] + after["extend"]["stock_steps"]
    assert f", extends {extends / 2:.1f}/s, packed " in interval
    assert str(KEY.value) not in shown.output


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "wants a key; legal: one in --api-key or SGLANG_API_KEY or OPENAI_API_KEY"),
        (["--api-key", "wrong"], "the key of --api-key is not its own; legal: its key, in --api-k"),
    ],
)
def test_a_wrong_key_or_none_is_told_in_one_line(
    server: Server, given: list[str], told: str
) -> None:
    refused = CliRunner().invoke(app, ["explain", "--base-url", server.url, *given])
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert told in line
    assert "wrong" not in line


def test_the_load_generator_sends_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every driver of `bench serving`, in this process instead of its own."""
    assert describe(server.running)["model"] == server.model
    for name, value in KEY.environment.items():
        monkeypatch.setenv(name, value)
    client, _ = start_client(model=server.model, tokenizer=None, trace=None, seed=0)
    for workload in load_workloads(quick=True, names=["shared-prefix", "rollouts", "forks"]):
        client.prepare(workload)
        assert client.check(workload.name, server.url)
        assert client.measure(workload.name, server.url)["output_tokens"] > 0
    monkeypatch.setenv("SGLANG_API_KEY", "wrong")
    with pytest.raises(RuntimeError, match="flush_cache: the server answers 401"):
        client.check("rollouts", server.url)


def test_the_counters_stand_on_metrics_and_move(server: Server) -> None:
    counters, before = server.counters(), server.metrics()  # the first call brings the second up
    name = "sglang_prefix_{}_total".format
    assert before[name("plans") + "/decode"] == counters["plans"]
    assert before[name("steps") + "/decode/packed"] == counters["packed_steps"]
    server.generate("A root. " * 40, 6, 30)
    counters, after = server.counters(), server.metrics()
    assert counters["plans"] > before[name("plans") + "/decode"]
    for kind in KINDS:
        counts = counters if kind == "decode" else counters[kind]
        assert after[f"{name('plans')}/{kind}"] == counts["plans"]
        for path in ("packed", "stock", "fallback"):
            assert after[f"{name('steps')}/{kind}/{path}"] == counts[f"{path}_steps"]
        for tokens in ("kv_tokens_read", "kv_tokens_logical"):
            assert after[f"{name(tokens)}/{kind}"] == counts[tokens]
    added = {key: value - before.get(key, 0) for key, value in after.items()}
    assert added[name("steps") + "/decode/packed"] > 0
    read, logical = (added[name(f"kv_tokens_{key}") + "/decode"] for key in ("read", "logical"))
    assert 0 < read < 0.4 * logical


def test_the_dashboard_names_metrics_and_labels_that_there_are(server: Server) -> None:
    """Without Prometheus, which `test_dashboard.py` has."""
    server.generate("A branch. " * 40, 4, 8)
    server.stream("A branch. " * 40, 8)
    samples = defaultdict(list)
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            samples[sample.name].append(sample.labels)
    unknown = [name for _, query in queries() for name in unknown_names(query, samples)]
    assert unknown == []


def test_the_log_says_what_was_packed(server: Server) -> None:
    assert server.running.log is not None
    log = server.running.log.read_text(errors="replace")
    assert "prefix attention: 2 of 2 layers, executor native, stock backend torch_native" in log
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
