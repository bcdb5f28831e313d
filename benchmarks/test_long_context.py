"""Long contexts on a small model: what a token costs after 1k, 10k and 100k others, and how fast those are read.

The backbone alone, with its keys cached, is what most people use today: its time and memory grow with the context.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import long_context, peak_memory
from benchmarks.long_context import BACKBONE, CONTEXTS, HMT, TOKENS
from benchmarks.test_model import Rows, skip_if
from hmt import HMTForCausalLM, HMTState

ROUNDS = 3
READ_LENGTHS = (10_000, 100_000)


@pytest.fixture(scope="module")
def model() -> HMTForCausalLM:
    return long_context.build()


@pytest.fixture(scope="module")
def states(model: HMTForCausalLM) -> dict[int, HMTState]:
    """The state after each context; the open segment is as long in all, so that only the past differs."""
    length = long_context.SEGMENT_LENGTH
    return {n: model.read(long_context.text(n // length * length + 8)) for n in CONTEXTS}


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("provider", [HMT, BACKBONE])
def test_time_per_generated_token(
    provider: str, model: HMTForCausalLM, states: dict[int, HMTState], benchmark: Any, rows: Rows
) -> None:
    """Contexts by turns; for ours a whole segment's tokens, with the pass that closes it. The ratio is to 1k."""
    calls = {n: long_context.generator(model, provider, n, states[n]) for n in CONTEXTS}
    seconds: dict[int, list[float]] = {n: [] for n in CONTEXTS}

    def turn() -> None:
        for n, call in calls.items():
            seconds[n].append(seconds_of(call) / TOKENS[provider])

    turn()
    for values in seconds.values():
        values.clear()
    benchmark.pedantic(turn, rounds=ROUNDS)
    for n, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds[CONTEXTS[0]], strict=True))
        add_row(rows, f"generate after {n} tokens", "time per token", provider, [1e3 * v for v in values], "ms", ratio)


@pytest.mark.parametrize("provider", [HMT, BACKBONE])
def test_peak_memory(provider: str, states: dict[int, HMTState], benchmark: Any, rows: Rows, tmp_path: Path) -> None:
    """Of a process that takes the context over (as a saved state, or as a full cache) and generates."""
    skip_if(peak_memory.unavailable())
    measured: dict[int, float] = {}

    def measure() -> None:
        for n in CONTEXTS:
            states[n].save(tmp_path / "state")
            state = tmp_path / "state" if provider == HMT else None
            measured[n] = long_context.peak_in_new_process(provider, n, state) / 2**20

    benchmark.pedantic(measure, rounds=1)
    for n, value in measured.items():
        ratio = value / measured[CONTEXTS[0]]
        add_row(rows, f"generate after {n} tokens", "peak memory", provider, [value], "MiB", ratio)


def test_reading_is_linear(model: HMTForCausalLM, benchmark: Any, rows: Rows) -> None:
    """Tokens per second of a short and a long text, by turns; the ratio is to the short one."""
    speeds: dict[int, list[float]] = {n: [] for n in READ_LENGTHS}
    texts = {n: long_context.text(n) for n in READ_LENGTHS}

    def turn() -> None:
        for n, ids in texts.items():
            speeds[n].append(n / seconds_of(functools.partial(model.read, ids)))

    model.read(texts[READ_LENGTHS[0]])
    benchmark.pedantic(turn, rounds=2)
    for n, values in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(values, speeds[READ_LENGTHS[0]], strict=True))
        goal = "0.97 at least" if n == READ_LENGTHS[-1] else ""
        add_row(rows, f"read {n} tokens", "speed", HMT, values, "tokens/s", ratio, goal)


def add_row(
    rows: Rows, workload: str, metric: str, provider: str, values: list[float], unit: str, ratio: float, goal: str = ""
) -> None:
    if not goal and provider == HMT and "generate" in workload:
        goal = "1.05 at most"
    rows.append(
        {
            "benchmark": "long context",
            "workload": workload,
            "metric": metric,
            "comparison": "the shortest context",
            "provider": provider,
            "value": f"{statistics.median(values):.4g}",
            "min": f"{min(values):.4g}",
            "max": f"{max(values):.4g}",
            "unit": unit,
            "ratio": f"{ratio:.3f}",
            "goal": goal,
        }
    )
