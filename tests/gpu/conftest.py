"""`make gpu-check`: the tests of this folder as the cases of one run, with a budget and a file.

A budget that is used up leaves tests out, and `--resume` runs them. Nothing is written where there
is no GPU to check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_prefix.bench.results import (
    ResultError,
    check_same,
    environment,
    new_result,
    read_result,
    same_environment,
)
from sglang_prefix.bench.run import Case, NotRunError, run_cases
from sglang_prefix.bench.workloads.inputs import MismatchError

KIND = "gpu-check"
DEFAULT_FILE = Path("build") / "gpu-check.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `make gpu-check GPU_ARGS="..."`."""
    group = parser.getgroup(KIND)
    group.addoption("--dry", action="store_true", help="tiny shapes in Triton's interpreter")
    group.addoption("--control", action="store_true", help="break every plan: all must mismatch")
    group.addoption(
        "--budget-s", type=float, default=540, help="seconds after which no test begins"
    )
    group.addoption(
        "--sanitizer-s", type=float, default=150, help="seconds for each tool of compute-sanitizer"
    )
    group.addoption("--out", type=Path, help=f"result file; {DEFAULT_FILE} if not given")
    group.addoption("--resume", type=Path, help="result file of a run that is to go on")


def pytest_configure(config: pytest.Config) -> None:
    """Run the tests as cases where they are asked for."""
    config.addinivalue_line("markers", "watched: a GPU test that takes all of --sanitizer-s")
    if config.getoption("-m") != "gpu":
        return
    if config.getoption("--dry", None) is None:  # this file was read too late for its options
        raise pytest.UsageError("pytest -m gpu: name the folder, as in `pytest -m gpu tests/gpu`")
    if config.getoption("--dry") or torch.cuda.is_available():
        config.pluginmanager.register(CheckRun(config), KIND)


class CheckRun:
    """Runs the collected tests within the budget, and writes the file after each."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        dry, control = config.getoption("--dry"), config.getoption("--control")
        resume: Path | None = config.getoption("--resume")
        self._path: Path = config.getoption("--out") or resume or DEFAULT_FILE
        here, options = environment("cpu" if dry else None), {"control": control}
        if resume:
            same = {**same_environment(here), "dry": dry, "options": options}
            try:
                self._data = read_result(resume, KIND)
                check_same(resume, self._data, same)
            except ResultError as error:
                raise pytest.UsageError(str(error)) from None
            config.option.hypothesis_seed = self._data["seed"]
        else:
            self._data = new_result(
                KIND,
                command=config.invocation_params.args,
                options=options,
                seed=int(config.option.hypothesis_seed),
                environment=here,
                dry=dry,
            )
        self._reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what became of the test that runs."""
        self._reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the tests in their order."""
        if session.testsfailed or session.config.option.collectonly:
            return None  # pytest says what is wrong, or lists them

        def stop_if_asked(_: Case) -> None:
            if session.shouldfail:
                raise session.Failed(session.shouldfail)

        budget_s = self._config.getoption("--budget-s")
        cases = [self._case(item) for item in session.items]
        run_cases(self._path, self._data, cases, budget_s, begin=stop_if_asked)
        # Those that failed before this run was taken up count, too.
        session.testsfailed = len(self._data["failed"])
        return True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was not run, and where the results are."""
        not_run: dict[str, str] = self._data["not_run"]
        for why in sorted(set(not_run.values())):
            names = ", ".join(name for name, reason in not_run.items() if reason == why)
            terminalreporter.write_line(f"not run: {names}: {why}")
        for name, why in self._data["failed"].items():
            terminalreporter.write_line(f"failed: {name}: {why}")
        terminalreporter.write_line(f"{len(self._data['cases'])} passed; results in {self._path}")

    def _case(self, item: pytest.Item) -> Case:
        name = item.name.partition("[")[2].removesuffix("]") or item.name.removeprefix("test_")
        is_watched = item.get_closest_marker("watched") is not None and not self._data["dry"]
        seconds = self._config.getoption("--sanitizer-s") if is_watched else None
        group = getattr(item, "originalname", item.name).removeprefix("test_")
        expected_s = None if seconds is None else lambda: float(seconds)
        return Case(name, group, partial(self._run, item), expected_s)

    def _run(self, item: pytest.Item) -> Mapping[str, Any]:
        self._reports.clear()
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        for report in self._reports:
            if report.skipped:
                assert isinstance(report.longrepr, tuple)
                raise NotRunError(report.longrepr[2].removeprefix("Skipped: "))
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                raise RuntimeError(crash.message if crash else str(report.longrepr)[-500:])
        return dict(self._reports[-1].user_properties)


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a test runs, and on which inputs.

    Attributes:
        device: the GPU, or the CPU of a dry run.
        seed: of all inputs.
        dry: tiny shapes.
        control: every plan has lost a work item, which every comparison must show.
    """

    device: torch.device
    seed: int
    dry: bool
    control: bool

    @contextlib.contextmanager
    def verdict(self) -> Iterator[None]:
        """Around comparisons with the oracle: in a control, one of them must fail."""
        if not self.control:
            yield
            return
        with pytest.raises(MismatchError):
            yield


@pytest.fixture
def setting(pytestconfig: pytest.Config) -> Setting:
    """Of this run; skips where there is no GPU."""
    dry, control = pytestconfig.getoption("--dry"), pytestconfig.getoption("--control")
    if not dry and not torch.cuda.is_available():
        pytest.skip("no GPU here; --dry runs tiny shapes without one")
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    return Setting(device, int(pytestconfig.option.hypothesis_seed), dry, control)
