"""One tidy CSV per benchmark: a row per measured quantity, with where and when it was measured (columns: README.md)."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import transformers

FOLDER = Path(__file__).parent / "results"
# rows that agree in all of these are the same quantity, measured again
KEY = ("benchmark", "workload", "metric", "comparison", "provider")
SHOWN = ("workload", "metric", "provider", "value", "min", "max", "unit", "ratio", "goal")


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The checked out commit, with "+" when the tree differs from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance() -> dict[str, str]:
    """The columns that every row ends with."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, rows: Iterable[Mapping[str, object]]) -> Path:
    """Put rows into results/<name>.csv in place of older ones of the same quantity; the file is replaced whole."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.csv"
    where = provenance()
    merged: dict[tuple[str, ...], Mapping[str, object]] = {_key(row): row for row in _read(path)}
    merged |= {_key(row): {**row, **where} for row in rows}
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        columns = list(dict.fromkeys(column for row in reversed(merged.values()) for column in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
    partial.replace(path)
    return path


def _key(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(row.get(column, "")) for column in KEY)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: Iterable[Mapping[str, object]], columns: tuple[str, ...] = SHOWN) -> list[str]:
    """Lines of an aligned table of some columns."""
    cells = [columns, *(tuple(str(row.get(column, "")) for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
