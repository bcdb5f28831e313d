"""Attention of one segment: ours against SDPA by backend, FlexAttention and flash-attn; rotary embedding, holes.

Whatever is timed must first agree with float64, gradients included. On CUDA all run as CUDA graphs, and the time of a
backward pass is that of both passes less that of the forward pass, round by round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.attention_providers import (
    DIRECT,
    OURS,
    Attention,
    Inputs,
    NotHere,
    corners,
    largest_error,
    make_inputs,
    providers,
    try_out,
)
from benchmarks.stopwatch import Turns, as_graph

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 7
OVERHEAD_ROUNDS = 101
# graphs are steady, and there are many of them
SECONDS_PER_TURN = 0.005 if DEVICE == "cuda" else 0.02
# of the largest element
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 2e-4}
# heads (Hq, Hkv): SmolLM-135M's and Llama-3-8B's
HEADS = {64: (9, 3), 128: (32, 8)}
LENGTHS = [256, 546, 1058, 2048, 4096] if DEVICE == "cuda" else [256, 1058]
DIMS = [64, 128] if DEVICE == "cuda" else [64]
BATCHES = [1, 8] if DEVICE == "cuda" else [1]
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.bfloat16, torch.float32]
GOAL_LENGTH = 1058
# on an H100 in bfloat16: times as fast as the best SDPA backend, and TFLOP/s of a backward pass at D = 128
GPU_GOALS = {"rotary": 1.5, "causal": 1.0, "hole": 3.0}
GPU_BACKWARD_GOAL = 1.2 * 182
# on the CPU, of the time of SDPA called directly
CPU_OVERHEAD_GOAL = 0.98
Rows = list[dict[str, object]]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype_name(dtype))
@pytest.mark.parametrize("batch", BATCHES, ids=lambda n: f"B{n}")
@pytest.mark.parametrize("dim", DIMS, ids=lambda n: f"D{n}")
@pytest.mark.parametrize("length", LENGTHS, ids=lambda n: f"T{n}")
@pytest.mark.parametrize("kind", ["causal", "rotary", "hole"])
def test_attention(
    kind: str, length: int, dim: int, batch: int, dtype: torch.dtype, benchmark: Any, rows: Rows, absent: dict[str, str]
) -> None:
    x = make_inputs(kind, batch, HEADS[dim], length, dim, dtype, DEVICE)
    found, missing = providers(x)
    exact = corners(x)
    for name in list(found):
        try:
            error = largest_error(try_out(found[name], x), x, exact)
        except NotHere as reason:
            missing[name] = str(reason)
            del found[name]
            continue
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e} of the largest element"
    del exact
    absent.update({f"{name} ({kind})": reason for name, reason in missing.items()})

    seconds = time_all(found, x, benchmark)
    workload = f"{kind} B={batch} T={length} H={HEADS[dim][0]}/{HEADS[dim][1]} D={dim} {dtype_name(dtype)}"
    for metric in ("forward", "backward", "both"):
        ratios = {name: median_ratio(seconds[name][metric], seconds[OURS][metric]) for name in found}
        best = min((name for name in found if name.startswith(DIRECT)), key=lambda name: ratios[name])
        for name in found:
            goal = gpu_goal(kind, length, metric) if name == best else ""
            rows.append(row(workload, name, metric, seconds[name][metric], ratios[name], goal))
    if DEVICE == "cuda" and kind == "causal":
        add_backward_rate(rows, workload, x, seconds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: dtype_name(dtype))
@pytest.mark.parametrize(("length", "heads"), [(256, (8, 8)), (546, (9, 3)), (1058, (9, 3))], ids=str)
@pytest.mark.skipif(DEVICE == "cuda", reason="on CUDA the default is not SDPA")
@torch.no_grad()
def test_overhead(length: int, heads: tuple[int, int], dtype: torch.dtype, benchmark: Any, rows: Rows) -> None:
    """The default on the CPU is SDPA: what our call adds to calling it directly, over many short rounds."""
    x = make_inputs("causal", 1, heads, length, 64, dtype, DEVICE)
    found, _ = providers(x)
    calls = {name: lambda attend=found[name]: attend(x) for name in (OURS, DIRECT)}
    assert torch.equal(calls[OURS](), calls[DIRECT]())
    turns = Turns(calls, seconds_per_turn=0.005)
    benchmark.pedantic(turns.take, args=(OURS,), setup=lambda: turns.take(DIRECT), rounds=OVERHEAD_ROUNDS)
    workload = f"overhead B=1 T={length} H={heads[0]}/{heads[1]} D=64 {dtype_name(dtype)}"
    for name, goal in ((OURS, ""), (DIRECT, f">= {CPU_OVERHEAD_GOAL:g}")):
        ratio = median_ratio(turns.seconds[name], turns.seconds[OURS])
        rows.append(row(workload, name, "forward", turns.seconds[name], ratio, goal, digits=3))


def time_all(found: dict[str, Attention], x: Inputs, benchmark: Any) -> dict[str, dict[str, list[float]]]:
    """Seconds per round of the forward pass, the backward pass and both, of every provider."""
    calls: dict[str, Callable[[], object]] = {}
    for name, attend in found.items():
        calls[f"{name}: forward"] = as_graph(without_gradients(attend, x))
        calls[f"{name}: both"] = as_graph(with_gradients(attend, x))
        if DEVICE == "cpu":
            calls[f"{name}: backward"] = backward_alone(attend, x)
    turns, ours = Turns(calls, SECONDS_PER_TURN), f"{OURS}: both"
    benchmark.pedantic(turns.take, args=(ours,), setup=lambda: turns.take_all_but(ours), rounds=ROUNDS)
    seconds = {}
    for name in found:
        forward, both = turns.seconds[f"{name}: forward"], turns.seconds[f"{name}: both"]
        backward = turns.seconds.get(f"{name}: backward") or [b - f for f, b in zip(forward, both, strict=True)]
        seconds[name] = {"forward": forward, "backward": backward, "both": both}
    return seconds


def backward_alone(attend: Attention, x: Inputs) -> Callable[[], object]:
    """Not on CUDA: a graph can only capture a backward pass together with its forward pass."""
    out = attend(x)
    return lambda: torch.autograd.grad(out, (x.q, x.k, x.v), x.do, retain_graph=True)


def without_gradients(attend: Attention, x: Inputs) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return attend(x)

    return call


def with_gradients(attend: Attention, x: Inputs) -> Callable[[], object]:
    return lambda: torch.autograd.grad(attend(x), (x.q, x.k, x.v), x.do)


def median_ratio(others: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(others, ours, strict=True))


def gpu_goal(kind: str, length: int, metric: str) -> str:
    if DEVICE == "cpu" or length != GOAL_LENGTH or metric == "backward" or (kind == "causal" and metric != "forward"):
        return ""
    return f">= {GPU_GOALS[kind]:g}"


def row(
    workload: str, name: str, metric: str, seconds: list[float], ratio: float, goal: str, digits: int = 2
) -> dict[str, object]:
    values = [value * 1e6 for value in seconds]
    return {
        "benchmark": "segment attention",
        "workload": workload,
        "metric": metric,
        "comparison": "",
        "provider": name,
        "value": f"{statistics.median(values):.4g}",
        "min": f"{min(values):.4g}",
        "max": f"{max(values):.4g}",
        "unit": "us",
        "ratio": f"{ratio:.{digits}f}",
        "goal": goal,
    }


def add_backward_rate(rows: Rows, workload: str, x: Inputs, seconds: dict[str, dict[str, list[float]]]) -> None:
    """TFLOP/s of the backward passes, counted as usual: five products of half a square of scores."""
    batch, heads, length, dim = x.q.shape
    operations = 5 * batch * heads * length**2 * dim
    for name, of in seconds.items():
        rates = [operations / value / 1e12 for value in of["backward"]]
        counts = name == OURS and dim == 128 and length == GOAL_LENGTH
        rows.append({
            "benchmark": "segment attention",
            "workload": workload,
            "metric": "backward rate",
            "comparison": "",
            "provider": name,
            "value": f"{statistics.median(rates):.4g}",
            "min": f"{min(rates):.4g}",
            "max": f"{max(rates):.4g}",
            "unit": "TFLOP/s",
            "ratio": f"{median_ratio(rates, [operations / v / 1e12 for v in seconds[OURS]['backward']]):.2f}",
            "goal": f">= {GPU_BACKWARD_GOAL:.0f} TFLOP/s" if counts else "",
        })  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
