"""Results as JSON and, where matplotlib is installed, as a picture beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hmt.state_file import check_folder, write_whole


def check_report(path: str | Path) -> None:
    """Before long work: can a report be written there?

    Raises:
        ValueError: a path that itself ends with .png, is a folder, or lies in none.
    """
    if Path(path).suffix == ".png":
        raise ValueError(f"the report must be a JSON file, got {str(path)!r}: its picture gets this name by itself")
    check_folder(path)


def write_report(found: dict[str, Any], path: str | Path, draw: Callable[[dict[str, Any], Any], None]) -> None:
    """Write a report as JSON and what `draw(found, figure)` paints of it as a PNG of the same name (x.png for x.json).

    Raises:
        ValueError, OSError: a path that `check_report` refuses, or that cannot be written.
    """
    check_report(path)
    path = Path(path)
    write_whole(path, (json.dumps(found, indent=2) + "\n").encode())
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    draw(found, figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    name = path.stem if path.suffix == ".json" else path.name  # the end of another name tells it from others
    write_whole(path.with_name(f"{name}.png"), picture.getvalue())
