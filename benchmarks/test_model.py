"""Reading and scoring a text: the model layer against a plain loop and, where HMT_PYTORCH is set, HMT-pytorch itself.

Both sides run by turns, A B A B ..., so that a busy machine slows both alike; a ratio is the median of the rounds' own.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peak_memory
from benchmarks.model_providers import OURS, WORKLOADS, Runner, runners, unavailable
from benchmarks.model_shape import text

ROUNDS = 3
# HMT-pytorch recalls in bfloat16, so its results agree to that precision only
TOLERANCE = {"plain loop": 1e-4, "HMT-pytorch": 2e-2}
TIME_GOALS = {"read": 1.5, "score": 1.25}
MEMORY_GOAL = 8.0
# for a processor with bfloat16 instructions; others compute it slowly
BFLOAT16_SEGMENTS, BFLOAT16_GOAL = 4, 1.5
Rows = list[dict[str, object]]
provider_runners = functools.cache(runners)


def timed(run: Runner, seconds: list[float], ids: Tensor) -> dict[str, Tensor]:
    start = time.perf_counter()
    result = run(ids)
    seconds.append(time.perf_counter() - start)
    return result


@pytest.mark.parametrize("baseline", ["plain loop", "HMT-pytorch"])
@pytest.mark.parametrize("workload", WORKLOADS)
@torch.no_grad()
def test_time(workload: str, baseline: str, benchmark: Any, rows: Rows) -> None:
    skip_if(unavailable(baseline))
    seconds: dict[str, list[float]] = {OURS: [], baseline: []}
    ours, theirs = (functools.partial(timed, provider_runners(p)[workload], seconds[p]) for p in seconds)
    ids, tolerance = text(), TOLERANCE[baseline]
    torch.testing.assert_close(ours(ids), theirs(ids), atol=tolerance, rtol=tolerance)
    for runs in seconds.values():
        runs.clear()

    def their_turn() -> None:
        theirs(ids)

    benchmark.pedantic(ours, args=(ids,), setup=their_turn, rounds=ROUNDS)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    ratio = benchmark.extra_info["ratio"] = statistics.median(ratios)
    add_rows(rows, (workload, "time", "s"), seconds, ratio, TIME_GOALS[workload])


@pytest.mark.parametrize("baseline", ["plain loop", "plain loop, outputs dropped", "HMT-pytorch"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_extra_peak_memory(workload: str, baseline: str, benchmark: Any, rows: Rows) -> None:
    skip_if(unavailable(baseline) or peak_memory.unavailable())
    if workload == "score" and "dropped" in baseline:
        pytest.skip("a loss over the whole text needs the outputs of all segments")
    ours = peak_memory.in_new_process(OURS, workload) / 2**20
    theirs = benchmark.pedantic(peak_memory.in_new_process, args=(baseline, workload), rounds=1) / 2**20
    ratio = benchmark.extra_info["ratio"] = theirs / ours
    goal = MEMORY_GOAL if baseline == "plain loop" else None
    add_rows(rows, (workload, "extra peak memory", "MiB"), {OURS: [ours], baseline: [theirs]}, ratio, goal)


@torch.no_grad()
def test_bfloat16(benchmark: Any, rows: Rows) -> None:
    """Our own reading in bfloat16 against float32, by turns."""
    low, full = f"{OURS}, bfloat16", OURS
    seconds: dict[str, list[float]] = {low: [], full: []}
    ours = functools.partial(timed, runners(OURS, dtype="bfloat16")["read"], seconds[low])
    theirs = functools.partial(timed, provider_runners(OURS)["read"], seconds[full])
    ids = text(BFLOAT16_SEGMENTS)
    a, b = ours(ids)["memories"].float(), theirs(ids)["memories"]
    assert (a - b).norm() < 0.1 * b.norm()
    for runs in seconds.values():
        runs.clear()
    benchmark.pedantic(ours, args=(ids,), setup=lambda: theirs(ids) and None, rounds=ROUNDS)
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    benchmark.extra_info["ratio"] = ratio
    add_rows(rows, (f"read, {BFLOAT16_SEGMENTS} segments", "time", "s"), seconds, ratio, BFLOAT16_GOAL)


def skip_if(reason: str | None) -> None:
    if reason:
        pytest.skip(reason)


def add_rows(
    rows: Rows, quantity: tuple[str, str, str], values: dict[str, list[float]], ratio: float, goal: float | None
) -> None:
    """A row for each of the two sides; the baseline's carries its ratio to ours and what the ratio should reach."""
    workload, metric, unit = quantity
    baseline = list(values)[-1]
    for provider, measured in values.items():
        of_baseline = provider == baseline
        rows.append(
            {
                "benchmark": "model",
                "workload": workload,
                "metric": metric,
                "comparison": baseline,
                "provider": provider,
                "value": f"{statistics.median(measured):.4g}",
                "min": f"{min(measured):.4g}",
                "max": f"{max(measured):.4g}",
                "unit": unit,
                "ratio": f"{ratio:.2f}" if of_baseline else "1.00",
                "goal": goal if of_baseline and goal else "",
            }
        )
