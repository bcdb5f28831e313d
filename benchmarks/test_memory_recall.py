"""Memory recall of one query: ours against HMT-pytorch's formulation, cached keys and the absorbed form in PyTorch.

Every provider must first agree with float64. On CUDA all run as CUDA graphs, so that Python's launches are not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.recall_providers import OURS, PEER, expected, make_inputs, recalls
from benchmarks.stopwatch import Turns, as_graph
from hmt_kernels import memory_recall_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 11
# of the largest element; both formulations round their queries once more than the kernel does
TOLERANCE = {torch.bfloat16: 4e-2, torch.float32: 1e-4}
# how many times faster than the best form in PyTorch, bfloat16 on CPU
CPU_GOALS = {300: 2.5, 8192: 1.6}
# on an H100 in bfloat16: times HMT-pytorch's formulation, share of a copy's bandwidth, microseconds per step
GPU_PEER_GOAL, GPU_BANDWIDTH_GOAL, GPU_STEP_GOAL = 10.0, 0.85, 8.0
GPU_BANDWIDTH_BYTES = 64e6
Rows = list[dict[str, object]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("slots", [300, 1024, 8192])
@pytest.mark.parametrize("dim", [576, 4096])
@torch.no_grad()
def test_recall(dim: int, slots: int, dtype: torch.dtype, benchmark: Any, rows: Rows) -> None:
    inputs = make_inputs(slots, dim, dtype, DEVICE)
    providers = recalls(inputs)
    exact = expected(inputs)
    for name, recall in providers.items():
        error = (recall().double() - exact).abs().max() / exact.abs().max()
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e} of the largest element"
    graphs = {name: as_graph(recall) for name, recall in providers.items()}
    copied = torch.empty_like(inputs.memory)
    graphs["copy"] = as_graph(lambda: copied.copy_(inputs.memory))
    turns = by_turns(graphs, benchmark)

    workload = f"D={dim} N={slots} {dtype_name(dtype)}"
    ratios = {name: ratio_to_ours(turns, name) for name in providers}
    best = min((name for name in providers if name != OURS), key=lambda name: ratios[name])
    benchmark.extra_info["ratio"] = ratios[best]
    for name in providers:
        rows.append(row(workload, name, microseconds(turns, name), ratios[name], goal(name, best, slots, dtype)))
    add_bandwidth(rows, workload, turns, inputs.memory)


@torch.no_grad()
def test_step(benchmark: Any, rows: Rows) -> None:
    """Write a memory, recall, fill both prompt slots of the next segment: B = 1, N = 300, D = 4096, bfloat16."""
    inputs = make_inputs(300, 4096, torch.bfloat16, DEVICE)
    out = torch.zeros(1, 546, 4096, dtype=torch.bfloat16, device=DEVICE)
    new_memory = inputs.memory[:, 0].clone()
    slot_index = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def ours() -> None:
        memory_recall_step(
            inputs.absorbed, inputs.memory, new_memory, slot_index, softmax_scale=inputs.softmax_scale, out=out
        )

    absorbed = recalls(inputs)["absorbed, mm"]

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
    for name in turns.seconds:
        of_ours = step_goal if name == OURS else ""
        rows.append(row("step D=4096 N=300 bf16", name, microseconds(turns, name), ratio_to_ours(turns, name), of_ours))


def by_turns(calls: dict[str, Callable[[], object]], benchmark: Any) -> Turns:
    turns = Turns(calls)
    benchmark.pedantic(turns.take, args=(OURS,), setup=lambda: turns.take_all_but(OURS), rounds=ROUNDS)
    return turns


def ratio_to_ours(turns: Turns, name: str) -> float:
    return statistics.median(a / b for a, b in zip(turns.seconds[name], turns.seconds[OURS], strict=True))


def goal(name: str, best: str, slots: int, dtype: torch.dtype) -> str:
    if dtype != torch.bfloat16:
        return ""
    if DEVICE == "cpu":
        return f">= {CPU_GOALS[slots]:g}" if name == best and slots in CPU_GOALS else ""
    return f">= {GPU_PEER_GOAL:g}" if name == PEER else ""


def row(
    workload: str, name: str, values: list[float], ratio: float, goal: str, metric: str = "time", unit: str = "us"
) -> dict[str, object]:
    return {
        "benchmark": "memory recall",
        "workload": workload,
        "metric": metric,
        "comparison": "",
        "provider": name,
        "value": f"{statistics.median(values):.4g}",
        "min": f"{min(values):.4g}",
        "max": f"{max(values):.4g}",
        "unit": unit,
        "ratio": f"{ratio:.2f}",
        "goal": goal,
    }


def microseconds(turns: Turns, name: str) -> list[float]:
    return [seconds * 1e6 for seconds in turns.seconds[name]]


def add_bandwidth(rows: Rows, workload: str, turns: Turns, memory: torch.Tensor) -> None:
    """Bytes of the queue over our time, as a share of what a copy of the queue moves: it reads and writes each byte."""
    size = memory.numel() * memory.element_size()
    copy = [2 * size / seconds / 1e9 for seconds in turns.seconds["copy"]]
    ours = [size / seconds / 1e9 for seconds in turns.seconds[OURS]]
    share = statistics.median(a / b for a, b in zip(ours, copy, strict=True))
    counts = DEVICE == "cuda" and size >= GPU_BANDWIDTH_BYTES and memory.dtype == torch.bfloat16
    rows.append(row(workload, "copy", copy, 1.0, "", "bandwidth", "GB/s"))
    goal = f">= {GPU_BANDWIDTH_GOAL:g}" if counts else ""
    rows.append(row(workload, OURS, ours, share, goal, "bandwidth", "GB/s"))


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
