"""A pytest plugin for work that may be cut off: what has passed is written down, and not run again.

The file is named by HMT_LAB_DONE; it is for the commit that the lab runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

_failed: set[str] = set()
PASSED = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = set(config.stash[PASSED])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


class Recorder:
    """In the process that hears of all tests; the workers of xdist tell it."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            _failed.add(report.nodeid)
        # teardown writes what a benchmark has measured
        if report.when == "teardown" and report.nodeid not in _failed:
            with _done_file().open("a") as file:
                file.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.stash[PASSED] = config.workerinput["passed"]
        return
    done = _done_file()
    config.stash[PASSED] = done.read_text().splitlines() if done.exists() else []
    config.pluginmanager.register(Recorder())


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """As of the start: a worker that takes the place of one that died has to collect what that one did."""
    node.workerinput["passed"] = node.config.stash[PASSED]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _done_file().exists():
        session.exitstatus = pytest.ExitCode.OK  # all had passed before


def _done_file() -> Path:
    return Path(os.environ["HMT_LAB_DONE"])
