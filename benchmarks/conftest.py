"""Two threads for every benchmark on a CPU, and one CSV and one table of what a run has measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import results, roofline
from benchmarks.sizes import DEVICE, THREADS

TABLES = pytest.StashKey[dict[str, dict[tuple[str, ...], results.Row]]]()
ABSENT = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the benchmarks that take many minutes, and only those")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes many minutes, runs with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--slow")
    left_out = [item for item in items if (item.get_closest_marker("slow") is not None) != wanted]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def threads() -> Iterator[None]:
    """With a GPU everyone has all of them: what waits for the host in between must not wait longer than it has to."""
    before = torch.get_num_threads()
    if DEVICE == "cpu":
        torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Iterator[list[results.Row]]:
    """What a benchmark measures: it goes to results/<file>_<device>.csv after each, also where that fails."""
    name = f"{request.path.stem.removeprefix('test_')}_{DEVICE}"
    measured: list[results.Row] = []
    yield measured
    if measured:
        measured += roofline_rows()
        results.write(name, measured)
        request.config.stash.setdefault(TABLES, {}).setdefault(name, {}).update(
            {results.key(row): row for row in measured}
        )


def roofline_rows() -> list[results.Row]:
    """The ceilings that this run has measured so far."""
    rows = [
        results.row("roofline", f"product in {str(dtype).removeprefix('torch.')}", "rate", "torch", [rate], "FLOP/s")
        for dtype, rate in roofline.RATES.items()
    ]
    if rows:
        rows.append(results.row("roofline", "copy or sum", "bandwidth", "torch", [roofline.bandwidth()], "B/s"))
    return rows


@pytest.fixture
def absent(request: pytest.FixtureRequest) -> dict[str, str]:
    """Providers that did not run, with the reason; they are listed after the tables."""
    return request.config.stash.setdefault(ABSENT, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, measured in config.stash.get(TABLES, {}).items():
        terminalreporter.section(f"{name}.csv")
        for line in results.table(measured.values()):
            terminalreporter.write_line(line)
    absent = config.stash.get(ABSENT, {})
    if absent:
        terminalreporter.section("not run")
        for name, reason in absent.items():
            terminalreporter.write_line(f"{name}: {reason}")
