"""Shared by all tests: the Triton interpreter where there is no GPU, a fixed seed, a fresh compiler."""

from __future__ import annotations

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read by triton when it is imported, so it has to be set before any test module does that.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the slowest files begin first, so that no process ends long after the others
SLOWEST = (
    "test_triton_recall.py", "test_packaging.py", "test_suites.py", "test_cuda_sanitizers.py",
    "test_compiled_layers.py", "test_long_run.py", "test_mutations.py", "test_audit.py", "test_triton_attention.py",
    "test_invariants.py", "test_golden_triton.py", "test_cuda_attention_sanitizers.py", "test_cuda_recall.py",
    "test_distributed.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(SLOWEST)))


def pytest_collection_finish() -> None:
    """What the tests have imported, a million objects, is not looked through at every collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def single_thread():
    """The tensors of these tests are tiny: a second thread only waits, and badly so where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def default_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HMT_KERNELS_IMPL", raising=False)


@pytest.fixture
def fresh_compiler():
    """torch.compile keeps at most a few versions of a function: start and leave without any."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
