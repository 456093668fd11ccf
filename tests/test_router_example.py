"""The order in which `examples/router_workers.py` asks, against a router that counts slowly."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "router_workers.py"
PREFIXES = ["Oak ", "Birch ", "Cedar "]
QUESTIONS = 3


class Router(ThreadingHTTPServer):
    """Counts a request a while after it came, and answers all once the last has come."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.whole = threading.Lock(), threading.Event()
        self.counted = 0
        self.seen: list[tuple[str, int]] = []


class Handler(BaseHTTPRequestHandler):
    server: Router

    def do_GET(self) -> None:
        halves = self.server.counted // 2
        self._say({"workers": [{"load": halves}, {"load": self.server.counted - halves}]})

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        with self.server.lock:
            self.server.seen.append((prompt, self.server.counted))
            if len(self.server.seen) == len(PREFIXES) * QUESTIONS:
                self.server.whole.set()
        time.sleep(0.05)
        with self.server.lock:
            self.server.counted += 1
        assert self.server.whole.wait(20)
        self._say({"text": ""})

    def log_message(self, *_: object) -> None:
        pass

    def _say(self, data: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())


@pytest.fixture
def router() -> Iterator[Router]:
    with Router() as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("router_workers", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_prefix_is_sent_once_the_router_counts_those_before_it(router: Router) -> None:
    url = f"http://127.0.0.1:{router.server_port}"
    _example().ask_questions(url, PREFIXES, QUESTIONS, 4)
    first = router.seen[: len(PREFIXES)]
    assert first == [(f"{prefix}Question 0?", i) for i, prefix in enumerate(PREFIXES)]
    others = {prompt for prompt, _ in router.seen[len(PREFIXES) :]}
    assert others == {f"{prefix}Question {i}?" for prefix in PREFIXES for i in (1, 2)}
