"""memory_recall with impl="triton" as a PyTorch operator: opcheck, torch.compile, explain."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import hmt_kernels
from hmt_kernels import memory_recall

OPS = torch.ops.hmt_kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(queries, dtype=torch.float32):
    query = torch.randn(2, queries, 16, dtype=dtype, device=DEVICE)
    memory = torch.randn(2, 7, 16, dtype=dtype, device=DEVICE)
    return query, memory, torch.tensor([7, 3], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("queries", [1, 3])
def test_opcheck(queries):
    query, memory, counts = make_inputs(queries)
    arguments = (query.requires_grad_(), memory.requires_grad_(), counts, 0.25, "triton")
    assert set(opcheck(OPS.memory_recall_fwd, arguments).values()) == {"SUCCESS"}
    query, memory = query.detach(), memory.detach()
    recalled, lse, _ = OPS.memory_recall_fwd(query, memory, counts, 0.25, "triton")
    arguments = (torch.ones_like(recalled), lse, query, memory, counts, recalled, lse, 0.25, "triton")
    assert set(opcheck(OPS.memory_recall_bwd, arguments).values()) == {"SUCCESS"}


def test_compiled_with_gradients_equals_eager(fresh_compiler):
    def loss(query, memory, counts):
        out = memory_recall(query, memory, counts, softmax_scale=0.25, impl="triton")
        return out.recalled.square().sum() + out.lse.sum()

    query, memory, counts = make_inputs(1)
    inputs = (query.requires_grad_(), memory.requires_grad_())
    eager = torch.autograd.grad(loss(*inputs, counts), inputs)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs, counts), inputs)
    assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("slots", [5, 1000])
def test_nan_in_a_live_slot_is_seen(slots, queries):
    query, memory = torch.randn(2, queries, 64, device=DEVICE), torch.randn(2, slots, 64, device=DEVICE)
    memory[1, slots // 2, 3] = torch.nan
    query, memory = query.requires_grad_(), memory.requires_grad_()
    out = memory_recall(query, memory, softmax_scale=0.125, impl="triton")
    assert out.recalled[1].isnan().all() and out.lse[1].isnan().all() and (out.slot[1] == -1).all()
    grads = torch.autograd.grad(out.recalled.sum(), (query, memory))
    assert all(grad[1].isnan().all() for grad in grads)
    assert not any(x[0].isnan().any() for x in (*out, *grads))


def test_explain_says_what_is_missing():
    query, memory, _ = make_inputs(1, torch.float64)
    text = hmt_kernels.explain("memory_recall", query, memory, softmax_scale=1.0, impl="triton")
    assert text.startswith("memory_recall: ValueError") and "it has no float64" in text
    with pytest.raises(ValueError, match="it has no float64"):
        memory_recall(query, memory, softmax_scale=1.0, impl="triton")
