"""mimalloc in place of the C library's malloc, for all that a process allocates on the CPU.

PyTorch asks for aligned blocks, and glibc's malloc leaves holes between those of a training step.
"""

from __future__ import annotations

from ctypes.util import find_library

from hmt_kernels.info import allocator

MIMALLOC = "mimalloc"


def missing() -> str | None:
    """Why no process can have it here (None: it can)."""
    return None if find_library(MIMALLOC) else "libmimalloc is not installed"


def environment(name: str) -> dict[str, str]:
    """For a process whose allocator has this name; "malloc" is the C library's."""
    library = find_library(MIMALLOC)
    return {"LD_PRELOAD": library} if name == MIMALLOC and library else {}


def check(name: str) -> None:
    """Raises RuntimeError where this process should have mimalloc and has not: a library that cannot be preloaded is
    left out with a line on stderr."""
    if name == MIMALLOC and allocator() != MIMALLOC:
        raise RuntimeError(f"{MIMALLOC} was not preloaded: this process allocates with {allocator()}")
