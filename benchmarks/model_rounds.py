"""Rounds of all providers of the model layer, by turns, and the rows that they give."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from typing import Any

import numpy as np

from benchmarks import costs, peer, providers, roofline
from benchmarks.model_providers import (
    BFLOAT16,
    COMPILED,
    MEMORY_ONLY,
    OURS,
    PEER,
    PLAIN,
    PRELOADED,
    Measured,
    started,
    when_ready,
)
from benchmarks.model_shape import CONFIG, DTYPE, NUM_SENSORY, SEGMENT_LENGTH, SEGMENTS, weight_bytes
from benchmarks.processes import peak_unavailable
from benchmarks.results import Row, median_ratio, row
from benchmarks.sizes import DEVICE

# norm of the difference over the norm; HMT-pytorch recalls in bfloat16, so that a gradient keeps the direction at best
TOLERANCE, LOW_PRECISION, PEER_TOLERANCE = 1e-4, 0.1, 2e-2
GRADIENT_TOLERANCE, LOW_PRECISION_GRADIENT, LOW_PRECISION_LOSS = 1e-2, 0.5, 5e-3
LOW = (BFLOAT16, PRELOADED[BFLOAT16])
MOST_SECONDS = 90.0 if peer.missing() else 400.0  # of one workload
Rounds = dict[str, list[Measured]]


def timed_rounds(
    workload: str,
    count: int,
    exclude: Collection[str],
    benchmark: Any,
    absent: dict[str, str],
    fewest: int,
) -> Rounds:
    """At most `count` rounds of a workload, every provider by turns; the first round's results must agree with ours.

    After `fewest` of them no round starts that would end later than MOST_SECONDS after the first began.
    """
    rounds: Rounds = {}
    with contextlib.ExitStack() as processes:
        begun = {}
        for provider in providers.of("model"):
            if provider.name in exclude:
                continue
            if reason := provider.missing():
                absent[provider.name] = reason
            else:
                begun[provider.name] = processes.enter_context(started(provider.name))
        runs = dict(zip(begun, when_ready(begun.values()), strict=True))

        if COMPILED in runs:  # everything is compiled before it is timed, and the others are as warm
            for run in runs.values():
                run(workload, SEGMENTS)
        started_at = time.monotonic()

        def turn() -> None:
            done = len(rounds.get(OURS, []))
            if done >= fewest and (time.monotonic() - started_at) * (done + 1) / done > MOST_SECONDS:
                return
            for name, run in runs.items():
                if not rounds.get(name) or name not in MEMORY_ONLY:
                    rounds.setdefault(name, []).append(run(workload, SEGMENTS))
                if len(rounds[name]) == 1:
                    check(name, rounds[name][0].result, rounds[OURS][0].result)

        benchmark.pedantic(turn, rounds=count)
    return rounds


def check(name: str, result: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> None:
    """Raises ValueError where a provider's results are not ours."""
    low = name in LOW or DEVICE == "cuda"
    for key, expected in ours.items():
        if key == "gradient":
            limit = LOW_PRECISION_GRADIENT if low or name == PEER else GRADIENT_TOLERANCE
        elif key == "loss" and low:
            limit = LOW_PRECISION_LOSS
        else:
            limit = LOW_PRECISION if low else PEER_TOLERANCE if name == PEER else TOLERANCE
        error = float(np.linalg.norm(result[key] - expected) / np.linalg.norm(expected))
        if not error <= limit:
            raise ValueError(f"{name}: {key} is {error:.1e} of its norm from ours, more than {limit:g}")


def time_rows(
    workload: str, rounds: Rounds, goal: float, bfloat16_goal: float | None = None, which: str = ""
) -> list[Row]:
    """`which` of a process's rounds these are, where they are not all."""
    cost = costs.model(workload, CONFIG, SEGMENTS, SEGMENT_LENGTH, NUM_SENSORY, weight_bytes())
    ceilings = roofline.ceilings(DTYPE)
    seconds = {name: [measured.seconds for measured in of] for name, of in rounds.items()}
    goals = dict.fromkeys((PLAIN, PRELOADED[PLAIN], PEER), f">= {goal:g}")
    if bfloat16_goal:
        goals |= dict.fromkeys(LOW, f"<= {1 / bfloat16_goal:.2f}")
    return [
        row(
            "model", named(workload) + which, "time", name, values, "s",
            ratio=median_ratio(values, seconds[base(name)]), ratio_to=base(name), goal=goals.get(name, ""), cost=cost,
            # the ceiling of products in float32 is not that of bfloat16
            ceilings=None if name in LOW else ceilings,
        )
        for name, values in seconds.items()
    ]  # fmt: skip


def memory_rows(workload: str, rounds: Rounds, goal: float) -> list[Row]:
    """Of the first round."""
    if peak_unavailable():
        return []
    peaks = {name: of[0].extra_peak / 2**20 for name, of in rounds.items()}
    goals = dict.fromkeys((PLAIN, PRELOADED[PLAIN], *([PEER] if workload == "train" else [])), f">= {goal:g}")
    return [
        row(
            "model", named(workload), "extra peak memory", name, [value], "MiB", ratio=value / peaks[base(name)],
            ratio_to=base(name), goal=goals.get(name, ""),
        )
        for name, value in peaks.items()
    ]  # fmt: skip


def base(name: str) -> str:
    """Ours under the same allocator, which is what a plain loop is compared with."""
    return PRELOADED[OURS] if name == PRELOADED[PLAIN] else OURS


def named(workload: str, segments: int = SEGMENTS, length: int = SEGMENT_LENGTH) -> str:
    return f"{workload} segments={segments} L={length}"
