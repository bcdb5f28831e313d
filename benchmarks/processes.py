"""Processes of their own for what is measured: peak memory is a process's, and a heap keeps what ran before."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.sizes import DEVICE, THREADS

PROCESS = Path("/proc/self")
IMPORTED = ["benchmarks.model_providers", "transformers.models.llama.modeling_llama"]


@contextlib.contextmanager
def own_process(
    environment: Mapping[str, str] | None = None, forked: bool = False
) -> Iterator[Callable[..., Future[Any]]]:
    """Yields submit(function, *args): runs it in one fresh interpreter, which lives as long as the context.

    Nothing is waited for here, so that several processes start at once. A `forked` one starts in no time, on CPUs, from
    a process that has only imported everything; of the libraries' files, only what it uses counts in its memory.
    """
    with ProcessPoolExecutor(1, _context(forked and not environment)) as pool:
        with mock.patch.dict(os.environ, environment or {}):  # the first call starts the process
            pool.submit(torch.set_num_threads, THREADS)
        yield pool.submit


def _context(forked: bool) -> BaseContext:
    if DEVICE == "cuda" or not forked or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def peak_unavailable() -> str | None:
    """Why peak memory cannot be measured here (None: it can)."""
    if DEVICE == "cuda" or (PROCESS / "clear_refs").exists():
        return None
    return "peak memory is read from Linux's /proc/self"


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    line = next(x for x in (PROCESS / "status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def held_memory() -> int:
    """Bytes that this process holds now; its peak is counted from here. On CUDA, what PyTorch has of the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()  # with the memory of graphs
    if peak_unavailable():
        return 0
    # the heap keeps what was freed; counted as held, it would hide that much of the peak
    allocator = ctypes.CDLL(None)
    for give_back, argument in (("malloc_trim", 0), ("mi_collect", 1)):  # glibc's; mimalloc's, where it is preloaded
        if hasattr(allocator, give_back):
            getattr(allocator, give_back)(argument)
    (PROCESS / "clear_refs").write_text("5")  # restarts VmHWM, the high-water mark
    return status("VmRSS")


def peak_memory() -> int:
    """The most that this process has held since the last `held_memory`, in bytes."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_reserved()
    return 0 if peak_unavailable() else status("VmHWM")
