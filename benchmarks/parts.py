"""Running one part of a long job: a command with a time limit, whose output is in a file from its first line on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LEAST_SECONDS = 5  # with less time left a part does not start


class Part(NamedTuple):
    name: str
    command: list[str]
    seconds: float  # at most
    group: str = ""
    needs_cuda: bool = False
    tool: str | None = None  # a program without which the part is absent


class Result(NamedTuple):
    part: str
    result: str  # ok, FAILED, absent, or "cut off" while it runs
    seconds: float
    detail: str


def run(
    part: Part, log: Path, *, has_cuda: bool, seconds_left: float, environment: Mapping[str, str] | None = None
) -> Result:
    """Run a part; a failure is a result, never an exception. Its processes do not outlive this call."""
    if part.needs_cuda and not has_cuda:
        return Result(part.name, "absent", 0, "PyTorch sees no CUDA device")
    if part.tool and shutil.which(part.tool) is None:
        return Result(part.name, "absent", 0, f"{part.tool} is not installed")
    limit = min(part.seconds, seconds_left)
    if limit < LEAST_SECONDS:
        return Result(part.name, "FAILED", 0, f"no time was left: {max(seconds_left, 0):.0f} s")
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),
        )  # fmt: skip
        try:
            result = "ok" if process.wait(timeout=limit) == 0 else "FAILED"
            detail = last_line(log)
        except subprocess.TimeoutExpired:
            result, detail = "FAILED", f"stopped after {limit:.0f} s; {last_line(log)}"
        finally:
            end(process)
    return Result(part.name, result, time.monotonic() - started, detail[:160])


def end(process: subprocess.Popen) -> None:
    """With its children, which are in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
