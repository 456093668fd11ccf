"""Several servers behind SGLang's router: requests of one prefix meet on one server.

Decode can share a prefix only among requests of the same server. A router that spreads them evenly
makes every server read every prefix. SGLang's router has a policy that does not, ``cache_aware``:
it keeps a tree of the prompts that it has sent to each server, and sends a prompt where most of it
is known. New prompts go where the load is least, and so does everything once one server has 64
requests more than another and half as many again (``--balance-abs-threshold``,
``--balance-rel-threshold``).

This starts the servers and the router and asks several questions about each of several prefixes:
the first about each in turn, once the router counts the one before as running, then all others at
once. Then it asks every server how much of each prefix it holds, and ends everything::

    pip install sglang-router
    sglang-prefix tiny-model tiny
    python examples/router_workers.py --model-path tiny --workers 2

On a host with GPUs each server gets one of its own. Options that this does not know go to the
servers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SERVE = Path(__file__).with_name("serve.sh")
START_S = 600
TOPICS = ("Oak", "Birch", "Cedar", "Maple")


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """Get a URL, or post JSON to it."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read(1 << 25)
    return json.loads(text) if text.startswith((b"{", b"[")) else None


def generate(url: str, prompt: str, new_tokens: int) -> dict[str, Any]:
    """One greedy completion, with SGLang's notes on it."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return dict(call(f"{url}/generate", {"text": prompt, "sampling_params": sampling}))


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the system gives to connections."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 8_000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            return found
    raise SystemExit("no free TCP ports between 20000 and 32000")


@contextlib.contextmanager
def started(command: list[str], log: Path, gpu: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, ended with all its children."""
    print("+", *command, f"> {log}", flush=True)
    env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(ready: Any, process: subprocess.Popen[bytes], log: Path, what: str) -> None:
    """Wait for a started process, and end with its last words if it fails."""
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError):
            if ready():
                return
        if process.poll() is not None or time.monotonic() > deadline:
            last = log.read_text(errors="replace").strip().splitlines()[-5:]
            raise SystemExit("\n".join([f"{what} did not start; the end of {log}:", *last]))
        time.sleep(0.5)


def ask_questions(router: str, prefixes: list[str], questions: int, new_tokens: int) -> None:
    """One question about each prefix, so that the router spreads them, then all others at once."""
    prompts = [f"{prefix}Question {i}?" for i in range(questions) for prefix in prefixes]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = []
        for sent, prompt in enumerate(prompts, 1):
            answers.append(pool.submit(generate, router, prompt, new_tokens))
            while sent <= len(prefixes) and not answers[-1].done() and running(router) < sent:
                time.sleep(0.005)
        for answer in answers:
            answer.result()


def running(router: str) -> int:
    """Requests that the router has sent to servers and that are not answered yet."""
    return sum(worker["load"] for worker in call(f"{router}/workers")["workers"])


def show(workers: list[str], prefixes: list[str]) -> None:
    """Which worker holds how much of each prefix, and what each read."""
    counters = [call(f"{w}/server_info")["internal_states"][0]["sglang_prefix"][0] for w in workers]
    for topic, prefix in zip(TOPICS, prefixes, strict=True):
        notes = [generate(worker, prefix, 1)["meta_info"] for worker in workers]
        shares = [note["cached_tokens"] / note["prompt_tokens"] for note in notes]
        print(f"{topic:6}", *(f"worker {i}: {share:5.1%}" for i, share in enumerate(shares)))
    for i, counted in enumerate(counters):
        steps, ratio = counted["packed_steps"], counted["kv_read_ratio"]
        read = "-" if ratio is None else f"{ratio:.3f}"
        print(f"worker {i}: {steps} decode steps packed, KV tokens read / KV tokens: {read}")


def main() -> None:
    """Start everything, send the requests, print where the prefixes are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--workers", type=int, default=2, help="servers; one GPU each, if any")
    parser.add_argument("--questions", type=int, default=6, help="requests per prefix")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens of each answer")
    parser.add_argument("--log-dir", type=Path, default=Path("router-logs"))
    arguments, server_options = parser.parse_known_args()
    if any(option.startswith(("--api-k", "--admin-api-k")) for option in server_options):
        parser.error("the servers listen on this host alone; legal: no --api-key")
    if min(arguments.workers, arguments.questions, arguments.new_tokens) < 1:
        parser.error("--workers, --questions and --new-tokens; legal: 1 and above")
    if find_spec("sglang_router") is None:
        parser.exit(1, "sglang-router is not installed; `pip install sglang-router`\n")
    if (
        not Path(arguments.model_path, "config.json").exists()
        and Path(arguments.model_path).exists()
    ):
        parser.exit(1, f"{arguments.model_path} holds no config.json; is it a model?\n")
    arguments.log_dir.mkdir(parents=True, exist_ok=True)

    has_gpu = Path("/dev/nvidiactl").exists()
    *ports, router_port, metrics_port = free_ports(2 * arguments.workers + 2)
    workers = [f"http://127.0.0.1:{port}" for port in ports[: arguments.workers]]
    with contextlib.ExitStack() as stack:
        running = []
        for i, port in enumerate(ports[: arguments.workers]):
            # --sleep-on-idle: servers without requests leave the cores to those that have some.
            options = ["--host", "127.0.0.1", "--port", str(port), "--sleep-on-idle"]
            options += ["--nccl-port", str(ports[arguments.workers + i]), *server_options]
            command = [str(SERVE), arguments.model_path, *options]
            log = arguments.log_dir / f"worker-{i}.log"
            running.append(
                (stack.enter_context(started(command, log, i if has_gpu else None)), log)
            )
        command = [sys.executable, "-m", "sglang_router.launch_router", "--policy", "cache_aware"]
        command += ["--host", "127.0.0.1", "--port", str(router_port)]
        command += ["--prometheus-port", str(metrics_port)]
        # By default the router looks for its servers every 30 s while they start.
        command += ["--worker-startup-check-interval", "1", "--worker-urls", *workers]
        log = arguments.log_dir / "router.log"
        router_process = stack.enter_context(started(command, log, None))
        for url, (process, worker_log) in zip(workers, running, strict=True):
            wait_until(lambda u=url: call(f"{u}/health") is None, process, worker_log, url)
        router = f"http://127.0.0.1:{router_port}"
        wait_until(
            lambda: call(f"{router}/workers")["total"] == len(workers), router_process, log, router
        )
        prefixes = [f"All about the {topic}. It has many branches. " * 20 for topic in TOPICS]
        ask_questions(router, prefixes, arguments.questions, arguments.new_tokens)
        show(workers, prefixes)


if __name__ == "__main__":
    main()
