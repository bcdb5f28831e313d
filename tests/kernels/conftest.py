"""Shared by the tests of the CUDA kernels: one build of the emulated module, whatever files and processes use it."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from emulation import build

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    import interpreter_bf16

    interpreter_bf16.install()  # without which the oldest Triton interprets nothing beside the newest NumPy


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    """csrc/cuda compiled for the CPU; see tests/emulation."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers of one run have their folders in a common one
        folder = folder.parent
    return build.build_module(folder / "emulated")


@pytest.fixture
def emulate(emulated_module, monkeypatch):
    """Makes hmt_kernels.*.cuda work on CPU tensors, for a card of 132 multiprocessors."""

    def emulate(cuda):
        monkeypatch.setattr(cuda, "_C", emulated_module)
        monkeypatch.setattr(cuda, "stream", lambda device: 0)
        if hasattr(cuda, "_sm_count"):
            monkeypatch.setattr(cuda, "_sm_count", lambda device: 132)
        emulated_module.set_seed(0)
        return emulated_module

    return emulate
