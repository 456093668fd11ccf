"""What the tests of pages do without a browser: they say what is missing, or fail if told to."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests import browser


def timed_out(command: list[str], **options: Any) -> None:
    raise subprocess.TimeoutExpired(command, options["timeout"])


def failed(command: list[str], **options: Any) -> None:
    raise subprocess.CalledProcessError(1, command, stderr=b"Error: unexpected end\nat main")


def test_an_npm_that_does_not_answer_is_a_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", timed_out)
    with pytest.raises(browser.MissingError, match=r"npm cannot bring .* within 120 s"):
        browser._downloaded(tmp_path)


@pytest.mark.parametrize(
    ("run", "said"), [(timed_out, "TimeoutExpired"), (failed, "Error: unexpected end$")]
)
def test_a_node_that_cannot_unpack_is_a_lack(
    run: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        for name in browser._MEMBERS:
            archive.addfile(tarfile.TarInfo(f"package/bin/{name}.br"))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(browser.MissingError, match=f"node cannot unpack .*: {said}"):
        browser._unpacked(tmp_path / "package.tgz", tmp_path)


def test_a_required_browser_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(browser.REQUIRE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no npm"):
        browser.missing("no npm")
    monkeypatch.setenv(browser.REQUIRE, "1")
    with pytest.raises(pytest.fail.Exception, match=f"no npm; {browser.REQUIRE} is 1"):
        browser.missing("no npm")
