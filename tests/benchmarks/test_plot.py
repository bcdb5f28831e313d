"""The figures: drawn from CSV files, of a size that a repository can hold."""

from __future__ import annotations

import pytest

from benchmarks import costs, plot, results

LIMIT = 150 * 1024


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A row of everything that the figures show, for two sizes and two providers each."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    ceilings = costs.Ceilings(1e10, 1e11)
    quantities = [
        ("memory recall", "recall N={} D=576 bf16", "time", "us", (300, 1024)),
        ("segment attention", "causal T={} B=1 H=9/3 D=64 bf16", "both", "us", (256, 1058)),
        ("long context", "generate context={}", "speed", "tokens/s", (1000, 10000)),
        ("long context", "generate context={}", "peak memory", "MiB", (1000, 10000)),
        ("long context", "generate context={}", "kept per token of context", "B", (1000, 10000)),
        ("model on a GPU", "read Llama-7B segments={} L=1024", "time", "ms", (4, 16)),
        ("training depth", "train segments={} L=64", "extra peak memory", "MiB", (4, 16)),
    ]
    rows = [
        results.row(
            benchmark, workload.format(size), metric, provider, [size * 1e-6, size * 2e-6], unit, ratio=1.5,
            ratio_to="hmt", cost=costs.Cost(size, size), ceilings=ceilings,
        )
        for benchmark, workload, metric, unit, sizes in quantities
        for size in sizes
        for provider in ("hmt", "another")
    ]  # fmt: skip
    rows.append(results.row("roofline", "product in bfloat16", "rate", "torch", [1e11], "FLOP/s"))
    rows.append(results.row("roofline", "copy or sum", "bandwidth", "torch", [1e10], "B/s"))
    results.write("everything_cpu", rows)
    return tmp_path


def test_every_figure_is_drawn(folder):
    paths = plot.draw(folder, "cpu")
    assert [path.name for path in paths] == [f"{name}_cpu.png" for name in plot.FIGURES]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < LIMIT
    assert not list(folder.glob("*.partial"))


def test_a_figure_without_rows_is_named(folder, capsys):
    results.write("some_cuda", [results.row("b", "w", "time", "hmt", [1.0], "s")])
    assert plot.draw(folder, "cuda") == []
    assert capsys.readouterr().err.count("not drawn") == len(plot.FIGURES)


def test_the_committed_figures_are_small_and_drawn_from_committed_rows():
    drawn = list(results.FOLDER.glob("*.png"))
    assert len(drawn) >= 3
    assert all(path.stat().st_size < LIMIT for path in drawn)
    assert {path.name.rsplit("_", 1)[0] for path in drawn} <= set(plot.FIGURES)
