"""The parts of the GPU lab, one after another, each in a process of its own; see benchmarks/gpu_lab.sh."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import parts, results
from benchmarks.gpu_lab import summary
from benchmarks.parts import Part, Result

PYTHON = sys.executable
TOTAL_SECONDS = 538
# what runs on the device, not what emulates one
KERNEL_TESTS = ("cuda_recall", "cuda_attention", "triton_recall", "triton_recall_operator", "triton_recall_step")
KERNEL_TESTS += ("triton_attention", "triton_attention_operator", "memory_recall_step")
TESTS = [f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS]
TESTS += ["tests/hmt/test_on_cuda.py", "tests/hmt/test_rotary_in_use.py::test_on_cuda_the_default_fuses"]
SELECTION = [PYTHON, "-m", "benchmarks.gpu_lab.selection"]
COLUMNS = ("part", "result", "seconds", "detail", "commit")


def lab_parts(out: Path) -> list[Part]:
    """Their limits add up to less than TOTAL_SECONDS, so that none takes another's time."""
    build = [PYTHON, "setup.py", "build_ext", "--inplace"]
    workers = str(max(1, min(14, (os.cpu_count() or 1) - 1)))
    tests = pytest(*TESTS, "-p", "benchmarks.gpu_lab.on_device", "-n", workers, "--dist=worksteal", "--tb=short")
    tools = {"memcheck": 15, "racecheck": 40, "initcheck": 15, "synccheck": 15}
    audit = [PYTHON, "-m", "benchmarks.audit", "--table", str(out / "audit.csv"), "--measure"]
    counters = ",".join(summary.COUNTERS)
    # the clocks stay as they are, or its times would not be those of the benchmarks
    ncu = ["ncu", "--csv", "--log-file", str(out / "ncu.csv"), "--metrics", counters, "--clock-control", "none"]
    ncu += ["--profile-from-start", "off"]
    ncu += ["--kernel-name", "regex:memory_recall|segment_attention", PYTHON, "-m", "benchmarks.gpu_lab.hot"]
    plot = [PYTHON, "-m", "benchmarks.plot", "--device", "cuda", "--results", str(out)]
    return [
        Part("environment", [PYTHON, "-m", "benchmarks.gpu_lab.environment"], 10, "environment"),
        Part("build", build, 25, "build", needs_cuda=True, tool="nvcc"),
        # first, since it compiles the Triton kernels on all cores, and the others find them in Triton's cache
        Part("audit", audit, 45, "audit", needs_cuda=True),
        Part("tests", tests, 80, "tests", needs_cuda=True),
        # once without a tool, so that these need not compile
        Part("selection", SELECTION, 35, "sanitizer", needs_cuda=True),
        *(
            Part(tool, sanitizer(tool), most, "sanitizer", needs_cuda=True, tool="compute-sanitizer")
            for tool, most in tools.items()
        ),
        Part("attention", pytest("benchmarks/test_segment_attention.py"), 78, "bench", needs_cuda=True),
        Part("model", pytest("benchmarks/test_gpu_model.py"), 90, "bench", needs_cuda=True),
        Part("recall", pytest("benchmarks/test_memory_recall.py"), 45, "bench", needs_cuda=True),
        Part("ncu", ncu, 30, "ncu", needs_cuda=True, tool="ncu"),
        Part("plot", plot, 8, "plot", needs_cuda=True),
    ]


def pytest(*arguments: str) -> list[str]:
    """It goes on where an earlier call was cut off."""
    return [PYTHON, "-m", "pytest", *arguments, "-q", "-p", "benchmarks.gpu_lab.resume"]


def sanitizer(tool: str) -> list[str]:
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *SELECTION]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_lab.sh", description="Build, check and time on a GPU.")
    parser.add_argument("out", type=Path, help="the folder for the results; a second call goes on in it")
    parser.add_argument("--only", action="append", default=[], help="parts or groups of them, separated by commas")
    parser.add_argument("--again", action="store_true", help="run also what has succeeded in this folder before")
    arguments = parser.parse_args()
    started = time.monotonic()
    out = arguments.out.resolve()
    todo = lab_parts(out)
    wanted = {name for names in arguments.only for name in names.split(",")}
    if unknown := wanted - {part.name for part in todo} - {part.group for part in todo}:
        known = ", ".join(dict.fromkeys(part.group for part in todo))
        parser.error(f"--only must be of {known} or a part of them, got {', '.join(sorted(unknown))}")
    todo = [part for part in todo if not wanted or wanted & {part.name, part.group}]
    out.mkdir(parents=True, exist_ok=True)
    arch = gpu_architecture()
    return run(todo, out, arch, TOTAL_SECONDS - (time.monotonic() - started), again=arguments.again)


def run(todo: list[Part], out: Path, arch: str | None, seconds: float, again: bool = False) -> int:
    """Run parts, less those that succeeded in this folder before; 1 if any failed. Every result is written at once."""
    deadline, commit = time.monotonic() + seconds, results.commit()
    state = earlier_results(out, commit)
    if again:
        (out / f"passed_{commit}.txt").unlink(missing_ok=True)
    failed = False
    for part in todo:
        if not again and part.name in state and state[part.name].result == "ok":
            print(f"{part.name:12} ok in an earlier call", flush=True)
            continue
        write(out, state | {part.name: Result(part.name, "cut off", 0, "it was running when the lab ended")}, commit)
        left, log = deadline - time.monotonic(), out / f"{part.name}.log"
        environment = settings(out, commit, arch)
        result = parts.run(part, log, has_cuda=arch is not None, seconds_left=left, environment=environment)
        state[part.name] = result
        write(out, state, commit)
        print(f"{part.name:12} {result.result:7} {result.seconds:6.1f} s  {result.detail}", flush=True)
        failed |= result.result == "FAILED"
    return int(failed)


def gpu_architecture() -> str | None:
    """As TORCH_CUDA_ARCH_LIST wants it, "9.0a"; None where PyTorch cannot use a GPU."""
    code = "import torch; torch.zeros(1).cuda(); print(*torch.cuda.get_device_capability(), sep='.')"
    answer = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    if answer.returncode:
        return None
    number = answer.stdout.strip()
    return number + "a" if number == "9.0" else number


def settings(out: Path, commit: str, arch: str | None) -> dict[str, str]:
    """Of the parts' environment: results come here as they are measured, and only this GPU's code is built."""
    chosen = {"HMT_BENCH_RESULTS": str(out), "HMT_LAB_DONE": str(out / f"passed_{commit}.txt")}
    if arch is None:
        return chosen
    targets = os.environ.get("TORCH_CUDA_ARCH_LIST", arch)
    return chosen | {"HMT_KERNELS_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": targets}


def earlier_results(out: Path, commit: str) -> dict[str, Result]:
    """Of an earlier call in this folder, for the same commit."""
    path = out / "lab.csv"
    rows = results.read_rows(path) if path.exists() else []
    return {
        row["part"]: Result(row["part"], row["result"], float(row["seconds"]), row["detail"])
        for row in rows
        if row["commit"] == commit
    }


def write(out: Path, state: dict[str, Result], commit: str) -> None:
    """After every part and before the next, so that a lab that is cut off leaves what it had."""
    order = [part.name for part in lab_parts(out)]
    ordered = sorted(state.values(), key=lambda result: order.index(result.part) if result.part in order else -1)
    rows = [result._asdict() | {"seconds": f"{result.seconds:.1f}", "commit": commit} for result in ordered]
    results.write_csv(out / "lab.csv", COLUMNS, rows)
    summary.write(out, ordered)


if __name__ == "__main__":
    sys.exit(main())
