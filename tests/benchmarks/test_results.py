"""The CSV of the benchmarks, the formulas behind its columns, and the registry of providers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from benchmarks import attention_providers, costs, providers, recall_providers, results, stopwatch


def test_a_row_has_median_and_percentiles():
    values = [3e-3, 1e-3, 2e-3, 5e-3, 4e-3]
    row = results.row("b", "w", "time", "hmt", values, "ms", ratio=1.0, ratio_to="hmt")
    assert (row["value"], row["p20"], row["p80"], row["rounds"]) == ("3", "1.8", "4.2", "5")
    assert [results.percentile(values, q) for q in (20, 80)] == pytest.approx(np.percentile(values, [20, 80]))
    single = results.row("b", "w", "peak memory", "hmt", [7.0], "MiB")
    assert single["value"] == "7" and "p20" not in single and "ratio" not in single


def test_a_row_says_how_near_the_ceiling_it_came():
    ceilings = costs.Ceilings(bandwidth=1e9, rate=1e12)
    memory_bound = results.row("b", "w", "time", "p", [2.0], "s", cost=costs.Cost(1e9, 1e3), ceilings=ceilings)
    compute_bound = results.row("b", "w", "time", "p", [2.0], "s", cost=costs.Cost(1e3, 1e12), ceilings=ceilings)
    assert memory_bound["roofline"] == compute_bound["roofline"] == "0.500"


def test_writing_replaces_the_same_quantity_only(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.write("suite", [results.row("b", "w", "time", name, [1.0], "s") for name in ("x", "y")])
    path = results.write("suite", [results.row("b", "w", "time", "y", [2.0], "s")])
    rows = results.read(path)
    assert [(row["provider"], row["value"]) for row in rows] == [("x", "1"), ("y", "2")]
    assert tuple(rows[0]) == results.COLUMNS and all(row["torch"] == torch.__version__ for row in rows)
    assert [entry.name for entry in tmp_path.iterdir()] == ["suite.csv"]


def test_rows_of_another_device_do_not_stay_beside_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "provenance", lambda: {"device": "H100", "commit": "a"})
    results.write("suite", [results.row("b", "w", "time", name, [1.0], "s") for name in ("x", "y")])
    monkeypatch.setattr(results, "provenance", lambda: {"device": "H200", "commit": "a"})
    path = results.write("suite", [results.row("b", "w", "time", "y", [2.0], "s")])
    assert [(row["provider"], row["device"]) for row in results.read(path)] == [("y", "H200")]


def test_sizes_are_read_from_a_workload():
    assert results.sizes("recall N=300 D=576 bf16") == {"N": "300", "D": "576"}


def test_rounds_that_a_slow_provider_lacks_do_not_shift_the_others():
    assert results.median_ratio([2.0, 4.0], [1.0, 2.0, 100.0]) == 2.0


def test_a_slow_provider_stops_after_some_seconds(monkeypatch):
    monkeypatch.setattr(stopwatch, "turn", lambda call, calls: call())
    turns = stopwatch.Turns({"slow": lambda: 1.5, "fast": lambda: 1e-3})
    for _ in range(6):
        turns.take_all_but("none")
    assert len(turns.seconds["slow"]) == 2 and len(turns.seconds["fast"]) == 6


def test_what_takes_long_is_called_once(monkeypatch):
    calls = []
    monkeypatch.setattr(stopwatch, "turn", lambda call, runs: call())
    turns = stopwatch.Turns({"slow": lambda: calls.append("slow") or 3.0})
    turns.take("slow")
    assert turns.seconds["slow"] == [3.0] and calls == ["slow"]


def test_attention_counts_visible_pairs():
    length, hidden = 9, (2, 5)
    seen = torch.ones(length, length).tril()
    for key in range(*hidden):
        seen[key + 1 :, key] = 0  # a hidden key still sees itself
    cost = costs.attention("forward", 2, (4, 2), length, 8, 2, hidden)
    assert cost.flops == 4 * 2 * 4 * 8 * seen.sum()
    assert cost.bytes == 2 * (2 * 4 + 2 * 2) * length * 8 * 2


@pytest.mark.parametrize("workload", ["read", "score", "train"])
def test_model_costs_count_what_a_pass_multiplies(workload):
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    weights = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 12  # q, o; k, v; the three of the feed-forward part
    layer = lambda n: 2 * n * weights + 4 * (n * (n + 1) // 2) * 8  # noqa: E731
    reads = 2 * (2 * layer(2 + 2) + layer(4 + 2) + layer(4 + 2 + 1))
    heads = 2 * 2 * 4 * 8 * 11
    expected = {"read": reads, "score": reads + heads, "train": 3 * (reads + heads)}
    assert costs.model(workload, config, 2, 4, 1, 1000).flops == expected[workload]


def test_every_provider_of_a_suite_is_made_or_says_why_not():
    inputs = {
        "recall": recall_providers.make_inputs(20, 64, torch.float32, "cpu"),
        "attention": attention_providers.make_inputs("rotary", 1, (2, 1), 24, 64, torch.float32, "cpu"),
    }
    for suite, of_suite in inputs.items():
        found, absent = providers.make(suite, of_suite)
        assert {*found, *absent} == {provider.name for provider in providers.of(suite)}
        assert next(iter(found)) == providers.OURS[suite] and all(absent.values())
    assert "FlashAttention-2" in absent and "SDPA, Liger's rotary" in absent


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="a name of its own"):
        providers.register("recall", providers.OURS["recall"], lambda x: x)
    with pytest.raises(ValueError, match="'sorting'"):
        providers.register("sorting", "quick", lambda x: x)
