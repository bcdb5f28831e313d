"""Two threads for every benchmark, and one CSV and one table of what a run has measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import THREADS, results

TABLES = pytest.StashKey[dict[str, list[dict[str, object]]]]()
ABSENT = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, object]]]:
    """Measured rows of one file of benchmarks; they go to results/<its name>_<device>.csv, also after a failure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"{request.path.stem.removeprefix('test_')}_{device}"
    measured: list[dict[str, object]] = []
    yield measured
    if measured:
        results.write(name, measured)
        request.config.stash.setdefault(TABLES, {})[name] = measured


@pytest.fixture(scope="module")
def absent(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Providers that did not run, with the reason; they are listed after the tables."""
    reasons: dict[str, str] = {}
    yield reasons
    request.config.stash.setdefault(ABSENT, {}).update(reasons)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, measured in config.stash.get(TABLES, {}).items():
        terminalreporter.section(f"benchmarks/results/{name}.csv")
        for line in results.table(measured):
            terminalreporter.write_line(line)
    absent = config.stash.get(ABSENT, {})
    if absent:
        terminalreporter.section("not run")
        for name, reason in absent.items():
            terminalreporter.write_line(f"{name}: {reason}")
