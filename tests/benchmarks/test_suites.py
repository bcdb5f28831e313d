"""Every suite runs on tiny inputs, checks what it times, and writes its rows; `make bench` survives a failing one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import allocators, parts, results, run

ROOT = Path(__file__).parents[2]
# file, selected tests, and (workload, metric, provider) that must be among the rows
SUITES = {
    "recall": ("test_memory_recall", "fp32 and 20", ("recall N=20 D=64 fp32", "time", "cached keys, SDPA")),
    "attention": (
        "test_segment_attention",
        "attention and fp32",
        ("hole T=24 B=1 H=9/3 D=64 fp32", "both", "SDPA, math"),
    ),
    "model": ("test_model", "read", ("read segments=2 L=16", "time", "plain loop")),
    "gpu model": (
        "test_gpu_model",
        "score or SmolLM and decoding",
        ("decode SmolLM-135M L=16", "time per token", "hmt, cuda_graphs=False"),
    ),
    "long context": ("test_long_context", "linear or generation", ("generate context=80", "speed", "hmt")),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that the suites, in one process, have written to, and what they printed."""
    folder = tmp_path_factory.mktemp("results")
    files = [f"benchmarks/{file}.py" for file, _, _ in SUITES.values()]
    selection = " or ".join(f"{file} and ({selected})" for file, selected, _ in SUITES.values())
    command = [sys.executable, "-m", "pytest", *files, "-q", "-k", selection, "-p", "no:cacheprovider"]
    # pytest-benchmark runs everything once where it finds itself in a worker of xdist
    left_out = ("HMT_PYTORCH", "TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"HMT_BENCH_TINY": "1", "HMT_BENCH_RESULTS": str(folder)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_writes_its_rows(suite, ran):
    file, _, wanted = SUITES[suite]
    (path,) = ran[0].glob(f"{file.removeprefix('test_')}_*.csv")
    rows = results.read(path)
    assert wanted in {(row["workload"], row["metric"], row["provider"]) for row in rows}
    assert all(float(row["value"]) > 0 and row["commit"] for row in rows)
    timed = [row for row in rows if row["metric"] in ("time", "both", "time per token")]
    assert all(row["p20"] and float(row["p20"]) <= float(row["value"]) <= float(row["p80"]) for row in timed)
    assert any(row["flops"] and row["roofline"] for row in timed)
    assert any(row["benchmark"] == "roofline" for row in rows)


def test_who_does_not_run_is_listed_with_the_reason(ran):
    listed = ran[1].partition(" not run ")[2]
    assert all(text in listed for text in ("(recall): ", "(causal): ", "(hole): ", "HMT_PYTORCH")), listed


def test_a_suite_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def command(name, file, slow=False):
        code = "print('\\n==== table'); raise SystemExit(3)" if name == "model" else "print('\\n==== a table')"
        return parts.Part(name, [sys.executable, "-c", code], 60)

    monkeypatch.setattr(run, "suite", command)
    monkeypatch.setattr(run, "LOGS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.setenv("HMT_BENCH_RESULTS", str(tmp_path))
    monkeypatch.delenv("HMT_PYTORCH", raising=False)
    monkeypatch.setattr(run, "DEVICE", "cpu")
    assert run.main() == 1
    printed = capsys.readouterr().out
    assert "    model FAILED after" in printed and "    long context ok after" in printed
    assert "gpu model not run: PyTorch sees no CUDA device" in printed
    assert "peer training not run: HMT_PYTORCH" in printed
    assert printed.count("==== a table") == len(run.SUITES) - 3


def test_a_library_that_is_not_preloaded_is_noticed(monkeypatch):
    monkeypatch.setattr(allocators, "find_library", lambda name: f"lib{name}.so.2")
    assert allocators.environment("mimalloc") == {"LD_PRELOAD": "libmimalloc.so.2"}
    assert allocators.environment("malloc") == {}
    monkeypatch.setattr(allocators, "allocator", lambda: "glibc 2.36")
    allocators.check("malloc")
    with pytest.raises(RuntimeError, match=r"mimalloc was not preloaded: this process allocates with glibc 2\.36"):
        allocators.check("mimalloc")
