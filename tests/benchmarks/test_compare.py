"""The regression check: what is slower, what is noise, what is the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, results

ROOT = Path(__file__).parents[2]
UNITS = {"time": "us", "speed": "tokens/s"}


def rows(metric: str = "time", **providers: tuple[float, ...]) -> list[results.Row]:
    """A row per provider with the median and, of three numbers, the percentiles."""
    made = []
    for provider, (value, *spread) in providers.items():
        row = results.row("memory recall", "recall N=300 D=64 fp32", metric, provider, [1.0], UNITS[metric])
        row |= {"value": str(value), "device": "a machine", "threads": "2", "torch": "2"}
        made.append(row | dict(zip(("p20", "p80"), map(str, spread), strict=False)))
    return made


@pytest.mark.parametrize(
    ("metric", "before", "after", "expected"),
    [
        pytest.param("time", (100, 99, 101), (120, 118, 122), "slower", id="slower"),
        pytest.param("time", (100, 99, 101), (80, 79, 81), "faster", id="faster"),
        pytest.param("time", (100, 99, 101), (104, 103, 105), "same", id="within the threshold"),
        pytest.param("time", (100, 90, 119), (120, 115, 130), "same", id="rounds overlap"),
        pytest.param("time", (100,), (110,), "slower", id="one round, slower"),
        pytest.param("speed", (100, 99, 101), (80, 79, 81), "slower", id="fewer per second"),
        pytest.param("speed", (100, 99, 101), (120, 118, 122), "faster", id="more per second"),
    ],
)
def test_verdicts(metric, before, after, expected):
    (verdict,) = compare.compare(rows(metric, hmt=before), rows(metric, hmt=after), 0.05)
    assert verdict.name == expected


@pytest.mark.parametrize(("machine", "expected"), [(1.2, "same"), (1.0, "slower"), (1.5, "faster")])
def test_what_slowed_all_alike_is_the_machine(machine, expected):
    before = rows(hmt_kernels=(100, 99, 101), copy=(50, 49, 51), SDPA=(70, 69, 71))
    after = rows(hmt_kernels=(120, 119, 121), copy=(50 * machine, 49, 51), SDPA=(70 * machine, 69, 71))
    (verdict,) = compare.compare(before, after, 0.05)
    assert (
        verdict.name == expected and verdict.machine == pytest.approx(machine) and verdict.change == pytest.approx(1.2)
    )


def test_another_provider_cannot_regress():
    assert compare.compare(rows(copy=(100,)), rows(copy=(200,)), 0.05) == []


def run(before: list[results.Row], after: list[results.Row], folder: Path) -> subprocess.CompletedProcess:
    for name, table in (("a.csv", before), ("b.csv", after)):
        results.write_csv(folder / name, results.COLUMNS, table)
    command = [sys.executable, "-m", "benchmarks.compare", folder / "a.csv", folder / "b.csv"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_regression_is_the_exit_status(tmp_path):
    fast, slow = rows(hmt=(100, 99, 101)), rows(hmt=(120, 119, 121))
    same, worse = run(fast, fast, tmp_path), run(fast, slow, tmp_path)
    assert same.returncode == 0 and "1 compared, 0 slower" in same.stdout
    assert worse.returncode == 1 and "1 compared, 1 slower" in worse.stdout


def test_what_cannot_be_compared_is_an_error(tmp_path):
    nothing = run(rows(hmt=(100,)), rows(copy=(100,)), tmp_path)
    assert nothing.returncode == 2 and "no quantity of ours in common" in nothing.stderr
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"b\.csv is not a table of benchmarks: it has no column benchmark"):
        results.read(tmp_path / "b.csv")


@pytest.mark.parametrize("value", ["nan", "fast", "100,1"], ids=["nan", "text", "cells"])
def test_damaged_rows_are_no_verdict(value, tmp_path):
    results.write_csv(tmp_path / "a.csv", results.COLUMNS, rows(hmt=(100,)))
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "b.csv").write_text(text.replace(",100,", f",{value},"))
    command = [sys.executable, "-m", "benchmarks.compare", tmp_path / "a.csv", tmp_path / "b.csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "b.csv is damaged at line 2" in done.stderr


def test_what_took_nothing_is_not_infinitely_worse():
    assert compare.compare(rows(hmt=(0,)), rows(hmt=(0,)), 0.05)[0].name == "same"
    assert compare.compare(rows(hmt=(0,)), rows(hmt=(100,)), 0.05)[0].name == "slower"


def test_other_machines_and_lost_rows_are_named():
    before = rows(hmt=(100,), hmt_kernels=(100,))
    after = [row | {"device": "another"} for row in rows(hmt=(100,))]
    found = compare.warnings(before, after)
    assert found[0] == "not the same device: a machine and another"
    assert found[1].startswith("not in B: memory recall, recall N=300") and found[1].endswith("hmt_kernels")
