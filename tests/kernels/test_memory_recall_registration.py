"""memory_recall as a PyTorch operator: opcheck, gradcheck, torch.compile, fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from hmt_kernels import memory_recall

OPS = torch.ops.hmt_kernels


def make_inputs(batch=2, queries=3, slots=7, dtype=torch.float64, with_counts=True):
    query = torch.randn(batch, queries, 16, dtype=dtype, requires_grad=True)
    memory = torch.randn(batch, slots, 16, dtype=dtype, requires_grad=True)
    counts = torch.tensor([slots, 3][:batch], dtype=torch.int32) if with_counts else None
    return query, memory, counts


def strided(tensor):
    return tensor.detach().mT.contiguous().mT.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("with_counts", [True, False], ids=["num_valid", "all-valid"])
def test_opcheck_of_the_forward_operator(with_counts, layout, dtype):
    query, memory, counts = make_inputs(dtype=dtype, with_counts=with_counts)
    if layout == "strided":
        query, memory = strided(query), strided(memory)
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    result = opcheck(OPS.memory_recall_fwd, (query, memory, counts, 0.25, "reference"), **tolerances)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("slots", [0, 7])
@pytest.mark.parametrize("with_d_lse", [True, False], ids=["d_lse", "no-d_lse"])
def test_opcheck_of_the_backward_operator(with_d_lse, slots):
    query, memory, counts = make_inputs(slots=slots)
    query, memory = query.detach(), memory.detach()
    recalled, lse, _ = OPS.memory_recall_fwd(query, memory, counts, 0.25, "reference")
    d_recalled = torch.randn(2, 3, 1, dtype=torch.float64).expand(2, 3, 16)
    d_lse = torch.randn_like(lse) if with_d_lse else None
    args = (d_recalled, d_lse, query, memory, counts, recalled, lse, 0.25, "reference")
    assert set(opcheck(OPS.memory_recall_bwd, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("counts", [None, [7, 3], [1, 7]], ids=str)
def test_gradcheck(counts):
    query, memory, _ = make_inputs()
    counts = None if counts is None else torch.tensor(counts, dtype=torch.int32)

    def call(query, memory):
        return memory_recall(query, memory, counts, softmax_scale=0.7)[:2]

    assert torch.autograd.gradcheck(call, (query, memory))


def test_gradcheck_with_a_row_without_live_slots():
    query, memory, _ = make_inputs()
    counts = torch.tensor([0, 3], dtype=torch.int32)

    def call(query, memory):
        out = memory_recall(query, memory, counts, softmax_scale=0.7)
        return out.recalled, out.lse[1:]  # the lse of row 0 is -inf: no difference quotient there

    assert torch.autograd.gradcheck(call, (query, memory))


def recall_loss(query, memory, counts):
    out = memory_recall(query, memory, counts, softmax_scale=0.25)
    return (out.recalled.float() ** 2).sum() + out.lse.sum(), out


def run_with_gradients(function, query, memory, counts):
    loss, out = function(query, memory, counts)
    return loss, *out, *torch.autograd.grad(loss, (query, memory))


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_equals_eager(dtype):
    inputs = make_inputs(dtype=dtype)
    compiled = torch.compile(recall_loss, fullgraph=True)
    assert_same(run_with_gradients(compiled, *inputs), run_with_gradients(recall_loss, *inputs))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_for_all_shapes():
    compiled = torch.compile(recall_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = make_inputs()
    assert_same(run_with_gradients(compiled, *inputs), run_with_gradients(recall_loss, *inputs))
    with torch.compiler.set_stance("fail_on_recompile"):
        inputs = make_inputs(queries=5, slots=23)
        assert_same(run_with_gradients(compiled, *inputs), run_with_gradients(recall_loss, *inputs))


def test_fake_tensors_pass_through():
    with FakeTensorMode():
        query, memory = (torch.empty(2, 3, 16, dtype=torch.half), torch.empty(2, 5, 16, dtype=torch.half))
        counts = torch.empty(2, dtype=torch.int32)
        recalled, lse, slot = memory_recall(query, memory, counts, softmax_scale=0.5)
    assert recalled.shape == (2, 3, 16)
    assert recalled.dtype == torch.half
    assert lse.shape == (2, 3)
    assert lse.dtype == torch.float32
    assert slot.shape == (2, 3)
    assert slot.dtype == torch.int32


def test_no_graph_without_gradients():
    query, memory, counts = make_inputs()
    with torch.no_grad():
        out = memory_recall(query, memory, counts, softmax_scale=0.25)
    assert not out.recalled.requires_grad
    assert not out.lse.requires_grad
    assert not memory_recall(query, memory, counts, softmax_scale=0.25).slot.requires_grad


def test_gradient_of_one_input_only():
    query, memory, counts = make_inputs()
    both = torch.autograd.grad(recall_loss(query, memory, counts)[0], (query, memory))
    for wanted in (0, 1):
        inputs = [query.detach(), memory.detach()]
        inputs[wanted].requires_grad_()
        (grad,) = torch.autograd.grad(recall_loss(*inputs, counts)[0], inputs[wanted])
        torch.testing.assert_close(grad, both[wanted])


def test_autocast_changes_nothing():
    inputs = make_inputs(dtype=torch.float32)
    expected = run_with_gradients(recall_loss, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_with_gradients(recall_loss, *inputs)
    assert all(torch.equal(a, e) and a.dtype == e.dtype for a, e in zip(actual, expected, strict=True))


def test_second_derivatives_are_refused():
    query, memory, counts = make_inputs()
    (grad,) = torch.autograd.grad(recall_loss(query, memory, counts)[0], query, create_graph=True)
    with pytest.raises(NotImplementedError, match="memory_recall can be differentiated once"):
        grad.sum().backward()
