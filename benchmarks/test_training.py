"""A training step: the model layer against a plain loop and, where HMT_PYTORCH is set, HMT-pytorch itself."""

from __future__ import annotations

import contextlib

import pytest

from benchmarks import allocators
from benchmarks.allocators import MIMALLOC
from benchmarks.model_providers import OURS, READ_ONLY, started, when_ready
from benchmarks.model_rounds import memory_rows, named, time_rows, timed_rounds
from benchmarks.model_shape import SEGMENT_LENGTH
from benchmarks.processes import peak_unavailable
from benchmarks.results import row
from benchmarks.sizes import size

ROUNDS = 2
STEPS = size(4, tiny=2)
TIME_GOAL = 1.3
MEMORY_GOAL = 3.0
ALLOCATORS = ("malloc", MIMALLOC)
# short segments; `make bench-slow` measures whole ones
DEPTHS, DEPTH_LENGTH = (4, 16), size(64, tiny=8)
LONG_DEPTHS, LONG_LIMIT = size((4, 16, 32), tiny=(2, 4)), 6 * 2**10


def test_training(benchmark, rows, absent):
    """Every round counts: a step is too long for one that does not. The memory is with gradients of all parameters."""
    rounds = timed_rounds("train", ROUNDS, READ_ONLY, benchmark, absent, fewest=1)
    rows += time_rows("train", rounds, TIME_GOAL)
    rows += memory_rows("train", rounds, MEMORY_GOAL)


@pytest.mark.slow
def test_later_training_steps(benchmark, rows, absent):
    """Without a process's first step, most of which may be waiting for memory that the machine has yet to give."""
    rounds = timed_rounds("train", STEPS, READ_ONLY, benchmark, absent, fewest=STEPS)
    later = {name: of[1:] for name, of in rounds.items()}
    rows += time_rows("train", later, TIME_GOAL, which=", later steps")


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_peak_memory_by_depth(allocator, benchmark, rows, absent):
    """The ratio is to the fewest segments: how much more it takes to train at this depth."""
    depth_rows(allocator, DEPTHS, DEPTH_LENGTH, benchmark, rows, absent)


@pytest.mark.slow
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_peak_memory_of_long_trainings(allocator, benchmark, rows, absent):
    """Of segments of full length, 32 are to fit in 6 GB."""
    depth_rows(allocator, LONG_DEPTHS, SEGMENT_LENGTH, benchmark, rows, absent)


def depth_rows(allocator, depths, length, benchmark, rows, absent):
    name = f"{OURS}, {allocator}"
    if reason := peak_unavailable() or allocators.missing(allocator):
        absent[f"training depth, {name}"] = reason
        pytest.skip(reason)
    measured = {}

    def all_depths():
        with contextlib.ExitStack() as processes:
            runs = when_ready(processes.enter_context(started(OURS, length, allocator)) for _ in depths)
            for segments, run in zip(depths, runs, strict=True):
                measured[segments] = run("train", segments)

    benchmark.pedantic(all_depths, rounds=1)
    for segments, of in measured.items():
        workload = named("train", segments, length)
        ratio, fewest = of.extra_peak / measured[depths[0]].extra_peak, f"{depths[0]} segments"
        goal = "<= 1.05" if segments == 16 else ""
        extra = [of.extra_peak / 2**20]
        of_extra = {"ratio": ratio, "ratio_to": fewest, "goal": goal}
        rows.append(row("training depth", workload, "extra peak memory", name, extra, "MiB", **of_extra))
        if length == SEGMENT_LENGTH:
            goal = f"<= {LONG_LIMIT} MiB" if segments == 32 else ""
            rows.append(row("training depth", workload, "peak memory", name, [of.peak / 2**20], "MiB", goal=goal))
