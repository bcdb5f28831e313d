"""Reading and scoring a text: the model layer against a plain loop and, where HMT_PYTORCH is set, HMT-pytorch itself.

All run by turns, A B C A B C ..., so that a busy machine slows all alike; a ratio is the median of the rounds' own.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.model_providers import OURS, READ_ONLY, TRAIN_ONLY
from benchmarks.model_rounds import memory_rows, time_rows, timed_rounds
from benchmarks.sizes import size

ROUNDS = size(3, tiny=2)
# ours may take so much less than the plain loop, and as much less memory
TIME_GOALS = {"read": 1.5, "score": 1.25}
MEMORY_GOAL = 8.0
BFLOAT16_GOAL = 1.5  # times as fast as float32, where the processor has instructions for it


@pytest.mark.parametrize("workload", ["read", "score"])
@torch.no_grad()
def test_model(workload, benchmark, rows, absent):
    """The first round is checked and gives the peak memory; those after it are timed."""
    exclude = TRAIN_ONLY if workload == "read" else READ_ONLY + TRAIN_ONLY
    rounds = timed_rounds(workload, 1 + ROUNDS, exclude, benchmark, absent, fewest=2)
    timed = {name: of[1:] for name, of in rounds.items() if len(of) > 1}
    rows += time_rows(workload, timed, TIME_GOALS[workload], BFLOAT16_GOAL)
    rows += memory_rows(workload, rounds, MEMORY_GOAL)
    benchmark.extra_info["ours"] = [measured.seconds for measured in timed[OURS]]
