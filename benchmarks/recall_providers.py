"""Who recalls one memory from a queue in the benchmarks, registered in one place.

All start from what can be computed for all segments at once, outside the recurrence: the projected summary Wq q and the
absorbed query Wk^T Wq q. What is timed is what each segment adds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import providers
from benchmarks.providers import NotHere, register
from benchmarks.sizes import DEVICE
from hmt_kernels import dispatch, memory_recall
from hmt_kernels.memory_recall.api import decide

OURS = providers.OURS["recall"]
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
    keys = (memory.float() @ wk.mT.float()).to(dtype)  # without instructions for it, bfloat16 takes many seconds
    return Inputs(projected, projected @ wk, memory, wk, keys, dim**-0.5)


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


def _ours(impl: str | None, x: Inputs) -> Recall:
    decided = partial(decide, x.absorbed, x.memory, softmax_scale=x.softmax_scale)
    if impl is not None and impl == decided().name:
        raise NotHere("it is the default for these inputs")
    if decided(impl=impl).name is None:
        raise NotHere(decided(impl=impl).why)
    return lambda: memory_recall(x.absorbed, x.memory, softmax_scale=x.softmax_scale, impl=impl).recalled


def _plain(function: Callable[[Inputs], Tensor], x: Inputs) -> Recall:
    return lambda: function(x)


def _compiled(function: Callable[[Inputs], Tensor], x: Inputs) -> Recall:
    """For the exact shape."""
    if function is _absorbed_mm and x.memory.dtype == torch.float32:
        raise NotHere("in bfloat16 only, where batched products of one row are slow")
    return partial(torch.compile(function, dynamic=False), x)


def _missing_impl(impl: str) -> str | None:
    if impl == "triton" and DEVICE == "cpu":
        return "it would be interpreted on the CPU"
    return dispatch.missing("memory_recall", impl)


register("recall", OURS, partial(_ours, None))
for impl in dispatch.KNOWN["memory_recall"]:
    register("recall", f"{OURS}, {impl}", partial(_ours, impl), partial(_missing_impl, impl))
register("recall", PEER, partial(_plain, _hmt_pytorch))
register("recall", "cached keys, SDPA", partial(_plain, _cached_keys))
for name, function in (("absorbed, matmul", _absorbed_matmul), ("absorbed, mm", _absorbed_mm)):
    register("recall", name, partial(_plain, function))
    register("recall", f"{name}, torch.compile", partial(_compiled, function))
