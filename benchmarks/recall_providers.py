"""Who recalls one memory from a queue in the benchmarks, registered in one place.

All start from what can be computed for all segments at once, outside the recurrence: the projected summary Wq q and the
absorbed query Wk^T Wq q. What is timed is what each segment adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hmt_kernels import memory_recall

OURS = "hmt_kernels"
PEER = "HMT-pytorch's formulation"
Recall = Callable[[], Tensor]


class Inputs(NamedTuple):
    projected: Tensor  # Wq q [1, 1, D]
    absorbed: Tensor  # Wk^T Wq q [1, 1, D]
    memory: Tensor  # [1, N, D]
    wk: Tensor  # [D, D]
    keys: Tensor  # Wk M [1, N, D]
    softmax_scale: float


def make_inputs(slots: int, dim: int, dtype: torch.dtype, device: str) -> Inputs:
    """A queue [1, slots, dim] of standard normal memories, with projections of width dim that keep their variance."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

    projected, memory, wk = normal(1, 1, dim), normal(1, slots, dim), normal(dim, dim, scale=dim**-0.5)
    return Inputs(projected, projected @ wk, memory, wk, memory @ wk.mT, dim**-0.5)


def expected(inputs: Inputs) -> Tensor:
    """The recalled memory [1, 1, D] in float64."""
    query, memory = inputs.absorbed.double(), inputs.memory.double()
    return (query @ memory.mT * inputs.softmax_scale).softmax(dim=-1) @ memory


def _hmt_pytorch(x: Inputs) -> Tensor:
    scores = x.projected @ F.linear(x.memory, x.wk).mT * x.softmax_scale
    return scores.softmax(dim=-1, dtype=torch.float32).to(x.memory.dtype) @ x.memory


def _cached_keys(x: Inputs) -> Tensor:
    query, keys, values = (t.unsqueeze(1) for t in (x.projected, x.keys, x.memory))
    return F.scaled_dot_product_attention(query, keys, values, scale=x.softmax_scale).squeeze(1)


def _absorbed_matmul(x: Inputs) -> Tensor:
    return (x.absorbed @ x.memory.mT * x.softmax_scale).softmax(dim=-1) @ x.memory


def _absorbed_mm(x: Inputs) -> Tensor:
    # two-dimensional on purpose: a batched product of one row is many times slower in bfloat16 on CPUs
    memory = x.memory[0]
    return ((x.absorbed[0] @ memory.mT * x.softmax_scale).softmax(dim=-1) @ memory)[None]


def _ours(x: Inputs) -> Tensor:
    return memory_recall(x.absorbed, x.memory, softmax_scale=x.softmax_scale).recalled


_REGISTERED: dict[str, Callable[[Inputs], Tensor]] = {
    OURS: _ours,
    PEER: _hmt_pytorch,
    "cached keys, SDPA": _cached_keys,
    "absorbed, matmul": _absorbed_matmul,
    "absorbed, mm": _absorbed_mm,
    "absorbed, matmul, torch.compile": _absorbed_matmul,
    "absorbed, mm, torch.compile": _absorbed_mm,
}


def recalls(inputs: Inputs) -> dict[str, Recall]:
    """Per provider a function without arguments that recalls once, returning [1, 1, D]."""
    result: dict[str, Recall] = {}
    for name, function in _REGISTERED.items():
        run = torch.compile(function, dynamic=False) if name.endswith("torch.compile") else function
        result[name] = lambda run=run: run(inputs)  # type: ignore[misc]
    return result
