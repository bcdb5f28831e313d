"""The two ceilings of this machine, measured in the run that uses them: bytes per second and operations per second."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from benchmarks.costs import Ceilings
from benchmarks.sizes import DEVICE, size

ROUNDS, MOST_SECONDS = 5, 1.0
BUFFER = size({"cpu": 2**28, "cuda": 2**30}, tiny={"cpu": 2**20, "cuda": 2**20})[DEVICE]
GEMM_SIZE = size({"cpu": 1024, "cuda": 8192}, tiny={"cpu": 64, "cuda": 64})[DEVICE]


RATES: dict[torch.dtype, float] = {}  # what `rate` has measured in this run


@functools.cache
def bandwidth() -> float:
    """The faster of a copy, which counts both the bytes that it reads and those that it writes, and a sum."""
    source = torch.ones(BUFFER // 4, device=DEVICE)
    target = torch.empty_like(source)
    return max(2 * BUFFER / fastest(lambda: target.copy_(source)), BUFFER / fastest(source.sum))


def rate(dtype: torch.dtype) -> float:
    """Of a square product of matrices, of rows with columns or of rows with rows, whichever is faster."""
    if dtype not in RATES:
        a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=DEVICE).to(dtype) for _ in range(2))
        RATES[dtype] = 2 * GEMM_SIZE**3 / min(fastest(lambda: a @ b), fastest(lambda: a @ b.mT))
    return RATES[dtype]


def fastest(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) <= ROUNDS and sum(seconds) < MOST_SECONDS):
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def ceilings(dtype: torch.dtype) -> Ceilings:
    return Ceilings(bandwidth(), rate(dtype))
