"""The parts of the GPU lab, one after another, each in a process of its own; see benchmarks/gpu_lab.sh."""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RECALL = Path("benchmarks/test_memory_recall.py")
ATTENTION = Path("benchmarks/test_segment_attention.py")
TOTAL_SECONDS = 530
PYTHON = sys.executable
TESTS = ["tests/kernels", "tests/hmt/test_rotary_in_use.py"]


class Part(NamedTuple):
    name: str
    command: list[str]
    seconds: float  # at most
    needs_cuda: bool = True
    tool: str | None = None  # a program without which the part is absent
    path: Path | None = None  # a file without which the part is absent


class Result(NamedTuple):
    part: str
    result: str  # ok, FAILED, absent
    seconds: float
    detail: str
    output: str = ""


def sanitizer(tool: str) -> Part:
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        PYTHON,
        "-m",
        "benchmarks.gpu_lab.selection",
    ]
    return Part(tool, command, 100, tool="compute-sanitizer")


def benchmark(name: str, path: Path, seconds: float) -> Part:
    return Part(name, [PYTHON, "-m", "pytest", str(path), "-q", "-s"], seconds, needs_cuda=False, path=path)


PARTS = [
    Part("environment", [PYTHON, "-m", "benchmarks.gpu_lab.environment"], 60, needs_cuda=False),
    Part("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 240, needs_cuda=False),
    Part("tests", [PYTHON, "-m", "pytest", *TESTS, "-q", "-n", "8", "--dist=loadfile"], 240),
    *(sanitizer(tool) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")),
    benchmark("recall", RECALL, 180),
    benchmark("attention", ATTENTION, 240),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_lab.sh", description="Build, check and time on a GPU.")
    parser.add_argument("out", type=Path, help="the folder for the results")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="run this part only")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    started = time.time()
    has_cuda = (
        subprocess.run([PYTHON, "-c", "import torch; torch.zeros(1).cuda()"], capture_output=True).returncode == 0
    )
    results = []
    for part in PARTS:
        if arguments.only and part.name not in arguments.only:
            continue
        results.append(run(part, has_cuda, TOTAL_SECONDS - (time.time() - started)))
        print(f"{part.name:12} {results[-1].result:7} {results[-1].seconds:6.1f} s  {results[-1].detail}", flush=True)
        write(arguments.out, results)  # after every part, so that a killed run leaves what it had
    for table in (ROOT / "benchmarks" / "results").glob("*.csv"):
        if table.stat().st_mtime >= started:
            shutil.copy(table, arguments.out / table.name)
    return 1 if any(result.result == "FAILED" for result in results) else 0


def run(part: Part, has_cuda: bool, seconds_left: float) -> Result:
    if part.needs_cuda and not has_cuda:
        return Result(part.name, "absent", 0, "PyTorch sees no CUDA device")
    if part.tool and shutil.which(part.tool) is None:
        return Result(part.name, "absent", 0, f"{part.tool} is not installed")
    if part.path and not (ROOT / part.path).exists():
        return Result(part.name, "absent", 0, f"there is no {part.path}")
    limit = min(part.seconds, seconds_left)
    if limit < 5:
        return Result(part.name, "FAILED", 0, f"no time was left of {TOTAL_SECONDS} s")
    settings = {"PYTHONUNBUFFERED": "1"} | ({"HMT_KERNELS_FORCE_CUDA": "1"} if has_cuda else {})
    started = time.time()
    process = subprocess.Popen(
        part.command, cwd=ROOT, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | settings,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        result = "ok" if process.returncode == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its children too
        output, _ = process.communicate()
        output += f"\nstopped after {limit:.0f} s"
        result = "FAILED"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return Result(part.name, result, time.time() - started, lines[-1][:150] if lines else "", output)


def write(out: Path, results: list[Result]) -> None:
    with (out / "lab.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["part", "result", "seconds", "detail"])
        writer.writerows([r.part, r.result, f"{r.seconds:.1f}", r.detail] for r in results)
    (out / "log.txt").write_text("".join(f"===== {r.part}: {r.result}\n{r.output}\n" for r in results))

    lines = ["# GPU lab", "", *environment(results), "", "| part | result | seconds | last line |", "|---|---|---|---|"]
    lines += [f"| {r.part} | {r.result} | {r.seconds:.1f} | {r.detail.replace('|', '/')} |" for r in results]
    for r in results:
        if r.result == "FAILED":
            lines += ["", f"## {r.part} failed", "", "```", *r.output.splitlines()[-15:], "```"]
        elif r.part in ("recall", "attention") and r.output:
            lines += ["", f"## {r.part.capitalize()}", "", "```", *r.output.splitlines()[-40:], "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def environment(results: list[Result]) -> list[str]:
    return [line for r in results if r.part == "environment" for line in r.output.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
