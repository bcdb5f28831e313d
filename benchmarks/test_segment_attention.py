"""Attention of one segment: ours against SDPA by backend, FlexAttention and flash-attn; rotary embedding, holes.

Whatever is timed must first agree with float64, gradients included. On CUDA all run as CUDA graphs, and the time of a
backward pass is that of both passes less that of the forward pass, round by round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import costs, providers
from benchmarks.attention_providers import (
    DIRECT,
    OURS,
    Attention,
    Inputs,
    corners,
    largest_error,
    make_inputs,
    try_out,
)
from benchmarks.providers import NotHere
from benchmarks.results import Row, median_ratio, row
from benchmarks.roofline import ceilings
from benchmarks.sizes import DEVICE, size
from benchmarks.stopwatch import Turns, as_graph

ROUNDS = size(5, tiny=2)
OVERHEAD_ROUNDS = size(101, tiny=3)
# graphs are steady, and there are many of them
SECONDS_PER_TURN = size({"cpu": 0.02, "cuda": 0.003}[DEVICE], tiny=1e-3)
# of the largest element
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 2e-4}
# heads (Hq, Hkv): SmolLM-135M's and Llama-3-8B's
HEADS = {64: (9, 3), 128: (32, 8)}
# (T, B), those with a goal first
GPU_PROBLEMS = [(1058, 1), (1058, 8), (256, 1), (546, 1), (2048, 1)]
PROBLEMS = size({"cpu": [(256, 1), (546, 1), (1058, 1)], "cuda": GPU_PROBLEMS}[DEVICE], tiny=[(24, 1)])
DIMS = {"cpu": [64], "cuda": [64, 128]}[DEVICE]
# on a CPU bfloat16 in one workload only: without instructions for it, it takes minutes
KINDS = {"cpu": [("causal", torch.bfloat16)], "cuda": [(kind, torch.bfloat16) for kind in ("causal", "rotary", "hole")]}
KINDS["cpu"] += [(kind, torch.float32) for kind in ("causal", "rotary", "hole")]
OVERHEADS = size([(256, (8, 8)), (546, (9, 3)), (1058, (9, 3))], tiny=[(24, (9, 3))])
GOAL_LENGTH = 1058
# on an H100 in bfloat16: times as fast as the best SDPA backend, and TFLOP/s of a backward pass at D = 128
GPU_GOALS = {"rotary": 1.5, "causal": 1.0, "hole": 3.0}
GPU_BACKWARD_GOAL = 1.2 * 182
# on the CPU, of the time of SDPA called directly
CPU_OVERHEAD_GOAL = 0.98


@pytest.mark.parametrize("dim", DIMS, ids=lambda n: f"D{n}")
@pytest.mark.parametrize(
    ("kind", "dtype"), KINDS[DEVICE], ids=lambda value: value if isinstance(value, str) else dtype_name(value)
)
@pytest.mark.parametrize(("length", "batch"), PROBLEMS, ids=lambda n: str(n))
def test_attention(
    kind: str, length: int, dim: int, batch: int, dtype: torch.dtype, benchmark: Any, rows: list[Row],
    absent: dict[str, str],
) -> None:  # fmt: skip
    x = make_inputs(kind, batch, HEADS[dim], length, dim, dtype, DEVICE)
    found, missing = providers.make("attention", x)
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
    workload = f"{kind} T={length} B={batch} H={HEADS[dim][0]}/{HEADS[dim][1]} D={dim} {dtype_name(dtype)}"
    hidden = (0, 0) if x.pad_span is None else tuple(x.pad_span[0].tolist())
    for metric in ("forward", "backward", "both"):
        ratios = {name: median_ratio(seconds[name][metric], seconds[OURS][metric]) for name in found}
        best = min((name for name in found if name.startswith(DIRECT)), key=lambda name: ratios[name])
        cost = costs.attention(metric, batch, HEADS[dim], length, dim, dtype.itemsize, hidden)
        for name in found:
            rows.append(
                row(
                    "segment attention", workload, metric, name, seconds[name][metric], "us", ratio=ratios[name],
                    ratio_to=OURS, goal=gpu_goal(kind, length, metric) if name == best else "", cost=cost,
                    ceilings=ceilings(dtype),
                )
            )  # fmt: skip
    if DEVICE == "cuda" and kind == "causal":
        add_backward_rate(rows, workload, x, seconds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: dtype_name(dtype))
@pytest.mark.parametrize(("length", "heads"), OVERHEADS, ids=str)
@pytest.mark.skipif(DEVICE == "cuda", reason="on CUDA the default is not SDPA")
@torch.no_grad()
def test_overhead(length: int, heads: tuple[int, int], dtype: torch.dtype, benchmark: Any, rows: list[Row]) -> None:
    """The default on the CPU is SDPA: what our call adds to calling it directly, over many short rounds."""
    x = make_inputs("causal", 1, heads, length, 64, dtype, DEVICE)
    calls = {name: functools.partial(providers.get("attention", name).make(x), x) for name in (OURS, DIRECT)}
    assert torch.equal(calls[OURS](), calls[DIRECT]())
    turns = Turns(calls, seconds_per_turn=0.005)
    benchmark.pedantic(turns.take, args=(OURS,), setup=lambda: turns.take(DIRECT), rounds=OVERHEAD_ROUNDS)
    workload = f"overhead T={length} B=1 H={heads[0]}/{heads[1]} D=64 {dtype_name(dtype)}"
    for name, goal in ((OURS, ""), (DIRECT, f">= {CPU_OVERHEAD_GOAL:g}")):
        seconds = turns.seconds[name]
        ratio = median_ratio(seconds, turns.seconds[OURS])
        rows.append(
            row("segment attention", workload, "forward", name, seconds, "us", ratio=ratio, ratio_to=OURS, goal=goal)
        )


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
        backward = turns.seconds.get(f"{name}: backward") or [b - f for f, b in zip(forward, both, strict=False)]
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


def gpu_goal(kind: str, length: int, metric: str) -> str:
    if DEVICE == "cpu" or length != GOAL_LENGTH or metric == "backward" or (kind == "causal" and metric != "forward"):
        return ""
    return f">= {GPU_GOALS[kind]:g}"


def add_backward_rate(rows: list[Row], workload: str, x: Inputs, seconds: dict[str, dict[str, list[float]]]) -> None:
    """TFLOP/s of the backward passes, counted as usual: five products of half a square of scores."""
    batch, heads, length, dim = x.q.shape
    operations = 5 * batch * heads * length**2 * dim
    rates = {name: [operations / value / 1e12 for value in of["backward"]] for name, of in seconds.items()}
    for name, values in rates.items():
        counts = name == OURS and dim == 128 and length == GOAL_LENGTH
        goal = f">= {GPU_BACKWARD_GOAL:.0f} TFLOP/s" if counts else ""
        ratio = median_ratio(values, rates[OURS])
        rows.append(
            row(
                "segment attention", workload, "backward rate", name, values, "TFLOP/s", ratio=ratio, ratio_to=OURS,
                goal=goal,
            )
        )  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
