"""All suites one after another, then the figures: python -m benchmarks.run [--slow] [--only SUITE]...; `make bench`.

Every suite has a process of its own: one that fails or hangs does not stop the others, and what it had measured is in
its CSV. With HMT_PYTORCH set, HMT-pytorch is measured too, which takes a few minutes more (`make bench-peer`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import parts, peer
from benchmarks.parts import Part, Result
from benchmarks.sizes import DEVICE

LOGS = parts.ROOT / ".cache" / "benchmarks"
SECONDS = 900.0  # a suite that has not ended by then hangs
SUITES = {
    "recall": "test_memory_recall.py",
    "attention": "test_segment_attention.py",
    "model": "test_model.py",
    "training": "test_training.py",
    "long context": "test_long_context.py",
    "peer training": "test_peer_training.py",
    "gpu model": "test_gpu_model.py",
}
SLOW = {"training": "test_training.py"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--slow", action="store_true", help="the benchmarks that take many minutes, and only those")
    parser.add_argument("--only", action="append", choices=SUITES, help="this suite only")
    arguments = parser.parse_args()
    suites = SLOW if arguments.slow else SUITES
    wanted = [name for name in suites if not arguments.only or name in arguments.only]
    todo = [suite(name, suites[name], arguments.slow) for name in wanted]
    todo.append(Part("figures", [sys.executable, "-m", "benchmarks.plot"], SECONDS))

    LOGS.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = []
    for number, part in enumerate(todo, 1):
        if reason := why_not(part.name):
            print(f"[{number}/{len(todo)}] {part.name} not run: {reason}", flush=True)
            continue
        print(f"[{number}/{len(todo)}] {part.name} ...", flush=True)
        log = LOGS / f"{part.name.replace(' ', '_')}.log"
        results.append(parts.run(part, log, has_cuda=True, seconds_left=part.seconds))
        print(tables(log), end="")
        print(progress(results[-1], time.monotonic() - started, log), flush=True)
    return 1 if any(result.result != "ok" for result in results) else 0


def why_not(name: str) -> str | None:
    """Why a suite has nothing to measure here; each says so itself too, after seconds of imports."""
    if name == "gpu model" and DEVICE == "cpu":
        return "PyTorch sees no CUDA device"
    return peer.missing() if name == "peer training" else None


def suite(name: str, file: str, slow: bool = False) -> Part:
    command = [sys.executable, "-m", "pytest", f"benchmarks/{file}", "-q", "--benchmark-columns=median,rounds"]
    return Part(name, [*command, *(["--slow"] if slow else [])], SECONDS * (3 if slow else 1))


def progress(result: Result, total: float, log: Path) -> str:
    why = "" if result.result == "ok" else f": {result.detail} ({log})"
    return f"    {result.part} {result.result} after {result.seconds:.0f} s, {total:.0f} s in all{why}"


def tables(log: Path) -> str:
    """What a suite printed after its progress: its tables, and who did not run."""
    text = log.read_text(errors="replace") if log.exists() else ""
    start = text.find("\n====")
    return text[start + 1 :] if start >= 0 else text


if __name__ == "__main__":
    sys.exit(main())
