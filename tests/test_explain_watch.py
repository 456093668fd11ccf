"""`sglang-prefix explain --watch`, with a server that says what a test tells it to."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from sglang_prefix.backend.fallback import REASONS
from sglang_prefix.cli import watch
from sglang_prefix.cli.main import app
from sglang_prefix.cli.watch import Reading, plain_line, since, view
from tests.readers import plan_document

# What a server answers in turn: a status and its counters, per rank; the last again and again.
Answer = tuple[int, Sequence[Mapping[str, Any]]]
Answers = Sequence[Answer]


def report(packed: int, **more: Any) -> dict[str, Any]:
    """Counters of a rank in which every packed step reads 10 of 40 tokens."""
    counts = {"packed_steps": packed, "kv_tokens_read": 10 * packed}
    counts |= {"kv_tokens_logical": 40 * packed, "plans": packed // 4}
    return counts | {"num_packs": 3, "num_partials": 5, "executor": "native"} | more


def reading(at: float, packed: int, start: str = "", **more: Any) -> Reading:
    return Reading(at, report(packed, **more), packs={"decode": (3, 5)}, starts=(start,))


def _state(counters: Mapping[str, Any]) -> dict[str, Any]:
    """A rank that took so long to start."""
    return {"sglang_prefix": [counters], "startup_time": {"scheduler_e2e": counters.get("e2e", 1)}}


@contextlib.contextmanager
def served(answers: Answers) -> Iterator[str]:
    left = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, reports = left.pop(0) if len(left) > 1 else left[0]
            states = [_state(r) if r else {} for r in reports]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"internal_states": states}).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def watched(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> Result:
    """The command, ended by Ctrl-C after the last answer; 2 s pass between two of them."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] >= 2 * len(answers):
            raise KeyboardInterrupt

    fake = SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0], strftime=time.strftime)
    monkeypatch.setattr(watch, "time", fake)
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with served(answers) as url:
        return CliRunner().invoke(app, ["explain", "--base-url", url, "--watch"])


class TestInterval:
    def test_rates_are_those_of_the_interval_beside_totals(self) -> None:
        before = reading(10.0, 100, stock_steps=1, stock_reasons={"gate-no-gain": 1})
        after = reading(14.0, 140, stock_steps=11, stock_reasons={"gate-no-gain": 11})
        after.counters["kv_tokens_read"] += 100
        found = since(before, after)
        assert not found.restarted
        line = plain_line(after, found)
        assert line.startswith("last 4.0 s: decode steps 12.5/s, packed 80.0%, stock 20.0%, fallb")
        assert "KV tokens read 125/s, KV tokens logical 400/s, KV read ratio 0.312, pl" in line
        assert "; total: decode steps 151, packed 92.7%, stock 7.3%" in line
        assert "KV tokens read 1,500, KV tokens logical 5,600, KV read ratio 0.268, pla" in line
        assert line.endswith("; stock gate-no-gain 11 (+10)")

    def test_kinds_of_passes_that_there_were_are_told_apart(self) -> None:
        looks = []
        for at, packed in ((0.0, 10), (2.0, 30)):
            extend = report(2 * packed, stock_steps=5, stock_reasons={"gate-no-gain": 5})
            looks.append(reading(at, packed, extend=extend, verify=report(0)))
        line = plain_line(looks[1], since(*looks))
        last, total, *rest = line.split("; ")
        decode, extends = last.split(", extends ")
        assert decode.startswith("last 2.0 s: decode steps 10.0/s, packed 100.0%, ")
        assert extends.startswith("20.0/s, packed 100.0%, stock 0.0%, ")
        assert "KV tokens read 200/s, " in extends
        assert ", extends 65, packed 92.3%, stock 7.7%, " in total
        assert rest == [
            "newest plan for decode steps: 3 packs, 5 partial results",
            "newest plan for extends: 0 packs, 0 partial results",
            "extend stock gate-no-gain 5",
        ]
        assert "verify" not in line

    def test_a_server_that_verifies_drafts_in_place_of_decoding_shows_no_decode_steps(self) -> None:
        line = plain_line(reading(1.0, 0, verify=report(8)), None)
        assert line.startswith("total: verify passes 8, packed 100.0%, ")
        assert "decode" not in line

    @pytest.mark.parametrize(("start", "packed"), [("a", 20), ("b", 400)])
    def test_a_restart_is_counted_from_zero(self, start: str, packed: int) -> None:
        """Seen by counters that fell, or by another start that has counted further already."""
        errors: dict[str, Any] = {"fallback_steps": 9, "fallback_reasons": {"error": 9}}
        before = reading(10.0, 100, "a", **errors)
        found = since(before, reading(20.0, packed, start, **errors))
        assert found.restarted
        assert found.counters["packed_steps"] == packed
        assert found.counters["kv_tokens_read"] == 10 * packed
        assert found.counters["fallback_reasons"] == {"error": 9}

    def test_a_kind_of_pass_whose_counts_fell_tells_a_restart_too(self) -> None:
        before, after = (reading(n, n, verify=report(m)) for n, m in ((10, 9), (20, 5)))
        found = since(before, after)
        assert found.restarted
        assert found.counters["verify"]["packed_steps"] == 5

    def test_nothing_happened(self) -> None:
        before, after = reading(10.0, 100, "a"), reading(12.0, 100, "a")
        assert not since(before, after).restarted
        assert "decode steps 0.0/s, packed -, stock -, " in plain_line(after, since(before, after))

    def test_the_view_has_the_same_numbers_and_says_reasons(self) -> None:
        before = reading(0.0, 10)
        after = reading(2.0, 30, fallback_steps=5, fallback_reasons={"error": 5, "x\x1b": 1})
        out = Console(file=io.StringIO(), width=100)
        out.print(*view(after, since(before, after)))
        assert isinstance(out.file, io.StringIO)
        text = out.file.getvalue()
        for name, last, total in (("decode steps", "12.5/s", "35"), ("packed", "80.0%", "85.7%")):
            (row,) = (line for line in text.splitlines() if f" {name} " in line)
            assert [cell.strip() for cell in row.split("│")[2:4]] == [last, total]
        assert f"fallback error 5 (+5): {REASONS['error'][:30]}" in text
        assert "fallback x? 1 (+1)" in text


class TestCommand:
    def test_a_line_for_each_look(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = plan_document("cpu")
        looks: list[Answer] = [(200, [report(n, last_plan=plan)]) for n in (8, 18)]
        done = watched(looks, monkeypatch)
        assert done.exit_code == 0, done.output
        first, second = (line[9:] for line in done.stdout.splitlines())
        assert first.startswith("total: decode steps 8, packed 100.0%, ")
        assert second.startswith("last 2.0 s: decode steps 5.0/s, ")
        assert second.endswith("; newest plan: 3 packs, 5 partial results")

    def test_ranks_are_added_up_in_any_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ranks = [report(8, last_plan=None), report(100, last_plan=None)]
        more = [report(104, last_plan=None), report(12, last_plan=None)]
        done = watched([(200, ranks), (200, more)], monkeypatch)
        told, first, second = (line[9:] for line in done.stdout.splitlines())
        assert told == "the server has not planned a batch yet; send requests first"
        assert first.startswith("total: decode steps 108, ")
        assert second.startswith("last 2.0 s: decode steps 4.0/s, packed 100.0%, ")
        assert second.endswith("; newest plans of 2: 6 packs, 10 partial results")

    def test_packs_are_those_of_each_kind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        extend = {"num_packs": 2, "num_partials": 4, "packed_steps": 1}
        done = watched([(200, [report(8, extend=extend)] * 2)], monkeypatch)
        (line,) = done.stdout.splitlines()[1:]
        assert line.endswith(
            "; newest plans of 2 for decode steps: 6 packs, 10 partial results"
            "; newest plans of 2 for extends: 4 packs, 8 partial results"
        )

    def test_a_server_goes_away_and_comes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: list[Answer] = [
            (200, [report(50)]),
            (503, []),
            (401, []),
            (200, [{}]),
            (200, [report(6)]),
        ]
        done = watched(answers, monkeypatch)
        assert done.exit_code == 0, done.output
        lines = [line[9:] for line in done.stdout.splitlines()]
        told = [
            *("start it with SGLANG_PREFIX_KEEP_PLAN=1", "total: decode steps 50, "),
            *("503 Server Error", "it wants a key; legal: one in", "does not run the attention ba"),
            *("was restarted: its counters began at zero", "last 8.0 s: decode steps 0.8/s, "),
        ]
        assert len(lines) == len(told)
        assert all(text in line for text, line in zip(told, lines, strict=True))

    def test_a_server_that_was_restarted_unseen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has counted further than before."""
        done = watched([(200, [report(50)]), (200, [report(90, e2e=2)])], monkeypatch)
        _, _, told, line = (line[9:] for line in done.stdout.splitlines())
        assert "was restarted" in told
        assert line.startswith("last 2.0 s: decode steps 45.0/s, ")

    @pytest.mark.parametrize(
        ("answer", "told"),
        [
            ((200, [{}]), "the server does not run the attention backend prefix"),
            ((200, [{"packed_steps": -1}]), "/server_info is not SGLang's: internal_states.0."),
            ((401, []), "the server answers 401: it wants a key; legal: one in --api-key or"),
        ],
    )
    def test_what_cannot_be_watched_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, answer: Answer, told: str
    ) -> None:
        done = watched([answer], monkeypatch)
        assert (done.exit_code, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("sglang-prefix: --base-url: http://127.0.0.1:")
        assert told in line


def test_in_a_terminal_ctrl_c_ends_it_with_the_cursor_back() -> None:
    """Counts are shown in place, the tree below them, and a server that is gone above."""
    plan = plan_document("cpu")
    answers: list[Answer] = [(200, [report(n, last_plan=plan)]) for n in (4, 8)]
    with served([*answers, (500, [])]) as url:
        command = [sys.executable, "-m", "sglang_prefix.cli.main", "explain", "--base-url", url]
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*command, "--watch", "--interval", "0.2"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "60"},
            start_new_session=True,
            # A shell lets what it runs in the background ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(theirs)
        shown = ""
        try:
            shown = _read(ours, until="500 Server Error")
            process.send_signal(signal.SIGINT)
            shown += _read(ours, until="\x1b[?25h")
            assert process.wait(30) == 0, shown
        finally:
            process.kill()
            os.close(ours)
    assert shown.count("\x1b[?25l") == 1
    assert "node 0: 5,000 tokens, 4 readers" in shown
    assert "Traceback" not in shown


def _read(terminal: int, until: str) -> str:
    shown, deadline = "", time.monotonic() + 60
    while until not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, shown
        shown += os.read(terminal, 1 << 16).decode(errors="replace")
    return shown
