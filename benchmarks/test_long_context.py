"""Long contexts on a small model: what a token costs after 1k, 10k and 100k others, and how fast those are read.

The backbone alone, with its keys cached, is what most people use today: its time and memory grow with the context.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import costs, long_context, providers, roofline
from benchmarks.long_context import BACKBONE, CONFIG, CONTEXTS, HMT, SEGMENT_LENGTH, TOKENS
from benchmarks.processes import own_process, peak_unavailable
from benchmarks.results import Row, median_ratio, row
from hmt import HMTForCausalLM, HMTState

ROUNDS, READ_ROUNDS = 3, 2
READ_LENGTHS = CONTEXTS[-2:]
PROVIDERS = [provider.name for provider in providers.of("long context")]


@pytest.fixture(scope="module")
def model() -> HMTForCausalLM:
    return long_context.build()


@pytest.fixture(scope="module")
def states() -> dict[int, HMTState]:
    """Filled by `state_after`."""
    return {}


def state_after(context: int, model: HMTForCausalLM, states: dict[int, HMTState]) -> HMTState:
    if context not in states:
        states[context] = model.read(long_context.text(long_context.context_length(context)))
    return states[context]


def test_reading_is_linear(model: HMTForCausalLM, states: dict[int, HMTState], benchmark: Any, rows: list[Row]) -> None:
    """Tokens per second of a short and a long text, by turns; the ratio is to the short one. The states are kept."""
    speeds: dict[int, list[float]] = {n: [] for n in READ_LENGTHS}

    def turn() -> None:
        for n in READ_LENGTHS:
            states.pop(n, None)
            tokens = long_context.context_length(n)
            speeds[n].append(tokens / seconds_of(lambda n=n: state_after(n, model, states)))

    state_after(READ_LENGTHS[0], model, states)  # not timed
    benchmark.pedantic(turn, rounds=READ_ROUNDS)
    for n, values in speeds.items():
        goal = ">= 0.97" if n == READ_LENGTHS[-1] else ""
        add_row(
            rows,
            f"read context={n}",
            "speed",
            HMT,
            values,
            "tokens/s",
            median_ratio(values, speeds[READ_LENGTHS[0]]),
            goal,
        )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_generation(
    provider: str, model: HMTForCausalLM, states: dict[int, HMTState], benchmark: Any, rows: list[Row]
) -> None:
    """Contexts by turns; for ours a whole segment's tokens, with the pass that closes it. The ratio is to 1k."""
    long_context.check_caches(model)
    of_contexts = {n: state_after(n, model, states) for n in CONTEXTS}
    generations = long_context.generations(model, provider, of_contexts)
    seconds: dict[int, list[float]] = {n: [] for n in CONTEXTS}

    def turn() -> None:
        for n, generation in generations.items():
            seconds[n].append(seconds_of(generation.run) / TOKENS[provider])

    turn()
    for values in seconds.values():
        values.clear()
    benchmark.pedantic(turn, rounds=ROUNDS)
    weights = sum(p.numel() * p.element_size() for p in model.backbone.parameters())
    for n, values in seconds.items():
        workload, ratio = f"generate context={n}", median_ratio(values, seconds[CONTEXTS[0]])
        # ours keeps at most one augmented segment, half of it on average
        cost = costs.decode(CONFIG, SEGMENT_LENGTH // 2 if provider == HMT else n, weights, 4)
        goal = "<= 1.05" if provider == HMT else ""
        add_row(rows, workload, "time per token", provider, values, "ms", ratio, goal, cost)
        add_row(rows, workload, "speed", provider, [1 / value for value in values], "tokens/s", 1 / ratio)
        kept = generations[n].kept
        add_row(rows, workload, "kept per token of context", provider, [kept / n], "B", None)


@pytest.mark.parametrize("provider", [HMT, BACKBONE])
def test_peak_memory(
    provider: str,
    model: HMTForCausalLM,
    states: dict[int, HMTState],
    benchmark: Any,
    rows: list[Row],
    absent: dict[str, str],
    tmp_path: Path,
) -> None:
    """Of a process that takes the context over (as a saved state, or as a full cache) and generates."""
    if reason := peak_unavailable():
        absent["peak memory of long contexts"] = reason
        pytest.skip(reason)
    measured: dict[int, float] = {}

    def measure() -> None:
        for n in CONTEXTS:
            state_after(n, model, states).save(tmp_path / str(n))
        with contextlib.ExitStack() as processes:  # all at once: nothing is timed
            found = {}
            for n in CONTEXTS:
                submit = processes.enter_context(own_process())
                found[n] = submit(long_context.peak_of, provider, n, tmp_path / str(n))
            measured.update({n: peak.result() / 2**20 for n, peak in found.items()})

    benchmark.pedantic(measure, rounds=1)
    for n, value in measured.items():
        goal = "<= 1.05" if provider == HMT else ""
        ratio = value / measured[CONTEXTS[0]]
        add_row(rows, f"generate context={n}", "peak memory", provider, [value], "MiB", ratio, goal)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if long_context.DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def add_row(
    rows: list[Row],
    workload: str,
    metric: str,
    provider: str,
    values: list[float],
    unit: str,
    ratio: float | None,
    goal: str = "",
    cost: costs.Cost | None = None,
) -> None:
    ceilings = roofline.ceilings(torch.float32) if cost else None
    shortest = "" if ratio is None else "the shortest context"
    rows.append(
        row(
            "long context", workload, metric, provider, values, unit, ratio=ratio, ratio_to=shortest, goal=goal,
            cost=cost, ceilings=ceilings,
        )
    )  # fmt: skip
