"""examples/synthetic_recall.py from training to its table and plot, and the first thing that a memory learns."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "synthetic_recall.py"


@pytest.fixture
def example() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("synthetic_recall", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_trains_every_mode_and_writes_a_table(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "SEGMENTS", (2, 3))
    output = tmp_path / "deep" / "table.csv"
    arguments = ["--steps", "4", "--batch-size", "2", "--texts", "20", "--width", "32", "--output", str(output)]
    rows = example.main(arguments)
    with output.open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert {row["mode"] for row in written} == {"hmt", "rmt", "baseline"}
    assert [(r["mode"], int(r["distance"])) for r in written] == [(r["mode"], r["distance"]) for r in rows]
    for mode in ("hmt", "rmt", "baseline"):
        of_mode = [row for row in written if row["mode"] == mode]
        assert sum(int(row["asked"]) for row in of_mode) == 20 * 10
        assert sum(int(row["right"]) for row in of_mode) < 60  # nothing leaks the answers
    if importlib.util.find_spec("matplotlib"):
        assert output.with_suffix(".png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("backbone", ["rwkv", "mamba2"])
def test_example_trains_backbones_without_attention(
    backbone: str, example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From start to table; examples/results holds what a whole training gives."""
    monkeypatch.setattr(example, "SEGMENTS", (2, 3))
    arguments = ["--backbone", backbone, "--modes", "hmt", "--steps", "4", "--batch-size", "2", "--texts", "20"]
    rows = example.main([*arguments, "--width", "32", "--output", str(tmp_path / "table.csv")])
    assert sum(row["asked"] for row in rows) == 20 * 10


def test_a_memory_learns_to_carry_a_fact(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part of the curriculum, where HMT and RMT are the same; guessing would be right once in 16 times."""
    monkeypatch.setattr(example, "SEGMENTS", (2,))
    monkeypatch.setattr(example, "MEASURED", 2)
    arguments = ["--modes", "hmt", "--steps", "100", "--texts", "200", "--output", str(tmp_path / "table.csv")]
    (row,) = example.main(arguments)
    assert row["distance"] == 1 and row["asked"] == 200
    assert row["accuracy"] > 0.9
