"""One tidy CSV per benchmark: a row per measured quantity, with where and when it was measured (columns: README.md)."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.costs import Ceilings, Cost, share

FOLDER = Path(os.environ.get("HMT_BENCH_RESULTS") or Path(__file__).parent / "results")
# rows that agree in all of these are the same quantity, measured again
KEY = ("benchmark", "workload", "metric", "provider")
MEASURED = ("value", "p20", "p80", "rounds", "unit", "ratio", "ratio_to", "goal", "bytes", "flops", "roofline")
NUMBERS = ("value", "p20", "p80", "rounds", "ratio", "bytes", "flops", "roofline")
PROVENANCE = ("device", "threads", "torch", "transformers", "python", "commit", "date")
COLUMNS = (*KEY, *MEASURED, *PROVENANCE)
SHOWN = ("workload", "metric", "provider", "value", "p20", "p80", "unit", "ratio", "goal", "roofline")
TIMES = {"s": 1.0, "ms": 1e3, "us": 1e6}  # how many of a unit make a second
Row = dict[str, str]


def row(
    benchmark: str,
    workload: str,
    metric: str,
    provider: str,
    values: Sequence[float],
    unit: str,
    *,
    ratio: float | None = None,
    ratio_to: str = "",
    goal: str = "",
    cost: Cost | None = None,
    ceilings: Ceilings | None = None,
) -> Row:
    """A row of the CSV: median, 20th and 80th percentile of `values`, which are seconds where `unit` is one of time."""
    scaled = [value * TIMES.get(unit, 1.0) for value in values]
    result = {"benchmark": benchmark, "workload": workload, "metric": metric, "provider": provider}
    result |= {"value": f"{statistics.median(scaled):.4g}", "rounds": str(len(scaled)), "unit": unit, "goal": goal}
    if len(scaled) > 1:
        result |= {"p20": f"{percentile(scaled, 20):.4g}", "p80": f"{percentile(scaled, 80):.4g}"}
    if ratio is not None:
        result |= {"ratio": f"{ratio:.3f}", "ratio_to": ratio_to}
    if cost is not None:
        result |= {"bytes": f"{cost.bytes:.4g}", "flops": f"{cost.flops:.4g}"}
    if cost is not None and ceilings is not None and unit in TIMES:
        result["roofline"] = f"{share(cost, statistics.median(values), ceilings):.3f}"
    return result


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    return ordered[below] + (position - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """The median of the rounds' own ratios; who was measured in fewer rounds was in the first ones."""
    return statistics.median(a / b for a, b in zip(values, reference, strict=False))


def sizes(workload: str) -> dict[str, str]:
    """{"N": "300", "D": "576"} of "recall N=300 D=576 bf16"."""
    return dict(word.split("=", 1) for word in workload.replace(",", " ").split() if "=" in word)


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The checked out commit, with "+" when the tree differs from it, these results aside; or HMT_BENCH_COMMIT."""
    if given := os.environ.get("HMT_BENCH_COMMIT"):  # of a copy of the files alone
        return given
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance() -> dict[str, str]:
    """The columns that every row ends with."""
    import torch  # what only reads tables starts without it

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, rows: Iterable[Row]) -> Path:
    """Put rows into results/<name>.csv in place of older ones of the same quantity; the file is replaced whole.

    Rows of another device go: nobody could compare the others with these.
    """
    FOLDER.mkdir(exist_ok=True, parents=True)
    path = FOLDER / f"{name}.csv"
    where = provenance()
    before = read(path) if path.exists() else []
    merged = {key(row): row for row in before if row.get("device", where["device"]) == where["device"]}
    merged |= {key(row): row | where for row in rows}
    write_csv(path, COLUMNS, merged.values())
    return path


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """A file that is complete at any moment; what a row lacks stays empty, what is no column is left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def write_file(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of one CSV of a benchmark. Raises ValueError if it is none, or damaged."""
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        missing = [column for column in (*KEY, "value", "unit") if column not in (table.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} is not a table of benchmarks: it has no column {', '.join(missing)}")
        rows = []
        for row in table:
            if None in row or None in row.values() or not all(is_number(row.get(name, "")) for name in NUMBERS):
                raise ValueError(f"{path} is damaged at line {table.line_num}: {','.join(map(str, row.values()))}")
            rows.append(row)
    return rows


def is_number(text: str) -> bool:
    """Whether a cell is empty or a finite number."""
    try:
        return not text or math.isfinite(float(text))
    except ValueError:
        return False


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: Row) -> tuple[str, ...]:
    return tuple(row.get(column, "") for column in KEY)


def table(rows: Iterable[Row], columns: tuple[str, ...] = SHOWN) -> list[str]:
    """Lines of an aligned table of some columns."""
    cells = [columns, *(tuple(row.get(column, "") for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
