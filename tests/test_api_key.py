"""Keys of servers: where they come from, where they go, and that they go nowhere else."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from typer.testing import CliRunner

from sglang_prefix.api_key import VARIABLES, ApiKey, ask, why_failed
from sglang_prefix.cli import command
from sglang_prefix.cli.main import app

FIRST, SECOND = VARIABLES
SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nobody has set one."""
    for name in (*VARIABLES, "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def guarded(status: int = 401) -> Iterator[tuple[str, list[str | None]]]:
    """A server that opens to SECRET alone; its URL, and what it was sent."""
    sent: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(self.headers["Authorization"])
            self.send_response(200 if sent[-1] == f"Bearer {SECRET}" else status)
            self.end_headers()
            self.wfile.write(json.dumps({"api_key": SECRET, "internal_states": []}).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()


@pytest.mark.parametrize(
    ("given", "environment", "source"),
    [
        (None, {}, None),
        (None, {FIRST: "", SECOND: ""}, None),
        (None, {SECOND: "def"}, SECOND),
        (None, {FIRST: "abc", SECOND: "def"}, FIRST),
        ("xyz", {FIRST: "abc", SECOND: "def"}, "--api-key"),
    ],
)
def test_the_option_comes_before_the_variables(
    given: str | None, environment: dict[str, str], source: str | None
) -> None:
    found = ApiKey.find(given, environment)
    assert found.source == source
    assert found.value == ({"--api-key": given} | environment).get(str(source))
    assert found.value is None or found.value not in repr(found)
    # A child that looks itself finds the same.
    assert ApiKey.find(None, environment | found.environment).value == found.value


@pytest.mark.parametrize("value", ["a b", "a\nb", "ä", "\udcff", "a\0"])
def test_what_no_header_carries_is_refused_unseen(value: str) -> None:
    with pytest.raises(ValueError, match=f"{SECOND} is none of HTTP's; legal: ") as error:
        ApiKey.find(None, {SECOND: value})
    assert value not in str(error.value)


def test_a_key_wins_over_netrc_and_is_not_sent_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with guarded() as (url, sent):
        assert ask(url, ApiKey(FIRST, SECRET), timeout_s=9) is not None
        with pytest.raises(requests.HTTPError):
            ask(url, ApiKey(), timeout_s=9)
    assert sent[0] == f"Bearer {SECRET}"
    assert SECRET not in str(sent[1])


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("options", "environment", "told"),
    [
        ([], {}, "it wants a key; legal: one in --api-key or SGLANG_API_KEY or OPENAI_API_KEY"),
        (["--api-key", "no"], {FIRST: SECRET}, "key of --api-key is not its own; legal: its key"),
        ([], {SECOND: "no"}, "its key, in --api-key or SGLANG_API_KEY or OPENAI_API_KEY"),
    ],
)
@pytest.mark.parametrize(
    "server", ["explain --base-url", "bench serving --model-path m --stock-url"]
)
def test_a_refusal_says_where_a_key_may_stand(
    server: str,
    options: list[str],
    environment: dict[str, str],
    told: str,
    status: int,
    tmp_path: Path,
) -> None:
    out = ["--out", str(tmp_path / "out")] if server.startswith("bench") else []
    with guarded(status) as (url, _):
        run = [*server.split(), url, *options, *out]
        done = CliRunner().invoke(app, run, env=environment)
    assert done.exit_code in (1, 2)
    (line,) = done.stderr.splitlines()
    assert f"the server answers {status}: " in line
    assert told in line
    assert SECRET not in done.output


@pytest.mark.parametrize("place", ["--api-key", *VARIABLES])
def test_a_key_opens_and_is_not_shown(place: str, tmp_path: Path) -> None:
    environment = {} if place == "--api-key" else {place: SECRET}
    options = ["--api-key", SECRET] if place == "--api-key" else []
    with guarded() as (url, sent):
        run = ["explain", "--base-url", url, *options, "--json", str(tmp_path / "file")]
        done = CliRunner().invoke(app, run, env=environment)
    assert sent == [f"Bearer {SECRET}"]
    assert "does not run the attention backend prefix" in done.stderr
    assert SECRET not in done.output
    assert not (tmp_path / "file").exists()


def test_a_result_file_has_the_command_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--api-key", SECRET], [f"--api-key={SECRET}"]):
        monkeypatch.setattr(sys, "argv", ["x", "bench", *words, "--seed", "3"])
        typed = command.typed_command()
        assert SECRET not in str(typed)
        assert typed[:2] == ["sglang-prefix", "bench"]
        assert typed[-2:] == ["--seed", "3"]


@pytest.mark.parametrize("option", ["--api-key", "--api-k=x", "--admin-api-key"])
def test_servers_that_are_started_need_none(option: str, tmp_path: Path) -> None:
    run = ["bench", "serving", "--model-path", "m", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*run, "--", option, SECRET])
    assert done.exit_code == 2
    assert "servers started here need none" in done.stderr
    assert SECRET not in done.output
    assert os.listdir(tmp_path) == []


def test_the_proxy_that_was_asked_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://me:hidden@127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    key = ApiKey()
    for url, is_told in (("http://10.9.9.9:8/x", True), ("http://127.0.0.1:1/x", False)):
        with pytest.raises(requests.ConnectionError) as error:
            ask(url, key, timeout_s=9)
        told = why_failed(error.value, url, key)
        assert ("asked through the proxy http://127.0.0.1:1, which no_proxy=10.9.9.9" in told) == (
            is_told
        )
        assert "hidden" not in told
