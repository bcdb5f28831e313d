"""A pytest plugin for tests on a GPU: the emulation is left out, and a broken CUDA context ends its process.

After an illegal access every later call in the process fails too. pytest-xdist starts a new process for the rest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

EMULATION = {"emulate", "emulated", "emulated_module"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _is_emulated(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_emulated(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", None)
    backend = None if parameters is None else parameters.params.get("backend")
    return backend == "emulated" or bool(EMULATION & set(getattr(item, "fixturenames", ())))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    result = yield
    if hasattr(item.config, "workerinput") and not _context_works():
        time.sleep(1.0)  # for the test's report to reach the process that collects them
        os._exit(1)
    return result


def _context_works() -> bool:
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
