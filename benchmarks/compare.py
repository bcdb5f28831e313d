"""Is B slower than A? python -m benchmarks.compare A.csv B.csv [--threshold 5]: exits with 1 if something of ours is.

A row is worse when its median is, by more than the threshold, and the middle 60 % of its rounds (20th to 80th
percentile) lies apart from A's. What changed alike for the others of the same workload is put down to the machine, and
taken out first: all run by turns, so a machine that was busier slowed them too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.results import Row

HIGHER_IS_BETTER = ("tokens/s", "GB/s", "TFLOP/s")
OURS = ("hmt", "hmt_kernels")  # what their names begin with
COLUMNS = ("workload", "metric", "provider", "A", "B", "change", "machine", "verdict")


class Verdict(NamedTuple):
    row: Row
    before: str
    change: float  # how much worse B is, as a factor: 1.10 is 10 % slower, larger or less per second
    machine: float  # by how much the others of the workload are
    name: str  # slower, faster, same


def compare(before: Iterable[Row], after: Iterable[Row], threshold: float) -> list[Verdict]:
    """A verdict for each quantity of ours in both; `threshold` is a share, 0.05 for 5 %."""
    old = {results.key(row): row for row in before}
    pairs = [(old[results.key(row)], row) for row in after if results.key(row) in old]
    others: dict[tuple[str, ...], list[float]] = {}
    for a, b in pairs:
        if not is_ours(b):
            others.setdefault(_group(b), []).append(worse(a, b))
    verdicts = []
    for a, b in pairs:
        if is_ours(b) and b["value"] and a["value"]:
            machine = statistics.median(others.get(_group(b), [1.0]))
            verdicts.append(Verdict(b, a["value"], worse(a, b), machine, judge(a, b, machine, threshold)))
    return verdicts


def is_ours(row: Row) -> bool:
    return row["provider"].split(",")[0] in OURS


def _group(row: Row) -> tuple[str, ...]:
    return row["benchmark"], row["workload"], row["metric"]


def worse(before: Row, after: Row) -> float:
    """By which factor the median got worse."""
    a, b = float(before["value"]), float(after["value"])
    if after["unit"] in HIGHER_IS_BETTER:
        a, b = b, a
    return 1.0 if a == b else b / a if a else math.inf


def judge(before: Row, after: Row, machine: float, threshold: float) -> str:
    """Whether `after`, were the machine the same, is "slower", "faster" or the "same"."""
    a, b = _interval(before, 1.0), _interval(after, machine)
    change = worse(before, after) / machine
    if change > 1 + threshold and b[0] > a[1]:
        return "slower"
    if change < 1 / (1 + threshold) and b[1] < a[0]:
        return "faster"
    return "same"


def _interval(row: Row, machine: float) -> tuple[float, float]:
    """The middle of the rounds, as costs (seconds per token, not tokens per second); one value where there is one."""
    ends = [float(row.get(column) or row["value"]) for column in ("p20", "p80")]
    costs = [1 / end if row["unit"] in HIGHER_IS_BETTER else end for end in ends]
    return min(costs) / machine, max(costs) / machine


def warnings(before: list[Row], after: list[Row]) -> list[str]:
    """What makes the two hard to compare."""
    found = []
    for column in ("device", "threads", "torch"):
        values = [sorted({row.get(column, "") for row in rows}) for rows in (before, after)]
        if values[0] != values[1]:
            found.append(f"not the same {column}: {', '.join(values[0])} and {', '.join(values[1])}")
    lost = {results.key(row) for row in before if is_ours(row)} - {results.key(row) for row in after}
    found += [f"not in B: {', '.join(part for part in key if part)}" for key in sorted(lost)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("before", type=Path, metavar="A.csv")
    parser.add_argument("after", type=Path, metavar="B.csv")
    parser.add_argument("--threshold", type=float, default=5.0, help="per cent that do not matter (default: 5)")
    arguments = parser.parse_args()
    try:
        before, after = results.read(arguments.before), results.read(arguments.after)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    verdicts = compare(before, after, arguments.threshold / 100)
    if not verdicts:
        parser.error(f"{arguments.before} and {arguments.after} have no quantity of ours in common")
    print(*(f"warning: {line}" for line in warnings(before, after)), sep="\n")
    print(*results.table(map(_as_row, verdicts), COLUMNS), sep="\n")
    slower = sum(verdict.name == "slower" for verdict in verdicts)
    print(f"{len(verdicts)} compared, {slower} slower")
    return 1 if slower else 0


def _as_row(verdict: Verdict) -> Row:
    row = verdict.row
    values = {"A": f"{verdict.before} {row['unit']}", "B": f"{row['value']} {row['unit']}"}
    changes = {"change": f"{verdict.change:.3f}", "machine": f"{verdict.machine:.3f}", "verdict": verdict.name}
    return row | values | changes


if __name__ == "__main__":
    sys.exit(main())
