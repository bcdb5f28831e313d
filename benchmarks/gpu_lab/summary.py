"""The page that a GPU lab leaves: the machine, what ran, the figures that have a goal, ncu's counters, what failed."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from benchmarks import results
from benchmarks.parts import Result

LOG_LINES = 12
# of ncu, and what they say
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of memory's peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "of the multiprocessors' peak",
    "sm__inst_executed_pipe_tensor.sum": "tensor-core instructions",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared memory",
    "smsp__inst_executed.sum": "instructions",
}


def write(out: Path, parts: Iterable[Result]) -> None:
    """summary.md from what lies in `out`; complete at any moment."""
    parts = list(parts)
    lines = ["# GPU lab", "", *_text(out / "environment.log").splitlines(), ""]
    lines += ["| part | result | seconds | last line |", "|---|---|---|---|"]
    lines += [f"| {p.part} | {p.result} | {p.seconds:.1f} | {p.detail.replace('|', '/')} |" for p in parts]
    lines += goals(out)
    lines += counters(out / "ncu.csv")
    for part in parts:
        if part.result == "FAILED":
            log = _text(out / f"{part.part}.log").splitlines()[-LOG_LINES:]
            lines += ["", f"## {part.part} failed", "", "```", *log, "```"]
    lines += [f"\n![{path.stem}]({path.name})" for path in sorted(out.glob("*.png"))]
    results.write_file(out / "summary.md", "\n".join(lines) + "\n")


def goals(out: Path) -> list[str]:
    """The rows of the benchmarks that should reach something."""
    tables = [results.read_rows(path) for path in sorted(out.glob("*.csv"))]
    wanted = [row for rows in tables for row in rows if row.get("goal")]
    if not wanted:
        return []
    head = ["", "## Goals", "", "| workload | metric | provider | value | ratio | goal |", "|---|---|---|---|---|---|"]
    return head + [
        f"| {row['workload']} | {row['metric']} | {row['provider']} | {row['value']} {row['unit']}"
        f" | {row['ratio']} | {row['goal']} |"
        for row in wanted
    ]


def counters(path: Path) -> list[str]:
    """Of the last launch of every kernel in ncu's CSV, which has lines of other text before it."""
    lines = [line for line in _text(path).splitlines() if line.startswith('"')]
    values: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        name = row.get("Metric Name")
        if name in COUNTERS:
            kernel = row["Kernel Name"].partition("(")[0].split("::")[-1]
            values.setdefault(kernel, {})[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    if not values:
        return []
    head = ["", "## Counters", "", f"| kernel | {' | '.join(COUNTERS.values())} |", "|---" * (1 + len(COUNTERS)) + "|"]
    for kernel, of in values.items():
        head.append(f"| {kernel} | {' | '.join(of.get(name, '') for name in COUNTERS)} |")
    return head


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
