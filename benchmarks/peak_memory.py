"""Extra peak memory of one workload in a process of its own.

python -m benchmarks.peak_memory PROVIDER WORKLOAD [SETTINGS as JSON] [SEGMENTS] prints it in bytes.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import THREADS
from benchmarks.model_providers import Runner, runners
from benchmarks.model_shape import SEGMENTS, text

PROCESS = Path("/proc/self")


def unavailable() -> str | None:
    """Why peak memory cannot be measured here (None: it can)."""
    return None if (PROCESS / "clear_refs").exists() else "peak memory is read from Linux's /proc/self"


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    line = next(x for x in (PROCESS / "status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def measure(workloads: dict[str, Runner], workload: str, segments: int = SEGMENTS, **shape: int) -> int:
    """Most memory held while a text is read, above what the process holds after a first short text, in bytes."""
    ids = text(segments, **shape)
    workloads["score"](ids[:, :64])
    # the heap keeps what was freed; counted as held, it would hide that much of the peak
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5")  # restarts VmHWM, the high-water mark
    before = status("VmRSS")
    workloads[workload](ids)
    return status("VmHWM") - before


@functools.cache
def in_new_process(
    provider: str, workload: str, settings: str = "{}", segments: int = SEGMENTS, mmap_threshold: int | None = None
) -> int:
    """`measure` in a fresh interpreter, so that nothing that ran before has grown the heap.

    With `mmap_threshold`, glibc maps every larger block by itself instead of raising that threshold as it goes: what is
    freed then leaves no holes in the heap.
    """
    command = [sys.executable, "-m", "benchmarks.peak_memory", provider, workload, settings, str(segments)]
    environment = dict(os.environ)
    if mmap_threshold is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(mmap_threshold)
    folder = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return int(result.stdout.split()[-1])


def main(provider: str, workload: str, settings: str = "{}", segments: str = str(SEGMENTS)) -> None:
    torch.set_num_threads(THREADS)
    chosen = json.loads(settings)
    shape = {"segment_length": chosen["segment_length"]} if "segment_length" in chosen else {}
    print(measure(runners(provider, **chosen), workload, int(segments), **shape))


if __name__ == "__main__":
    main(*sys.argv[1:])
