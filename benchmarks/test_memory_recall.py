"""Memory recall of one query: ours against HMT-pytorch's formulation, cached keys and the absorbed form in PyTorch.

Every provider must first agree with float64. On CUDA all run as CUDA graphs, so that Python's launches are not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import costs, providers
from benchmarks.recall_providers import OURS, PEER, expected, make_inputs
from benchmarks.results import Row, median_ratio, row
from benchmarks.roofline import ceilings
from benchmarks.sizes import DEVICE, size
from benchmarks.stopwatch import Turns, as_graph
from hmt_kernels import memory_recall_step

ROUNDS = size(11, tiny=3)
SLOTS = size([300, 1024, 8192], tiny=[20, 40])
DIMS = size({"cpu": [576, 4096], "cuda": [4096, 576]}[DEVICE], tiny=[64])  # on a GPU those with a goal first
STEP_SLOTS, STEP_DIM = size((300, 4096), tiny=(20, 64))
# of the largest element; both formulations round their queries once more than the kernel does
TOLERANCE = {torch.bfloat16: 4e-2, torch.float32: 1e-4}
# how many times faster than the best form in PyTorch, bfloat16 on CPU
CPU_GOALS = {300: 2.5, 8192: 1.6}
# on an H100 in bfloat16: times HMT-pytorch's formulation, share of a copy's bandwidth, microseconds per step
GPU_PEER_GOAL, GPU_BANDWIDTH_GOAL, GPU_STEP_GOAL = 10.0, 0.85, 8.0
GPU_BANDWIDTH_BYTES = 64e6


@torch.no_grad()
def test_step(benchmark: Any, rows: list[Row]) -> None:
    """Write a memory, recall, fill both prompt slots of the next segment: B = 1, N = 300, D = 4096, bfloat16."""
    inputs = make_inputs(STEP_SLOTS, STEP_DIM, torch.bfloat16, DEVICE)
    out = torch.zeros(1, 546, STEP_DIM, dtype=torch.bfloat16, device=DEVICE)
    new_memory = inputs.memory[:, 0].clone()
    slot_index = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def ours() -> None:
        memory_recall_step(
            inputs.absorbed, inputs.memory, new_memory, slot_index, softmax_scale=inputs.softmax_scale, out=out
        )

    absorbed = providers.get("recall", "absorbed, mm").make(inputs)

    def plain() -> None:
        inputs.memory[:, 0] = new_memory
        recalled = absorbed()
        out[:, :1] = recalled
        out[:, -1:] = recalled

    ours()
    filled = out.clone()
    plain()
    torch.testing.assert_close(filled[:, [0, -1]], out[:, [0, -1]], atol=4e-2, rtol=4e-2)
    turns = by_turns({OURS: as_graph(ours), "absorbed, mm": as_graph(plain)}, benchmark)
    step_goal = f"<= {GPU_STEP_GOAL:g} us" if DEVICE == "cuda" else ""
    workload, cost = f"step N={STEP_SLOTS} D={STEP_DIM} bf16", costs.recall(STEP_SLOTS, STEP_DIM, 2)
    for name, values in turns.seconds.items():
        of_ours = step_goal if name == OURS else ""
        ratio = median_ratio(values, turns.seconds[OURS])
        rows.append(
            row(
                "memory recall", workload, "time", name, values, "us", ratio=ratio, ratio_to=OURS, goal=of_ours,
                cost=cost, ceilings=ceilings(torch.bfloat16),
            )
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("dim", DIMS)
@torch.no_grad()
def test_recall(
    dim: int, slots: int, dtype: torch.dtype, benchmark: Any, rows: list[Row], absent: dict[str, str]
) -> None:
    inputs = make_inputs(slots, dim, dtype, DEVICE)
    found, missing = providers.make("recall", inputs)
    absent.update({f"{name} (recall)": reason for name, reason in missing.items()})
    exact = expected(inputs)
    for name, recall in found.items():
        error = (recall().double() - exact).abs().max() / exact.abs().max()
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e} of the largest element"
    graphs = {name: as_graph(recall) for name, recall in found.items()}
    copied = torch.empty_like(inputs.memory)
    graphs["copy"] = as_graph(lambda: copied.copy_(inputs.memory))
    turns = by_turns(graphs, benchmark)

    workload = f"recall N={slots} D={dim} {dtype_name(dtype)}"
    ratios = {name: median_ratio(turns.seconds[name], turns.seconds[OURS]) for name in found}
    best = min((name for name in found if not name.startswith(OURS)), key=lambda name: ratios[name])
    cost = costs.recall(slots, dim, dtype.itemsize)
    for name in found:
        rows.append(
            row(
                "memory recall", workload, "time", name, turns.seconds[name], "us", ratio=ratios[name], ratio_to=OURS,
                goal=goal(name, best, slots, dtype), cost=cost, ceilings=ceilings(dtype),
            )
        )  # fmt: skip
    add_bandwidth(rows, workload, turns, inputs.memory)


def by_turns(calls: dict[str, Callable[[], object]], benchmark: Any) -> Turns:
    turns = Turns(calls)
    benchmark.pedantic(turns.take, args=(OURS,), setup=lambda: turns.take_all_but(OURS), rounds=ROUNDS)
    return turns


def goal(name: str, best: str, slots: int, dtype: torch.dtype) -> str:
    if dtype != torch.bfloat16:
        return ""
    if DEVICE == "cpu":
        return f">= {CPU_GOALS[slots]:g}" if name == best and slots in CPU_GOALS else ""
    return f">= {GPU_PEER_GOAL:g}" if name == PEER else ""


def add_bandwidth(rows: list[Row], workload: str, turns: Turns, memory: torch.Tensor) -> None:
    """Bytes of the queue over our time, as a share of what a copy of the queue moves: it reads and writes each byte."""
    nbytes = memory.numel() * memory.element_size()
    copy = [2 * nbytes / seconds / 1e9 for seconds in turns.seconds["copy"]]
    ours = [nbytes / seconds / 1e9 for seconds in turns.seconds[OURS]]
    counts = DEVICE == "cuda" and nbytes >= GPU_BANDWIDTH_BYTES and memory.dtype == torch.bfloat16
    goal = f">= {GPU_BANDWIDTH_GOAL:g}" if counts else ""
    for name, rates, of in (("copy", copy, ""), (OURS, ours, goal)):
        share = median_ratio(rates, copy)
        rows.append(
            row("memory recall", workload, "bandwidth", name, rates, "GB/s", ratio=share, ratio_to="copy", goal=of)
        )


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
