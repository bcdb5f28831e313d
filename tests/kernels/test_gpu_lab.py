"""The GPU lab on this machine: it reports what is absent, what fails and what succeeds, and goes on after a cut."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import parts, results
from benchmarks.gpu_lab import __main__ as lab
from benchmarks.gpu_lab import summary
from benchmarks.parts import Part, Result

ROOT = Path(__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def table(out: Path) -> dict[str, str]:
    with (out / "lab.csv").open() as file:
        return {row["part"]: row["result"] for row in csv.DictReader(file)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run for minutes on a GPU")
def test_the_whole_lab_reports_the_cuda_parts_absent(tmp_path):
    out = tmp_path / "out"
    command = ["bash", str(ROOT / "benchmarks" / "gpu_lab.sh"), str(out)]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = table(out)
    assert found.pop("environment") == "ok"
    assert len(found) == len(lab.lab_parts(out)) - 1 and set(found.values()) == {"absent"}
    page = (out / "summary.md").read_text()
    assert f"torch {torch.__version__}" in page and "| environment | ok |" in page
    assert "| ncu | absent | 0.0 | PyTorch sees no CUDA device |" in page and len(page.splitlines()) < 80


def test_the_limits_of_the_parts_fit_into_nine_minutes(tmp_path):
    assert sum(part.seconds for part in lab.lab_parts(tmp_path)) < lab.TOTAL_SECONDS < 9 * 60


def test_a_part_that_fails_or_hangs_is_reported_and_the_rest_runs(tmp_path, capsys):
    todo = [
        Part("build", python("print('why'); raise SystemExit(3)"), 60),
        Part("tests", python("import time; print('so far', flush=True); time.sleep(60)"), 5),
        Part("plot", python("print('drawn')"), 60),
    ]
    assert lab.run(todo, tmp_path, None, 120) == 1
    assert table(tmp_path) == {"build": "FAILED", "tests": "FAILED", "plot": "ok"}
    page = (tmp_path / "summary.md").read_text()
    assert "## build failed" in page and "stopped after 5 s; so far" in page
    assert (tmp_path / "tests.log").read_text() == "so far\n"


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    todo = [Part("build", python(count), 60), Part("tests", python("raise SystemExit(1)"), 60)]
    assert lab.run(todo, tmp_path, None, 120) == 1
    todo[1] = Part("tests", python("print('now')"), 60)
    assert lab.run(todo, tmp_path, None, 120) == 0
    assert table(tmp_path) == {"build": "ok", "tests": "ok"} and (tmp_path / "count").read_text() == "x"
    assert lab.run(todo, tmp_path, None, 120, again=True) == 0 and (tmp_path / "count").read_text() == "xx"


KILLED = """
import signal
import sys
from pathlib import Path
from benchmarks.gpu_lab import __main__ as lab
from benchmarks.parts import Part
signal.signal(signal.SIGINT, signal.default_int_handler)  # who is started in the background ignores it
out = Path(sys.argv[1])
todo = [Part("build", [sys.executable, "-c", "print(1)"], 60), Part("tests", ["sleep", "300"], 300)]
lab.run(todo, out, None, 300)
"""


def test_a_lab_that_is_killed_leaves_what_it_had(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "tests.log").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGINT)  # so that it can end what it started
        process.wait()
    assert table(tmp_path) == {"build": "ok", "tests": "cut off"}
    assert "| tests | cut off |" in (tmp_path / "summary.md").read_text()


def test_what_has_passed_is_not_run_again(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("def test_a():\n    pass\n\ndef test_b():\n    assert not FAILS\n")
    environment = os.environ | {"HMT_LAB_DONE": str(tmp_path / "passed.txt"), "PYTHONPATH": str(ROOT)}

    def run(*, fails: bool, workers: str) -> str:
        (tmp_path / "test_some.py").write_text(f"FAILS = {fails}\n" + file.read_text().removeprefix("FAILS = True\n"))
        options = ["-n", workers, "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
        command = lab.pytest(str(file), *options)
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return f"{result.returncode} {result.stdout.splitlines()[-1]}"

    assert run(fails=True, workers="1").startswith("1 1 failed, 1 passed")
    assert run(fails=False, workers="0").startswith("0 1 passed, 1 deselected")
    assert run(fails=False, workers="0").startswith("0 2 deselected")


def test_a_worker_that_dies_leaves_no_test_out(tmp_path):
    """Its successor collects the same tests, though some have passed since."""
    names = [f"test_{number:02}" for number in range(20)]
    bodies = {name: f"    time.sleep(0.3)\n    open({str(tmp_path / name)!r}, 'w')\n" for name in names}
    bodies["test_05"] = "    os._exit(1)\n"
    text = "".join(f"\ndef {name}():\n{body}" for name, body in bodies.items())
    (tmp_path / "test_some.py").write_text(f"import os, time\n{text}")
    done = tmp_path / "passed.txt"
    environment = os.environ | {"HMT_LAB_DONE": str(done), "PYTHONPATH": str(ROOT)}
    options = ["-n", "2", "--dist=worksteal", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    command = lab.pytest(str(tmp_path / "test_some.py"), *options)
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 19 passed" in result.stdout.splitlines()[-1], result.stdout
    assert all((tmp_path / name).exists() for name in names if name != "test_05")
    assert len(set(done.read_text().splitlines())) == 19


def test_parts_that_cannot_run_are_absent(tmp_path):
    log = tmp_path / "log"
    part = Part("gpu", ["true"], 60, needs_cuda=True)
    assert parts.run(part, log, has_cuda=False, seconds_left=60).detail == "PyTorch sees no CUDA device"
    tool = Part("tool", ["true"], 60, tool="no-such-program")
    assert parts.run(tool, log, has_cuda=True, seconds_left=60).detail == "no-such-program is not installed"
    late = parts.run(Part("late", ["true"], 60), log, has_cuda=True, seconds_left=2)
    assert late.result == "FAILED" and late.detail.startswith("no time was left")


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","hmt::memory_recall_fwd_kernel(int)","gpu__time_duration.sum","us","9.5"
"1","hmt::memory_recall_fwd_kernel(int)","gpu__time_duration.sum","us","8.5"
"1","hmt::memory_recall_fwd_kernel(int)","launch__registers_per_thread","register/thread","64"
"""


def test_the_page_shows_counters_and_goals(tmp_path, monkeypatch):
    (tmp_path / "ncu.csv").write_text(NCU)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.write("suite_cuda", [results.row("b", "step N=300", "time", "hmt", [7e-6], "us", goal="<= 8 us")])
    summary.write(tmp_path, [Result("ncu", "ok", 1.0, "")])
    page = (tmp_path / "summary.md").read_text()
    assert "| memory_recall_fwd_kernel | 8.5 us |" in page and "64 register/thread" in page
    assert "| step N=300 | time | hmt | 7 us |  | <= 8 us |" in page
