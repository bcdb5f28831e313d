"""A training step: the model layer against a plain loop and, where HMT_PYTORCH is set, HMT-pytorch itself."""

from __future__ import annotations

import functools
import json
import statistics
from typing import Any

import pytest
import torch

from benchmarks import peak_memory
from benchmarks.model_providers import OURS, runners, unavailable
from benchmarks.model_shape import text
from benchmarks.test_model import TOLERANCE, Rows, add_rows, skip_if, timed

SEGMENTS = 4
ROUNDS = 2
TIME_GOAL = 1.3
MEMORY_GOAL = 3.0
# short segments, so that 32 of them take a minute: python -m benchmarks.peak_memory hmt train '{}' 32 has long ones
DEPTHS, DEPTH_LENGTH = (4, 16, 32), 64
MMAP_THRESHOLD = 2**17


@pytest.mark.parametrize("baseline", ["plain loop", "HMT-pytorch"])
def test_time(baseline: str, benchmark: Any, rows: Rows) -> None:
    """By turns; the first turn of each, which is compared, counts: a step is too long for one that does not."""
    skip_if(unavailable(baseline))
    seconds: dict[str, list[float]] = {OURS: [], baseline: []}
    ours, theirs = (functools.partial(timed, runners(name)["train"], seconds[name]) for name in seconds)
    ids, tolerance = text(SEGMENTS), TOLERANCE[baseline]
    expected: list[dict[str, torch.Tensor]] = []
    result = benchmark.pedantic(ours, args=(ids,), setup=lambda: expected.append(theirs(ids)), rounds=ROUNDS)
    torch.testing.assert_close(result["loss"], expected[0]["loss"], atol=tolerance, rtol=tolerance)
    # of bfloat16 recall a gradient keeps the direction at best
    difference = (result["gradient"] - expected[0]["gradient"]).norm()
    assert difference < (0.5 if baseline == "HMT-pytorch" else 1e-2)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    ratio = benchmark.extra_info["ratio"] = statistics.median(ratios)
    add_rows(rows, (f"train, {SEGMENTS} segments", "time", "s"), seconds, ratio, TIME_GOAL)


@pytest.mark.parametrize("baseline", ["plain loop", "HMT-pytorch"])
def test_extra_peak_memory(baseline: str, benchmark: Any, rows: Rows) -> None:
    """Gradients of all parameters included, on both sides."""
    skip_if(unavailable(baseline) or peak_memory.unavailable())
    measure = functools.partial(peak_memory.in_new_process, workload="train", segments=SEGMENTS)
    ours = measure(OURS) / 2**20
    theirs = benchmark.pedantic(measure, args=(baseline,), rounds=1) / 2**20
    ratio = benchmark.extra_info["ratio"] = theirs / ours
    values = {OURS: [ours], baseline: [theirs]}
    add_rows(rows, (f"train, {SEGMENTS} segments", "extra peak memory", "MiB"), values, ratio, MEMORY_GOAL)


@pytest.mark.parametrize("segments", DEPTHS)
@pytest.mark.parametrize("mmap_threshold", [None, MMAP_THRESHOLD], ids=["malloc", "mmap"])
def test_peak_memory_by_depth(segments: int, mmap_threshold: int | None, benchmark: Any, rows: Rows) -> None:
    """The ratio is to the fewest segments: how much more it takes to train at this depth."""
    skip_if(peak_memory.unavailable())
    settings = json.dumps({"segment_length": DEPTH_LENGTH})
    measure = functools.partial(peak_memory.in_new_process, OURS, "train", settings, mmap_threshold=mmap_threshold)
    least = measure(segments=DEPTHS[0]) / 2**20
    here = benchmark.pedantic(measure, kwargs={"segments": segments}, rounds=1) / 2**20
    allocator = "" if mmap_threshold is None else f", MALLOC_MMAP_THRESHOLD_={mmap_threshold}"
    rows.append(
        {
            "benchmark": "training depth",
            "workload": f"train, {segments} segments of {DEPTH_LENGTH}",
            "metric": "extra peak memory",
            "comparison": f"{DEPTHS[0]} segments",
            "provider": OURS + allocator,
            "value": f"{here:.5g}",
            "unit": "MiB",
            "ratio": f"{here / least:.3f}",
            "goal": "1.05 at most",
        }
    )
