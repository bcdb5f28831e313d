"""Shared by the tests of the model layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import tape
import torch
from tiny_model import save_tiny_model

import hmt_kernels
from hmt import capture, rotary


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(Tq, R) of every call of the operator from a fused layer."""
    made = []

    def counted(q: torch.Tensor, *args: object, cos: torch.Tensor, **kwargs: object) -> torch.Tensor:
        made.append((q.shape[2], cos.shape[2]))
        return hmt_kernels.segment_attention(q, *args, cos=cos, **kwargs)

    monkeypatch.setattr(rotary, "segment_attention", counted)
    return made


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(autouse=True)
def captures_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With cuda_graphs=True a CPU takes the same steps through the same buffers; `tape.captured` stands for a graph."""
    monkeypatch.setattr(capture, "DEVICES", ("cuda", "cpu"))


@pytest.fixture
def as_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape in place of every CUDA graph."""
    monkeypatch.setattr(capture, "captured", tape.captured)
