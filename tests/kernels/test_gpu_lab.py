"""The GPU lab on this machine: it reports what is absent, what fails and what succeeds."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu_lab import __main__ as lab

ROOT = Path(__file__).parents[2]


def test_the_script_leaves_a_table_and_a_page(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu_lab.sh"), str(tmp_path / "out")]
    parts = ["--only", "environment"] + ([] if torch.cuda.is_available() else ["--only", "memcheck"])
    result = subprocess.run(
        [*command, *parts], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    with (tmp_path / "out" / "lab.csv").open() as file:
        rows = {row["part"]: row["result"] for row in csv.DictReader(file)}
    assert rows.pop("environment") == "ok"
    assert set(rows.values()) <= {"absent"}
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert f"torch {torch.__version__}" in summary and "| environment | ok |" in summary


def test_a_part_that_fails_or_hangs_is_reported():
    failing = lab.Part("failing", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60, needs_cuda=False)
    hanging = lab.Part("hanging", [sys.executable, "-c", "import time; time.sleep(60)"], 5, needs_cuda=False)
    assert lab.run(failing, False, 60)._replace(seconds=0) == ("failing", "FAILED", 0, "why", "why\n")
    stopped = lab.run(hanging, False, 60)
    assert stopped.result == "FAILED" and stopped.detail == "stopped after 5 s"
    assert lab.run(hanging, False, 2).detail.startswith("no time was left")


def test_parts_that_cannot_run_are_absent():
    assert lab.run(lab.Part("gpu", ["true"], 60), False, 60).detail == "PyTorch sees no CUDA device"
    absent_tool = lab.Part("tool", ["true"], 60, needs_cuda=False, tool="no-such-program")
    assert lab.run(absent_tool, True, 60).detail == "no-such-program is not installed"
    absent_file = lab.Part("file", ["true"], 60, needs_cuda=False, path=Path("no/such/file"))
    assert lab.run(absent_file, True, 60).result == "absent"
