"""The queries of the Grafana dashboard, by a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_prefix.bench.engine import free_port
from sglang_prefix.bench.serving.servers import launch, wait_until_ready
from tests.dashboard import queries, variables
from tests.engine.releases import BACKEND_FLAG

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.extended,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus in PATH (Debian has it)"),
]

SCRAPE_S = 1


@pytest.fixture(scope="module")
def server(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that packs, and leaves to stock what shares nothing, as the executor torch does."""
    flags = ["--model-path", models["llama"], "--device", "cpu", "--dtype", "float32"]
    flags += [f"--{BACKEND_FLAG.replace('_', '-')}", "prefix", "--enable-metrics"]
    flags += ["--mem-fraction-static", "0.7", "--max-total-tokens", "20000"]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SGLANG_PREFIX_EXECUTOR": "torch"}
    running = launch("prefix", flags, None, tmp_path_factory.mktemp("server") / "log", settings)
    try:
        wait_until_ready(running, 600)
        yield running.url
    finally:
        running.stop()


@pytest.fixture(scope="module")
def prometheus(
    server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, float]]:
    """A Prometheus that has scraped the server before, between and after requests, and when."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    target = {"targets": [server.removeprefix("http://")]}
    scraped = {"job_name": "sglang", "scrape_interval": f"{SCRAPE_S}s", "static_configs": [target]}
    config = folder / "prometheus.yml"
    config.write_text(json.dumps({"scrape_configs": [scraped]}))  # JSON is YAML
    command = [str(PROMETHEUS), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        for _ in range(2):  # histograms have no zero to rise from
            _wait_for_scrapes(url, process, folder / "log")
            _send_requests(server)
        yield url, _wait_for_scrapes(url, process, folder / "log")
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.parametrize(("panel", "query"), queries())
def test_a_query_has_an_answer(prometheus: tuple[str, float], panel: str, query: str) -> None:
    url, at = prometheus
    series = _ask(url, "query", query=query, time=str(at))["result"]
    assert series, query
    values = [float(one["value"][1]) for one in series]
    assert all(math.isfinite(value) and value >= 0 for value in values)
    legend = {
        tuple(one["metric"].values()): value for one, value in zip(series, values, strict=True)
    }
    # Nothing verifies drafts: kinds without passes have no answer. Prompts that come again are
    # cached.
    if panel == "Packed passes":
        assert legend.keys() == {("decode",), ("extend",)}
        assert all(0 < share < 1 for share in legend.values())
    elif panel == "KV read ratio":
        assert legend.keys() == {("decode",), ("extend",)}
        # One is reached where no two samples are in time for one batch.
        assert all(0.05 < ratio <= 1 for ratio in legend.values())
    elif panel == "Passes by path":
        assert legend.keys() == {(k, p) for k in ("decode", "extend") for p in ("packed", "stock")}
    elif panel == "Why passes were not packed":
        assert legend.keys() == {("decode", "gate-nothing-shared"), ("extend", "gate-no-gain")}
    elif "latency" in panel or "first token" in panel:
        assert values[0] > 0


def test_variables_have_values(
    prometheus: tuple[str, float], server: str, models: dict[str, str]
) -> None:
    expected = {"model": [models["llama"]], "instance": [server.removeprefix("http://")]}
    for name, (selector, label) in variables().items():
        assert _ask(prometheus[0], f"label/{label}/values", match=selector) == expected[name]


def _ask(url: str, page: str, match: str | None = None, **arguments: str) -> Any:
    given = arguments | ({"match[]": match} if match else {})
    answer = requests.get(f"{url}/api/v1/{page}", params=given, timeout=30).json()
    assert answer["status"] == "success", answer
    return answer["data"]


def _wait_for_scrapes(url: str, process: subprocess.Popen[bytes], log: Path) -> float:
    """Until two scrapes have succeeded from now on; the time of the last."""
    began, query = time.time(), "timestamp(up == 1)"
    while time.time() < began + 60:
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(SCRAPE_S / 2)
        try:
            found = _ask(url, "query", query=query)["result"]
        except (requests.ConnectionError, ValueError):  # not ready yet
            continue
        if found and (newest := float(found[0]["value"][1])) > began + 2 * SCRAPE_S:
            return newest
    raise AssertionError(f"no scrape: {log.read_text()[-2000:]}")


def _send_requests(url: str) -> None:
    """Samples of a prompt, then a request alone whose answer comes in pieces."""
    long = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0}
    for text, sampling, stream in (
        ("Every branch grows from the same trunk. " * 12, long | {"n": 6}, False),
        ("A leaf falls. " * 5, long, True),
    ):
        body: Any = {"text": text, "sampling_params": sampling, "stream": stream}
        with requests.post(f"{url}/generate", json=body, timeout=120, stream=stream) as answer:
            assert answer.content
