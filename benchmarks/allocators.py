"""mimalloc in place of the C library's malloc, for all that a process allocates on the CPU.

PyTorch asks for aligned blocks, and glibc's malloc leaves holes between those of a training step.
"""

from __future__ import annotations

from ctypes.util import find_library

from benchmarks.sizes import DEVICE
from hmt_kernels.info import allocator

MIMALLOC = "mimalloc"


def missing(name: str) -> str | None:
    """Why no process is measured with the allocator of this name here (None: it is)."""
    if DEVICE == "cuda":
        return "CUDA has another allocator"
    return "libmimalloc is not installed" if name == MIMALLOC and not find_library(MIMALLOC) else None


def environment(name: str) -> dict[str, str]:
    """For a process whose allocator has this name; "malloc" is the C library's."""
    library = find_library(MIMALLOC)
    return {"LD_PRELOAD": library} if name == MIMALLOC and library else {}


def check(name: str) -> None:
    """Raises RuntimeError where this process should have mimalloc and has not: a library that cannot be preloaded is
    left out with a line on stderr."""
    if name == MIMALLOC and allocator() != MIMALLOC:
        raise RuntimeError(f"{MIMALLOC} was not preloaded: this process allocates with {allocator()}")
