"""Engine results: each scenario runs once per session, two at a time, before it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.engine.driver import ScenarioResult, run_scenario
from tests.engine.models import write_models
from tests.engine.scenarios import EXTENDED, SCENARIOS

Results = Callable[[str], ScenarioResult]

# An engine's start is mostly imports on one core.
CONCURRENT = min(2, os.cpu_count() or 1)
_needed = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker that says which engines a test looks at."""
    config.addinivalue_line("markers", "scenarios(*names): engines whose results the test compares")


@pytest.hookimpl(tryfirst=True)  # before extended tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that looks at an engine of `make test-all` is extended."""
    for item in items:
        if any(name in EXTENDED for m in item.iter_markers("scenarios") for name in m.args):
            item.add_marker("extended")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note the scenarios of the selected tests in the order in which they are wanted."""
    run = [i for i in session.items if not any(m.args[0] for m in i.iter_markers("skipif"))]
    marks = [mark for item in run for mark in item.iter_markers("scenarios")]
    session.config.stash[_needed] = list(dict.fromkeys(n for mark in marks for n in mark.args))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folder of each model, with random weights on disk."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def results(
    models: dict[str, str],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Results]:
    """Result of a scenario by name; raises what its engine failed with."""
    folder = tmp_path_factory.mktemp("engines")
    pool = ThreadPoolExecutor(CONCURRENT)

    def submit(name: str) -> Future[ScenarioResult]:
        return pool.submit(run_scenario, SCENARIOS[name], models, folder / name.replace(" ", "-"))

    futures = {name: submit(name) for name in request.config.stash[_needed]}
    yield lambda name: futures[name].result()
    pool.shutdown(cancel_futures=True)
