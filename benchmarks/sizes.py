"""Sizes of the benchmarks: those of the committed results or, with HMT_BENCH_TINY=1, just enough to see them run."""

from __future__ import annotations

import os
from typing import TypeVar

import torch

TINY = os.environ.get("HMT_BENCH_TINY") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS = 1 if TINY else 2  # of every CPU measurement
_T = TypeVar("_T")


def size(full: _T, *, tiny: _T) -> _T:
    return tiny if TINY else full
