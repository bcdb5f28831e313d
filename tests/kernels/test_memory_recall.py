"""memory_recall: results and gradients against a naive oracle in float64, dead slots, strides, degenerate shapes."""

from __future__ import annotations

import oracles
import pytest
import torch
from tolerance import assert_accurate

from hmt_kernels import RecallOutput, dispatch, memory_recall, memory_recall_step
from hmt_kernels.memory_recall import reference

IMPLS = [name for name in ("reference", "cpu") if dispatch.missing("memory_recall", name) is None]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# on a CPU the kernels of Triton are interpreted
EVERYWHERE = [*IMPLS, *(["triton"] if dispatch.missing("memory_recall", "triton") is None else [])]
EVERYWHERE = EVERYWHERE if not torch.cuda.is_available() else IMPLS
# the kernels take three dtypes; float64 is the reference's alone
IMPLS_AND_DTYPES = [(i, d) for i in IMPLS for d in DTYPES if i == "reference" or d != torch.float64]
# B, Q, N, D, num_valid
CASES = {
    "one-slot": (1, 1, 1, 8, None),
    "paper": (1, 1, 300, 576, None),
    "filling": (3, 1, 63, 128, [1, 30, 63]),
    "ragged": (4, 3, 63, 40, [63, 0, 1, 17]),
    "out-of-range": (2, 2, 9, 16, [-3, 100]),
    "odd-queries": (2, 63, 33, 64, [33, 5]),
    "long": (2, 2, 1000, 72, [1000, 999]),
    "widest": (1, 2, 5, 8192, [4]),
    "most-slots": (1, 1, 65536, 8, [65535]),
}


def make_case(batch, queries, slots, dim, num_valid, dtype):
    query = torch.randn(batch, queries, dim, dtype=dtype, requires_grad=True)
    memory = torch.randn(batch, slots, dim, dtype=dtype, requires_grad=True)
    counts = None if num_valid is None else torch.tensor(num_valid, dtype=torch.int32)
    return query, memory, counts, 1.5 * dim**-0.5


def oracle_with_gradients(query, memory, num_valid, softmax_scale, d_recalled, d_lse, dtype):
    query, memory = (x.detach().to(dtype).requires_grad_() for x in (query, memory))
    recalled, lse, slot = oracles.recall(query, memory, num_valid, softmax_scale)
    grads = torch.autograd.grad((recalled, lse), (query, memory), (d_recalled.to(dtype), d_lse.to(dtype)))
    return recalled, lse, slot, *grads


@pytest.mark.parametrize(("impl", "dtype"), IMPLS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_accurate(case, dtype, impl):
    *sizes, num_valid = CASES[case]
    query, memory, counts, scale = make_case(*sizes, num_valid, dtype)
    out = memory_recall(query, memory, counts, softmax_scale=scale, impl=impl)
    assert out.recalled.dtype == dtype
    assert out.slot.dtype == torch.int32
    assert out.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    d_recalled, d_lse = torch.randn_like(out.recalled), torch.randn_like(out.lse)
    grads = torch.autograd.grad((out.recalled, out.lse), (query, memory), (d_recalled, d_lse))
    exact = oracle_with_gradients(query, memory, num_valid, scale, d_recalled, d_lse, torch.float64)
    rounded = oracle_with_gradients(query, memory, num_valid, scale, d_recalled, d_lse, dtype)
    # lse stays in float32, so it is held against float32 even when the inputs are shorter.
    rounded_lse = oracle_with_gradients(query, memory, num_valid, scale, d_recalled, d_lse, out.lse.dtype)[1]
    assert_accurate(out.recalled, rounded[0], exact[0], "recalled")
    assert_accurate(out.lse, rounded_lse, exact[1], "lse")
    assert torch.equal(out.slot, exact[2])
    assert_accurate(grads[0], rounded[3], exact[3], "d_query")
    assert_accurate(grads[1], rounded[4], exact[4], "d_memory")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", ["recalled", "lse"])
def test_gradient_through_one_output_only(wanted, impl):
    query, memory, counts, scale = make_case(2, 3, 17, 24, [17, 4], torch.float32)
    result = getattr(memory_recall(query, memory, counts, softmax_scale=scale, impl=impl), wanted)
    grads = torch.autograd.grad(result.sum(), (query, memory))
    for dtype, results in ((torch.float64, exact := []), (torch.float32, rounded := [])):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (query, memory)]
        recalled, lse, _ = oracles.recall(*inputs, [17, 4], scale)
        results += torch.autograd.grad((recalled if wanted == "recalled" else lse).sum(), inputs)
    assert_accurate(grads[0], rounded[0], exact[0], "d_query")
    assert_accurate(grads[1], rounded[1], exact[1], "d_memory")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dead_slots_are_never_read(dtype, poison, impl):
    query, memory, counts, scale = make_case(3, 2, 40, 64, [40, 7, 0], dtype)
    poisoned = memory.detach().clone()
    poisoned[1, 7:] = poison
    poisoned[2] = poison
    poisoned.requires_grad_()
    clean = memory_recall(query, memory, counts, softmax_scale=scale, impl=impl)
    dirty = memory_recall(query, poisoned, counts, softmax_scale=scale, impl=impl)
    upstream = torch.randn_like(clean.recalled), torch.randn_like(clean.lse)
    clean_grads = torch.autograd.grad(clean[:2], (query, memory), upstream)
    dirty_grads = torch.autograd.grad(dirty[:2], (query, poisoned), upstream)
    for expected, actual in zip((*clean, *clean_grads), (*dirty, *dirty_grads), strict=True):
        assert torch.equal(expected, actual)
    assert not dirty_grads[1][1, 7:].any()
    assert not dirty_grads[1][2].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("slots", [5, 1000])
def test_nan_in_a_live_slot_is_seen(slots, queries, impl):
    """In everything that its batch row gives, in nothing else; a slot that is not the strongest of numbers is none."""
    query, memory, _, scale = make_case(2, queries, slots, 64, None, torch.float32)
    poisoned = memory.detach().clone()
    poisoned[1, slots // 2, 3] = torch.nan
    poisoned.requires_grad_()
    clean = memory_recall(query, memory, softmax_scale=scale, impl=impl)
    out = memory_recall(query, poisoned, softmax_scale=scale, impl=impl)
    assert out.recalled[1].isnan().all() and out.lse[1].isnan().all()
    assert all(-1 <= slot < slots for slot in out.slot[1].tolist())
    clean_grads = torch.autograd.grad(clean.recalled.sum(), (query, memory))
    grads = torch.autograd.grad(out.recalled.sum(), (query, poisoned))
    assert all(grad[1].isnan().all() for grad in grads)
    for expected, actual in zip((*clean, *clean_grads), (*out, *grads), strict=True):
        assert torch.equal(expected[0], actual[0])


@pytest.mark.parametrize("impl", EVERYWHERE)
@pytest.mark.parametrize("how", ["no-slots", "none-valid"])
@pytest.mark.parametrize("queries", [1, 3])
def test_without_a_live_slot(queries, how, impl):
    slots, counts = (0, None) if how == "no-slots" else (5, torch.zeros(2, dtype=torch.int32))
    query, memory, _, scale = make_case(2, queries, slots, 16, None, torch.float32)
    out = memory_recall(query, memory, counts, softmax_scale=scale, impl=impl)
    assert isinstance(out, RecallOutput)
    assert torch.equal(out.recalled, torch.zeros(2, queries, 16))
    assert torch.equal(out.lse, torch.full((2, queries), -torch.inf))
    assert torch.equal(out.slot, torch.full((2, queries), -1, dtype=torch.int32))
    # The upstream gradient of lse is 2 lse = -inf here, and must not become NaN.
    grads = torch.autograd.grad(out.recalled.sum() + (out.lse * out.lse).sum(), (query, memory))
    assert not grads[0].any()
    assert not grads[1].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 1, 5, 16), (2, 0, 5, 16), (2, 0, 0, 8)], ids=str)
def test_empty_batch_or_queries(shape, impl):
    query, memory, _, scale = make_case(*shape, None, torch.float32)
    out = memory_recall(query, memory, softmax_scale=scale, impl=impl)
    assert out.recalled.shape == query.shape
    assert out.lse.shape == out.slot.shape == query.shape[:2]
    d_query, d_memory = torch.autograd.grad(out.recalled.sum() + out.lse.sum(), (query, memory))
    assert d_query.shape == query.shape
    assert torch.equal(d_memory, torch.zeros_like(memory))


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_take_the_lowest_slot(impl):
    memory = torch.zeros(1, 1000, 8)
    memory[0, [63, 64, 700]] = 1.0
    queries = torch.stack([torch.ones(8), -torch.ones(8), torch.zeros(8)])[None]
    assert memory_recall(queries, memory, softmax_scale=1.0, impl=impl).slot.tolist() == [[63, 0, 0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_do_not_overflow(impl):
    query, memory = torch.full((1, 1, 8), 300.0), torch.full((1, 3, 8), 300.0)
    memory[0, 1] = -300.0
    out = memory_recall(query, memory, softmax_scale=1.0, impl=impl)
    assert torch.equal(out.recalled, torch.full((1, 1, 8), 300.0))
    assert out.lse.item() == pytest.approx(720000.6931, abs=0.1)
    assert out.slot.item() == 0


def strided_views(x):
    """The same values under strides that no allocation gives."""
    padded = torch.zeros(*x.shape[:2], 2 * x.shape[2], dtype=x.dtype)
    padded[..., ::2] = x
    yield "every-other-feature", padded[..., ::2]
    yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "features-first", x.mT.contiguous().mT


@pytest.mark.parametrize("impl", EVERYWHERE)
@pytest.mark.parametrize("queries", [1, 3])
def test_scores_near_the_end_of_float32(queries, impl):
    """Below what a running maximum might begin with; nothing is recalled of the rows that fill a tile up."""
    query = torch.full((1, queries, 64), 1e18)
    memory = -torch.full((1, 4, 64), 1e18) * torch.tensor([2.0, 3.0, 4.0, 5.0])[:, None]
    out = memory_recall(query, memory, softmax_scale=1.0, impl=impl)
    assert out.slot.tolist() == [[0] * queries]
    torch.testing.assert_close(out.lse, torch.full((1, queries), -1.28e38))
    torch.testing.assert_close(out.recalled, memory[:, :1].expand_as(query))


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_another_default_device(impl):
    """Results lie where the arguments do; an address of another device would be the end of the process."""
    query, memory = torch.randn(2, 1, 64), torch.randn(2, 30, 64)
    expected = memory_recall(query, memory, softmax_scale=0.1, impl=impl)
    out, index = torch.zeros(2, 2, 64), torch.zeros(2, dtype=torch.int32)
    with torch.device("meta"):
        actual = memory_recall(query, memory, softmax_scale=0.1, impl=impl)
        memory_recall_step(query, memory, memory[:, 0].clone(), index, softmax_scale=0.1, out=out, impl=impl)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0, atol=0)
    torch.testing.assert_close(out[:, 1:], expected.recalled)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_negative_bit_is_seen(impl):
    query, memory = torch.randn(2, 1, 64), torch.randn(2, 30, 64)
    actual = memory_recall(query, torch._neg_view(memory), softmax_scale=0.1, impl=impl)
    torch.testing.assert_close(tuple(actual), tuple(memory_recall(query, -memory, softmax_scale=0.1, impl=impl)))


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    query, memory, counts, scale = make_case(2, 3, 17, 24, [17, 4], torch.float32)
    query, memory, d_recalled = query.detach(), memory.detach(), torch.randn(2, 3, 24)

    def run(query, memory, d_recalled):
        query, memory = query.requires_grad_(), memory.requires_grad_()
        out = memory_recall(query, memory, counts, softmax_scale=scale, impl=impl)
        assert out.recalled.is_contiguous()
        return out.recalled, *torch.autograd.grad(out.recalled, (query, memory), d_recalled)

    expected = run(query.clone(), memory.clone(), d_recalled)
    layouts = zip(strided_views(query), strided_views(memory), strided_views(d_recalled), strict=True)
    for (name, query_view), (_, memory_view), (_, d_recalled_view) in layouts:
        for actual, wanted in zip(run(query_view, memory_view, d_recalled_view), expected, strict=True):
            torch.testing.assert_close(actual, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
def test_stride_zero_inputs_and_gradients(impl):
    row, slots = (torch.randn(24, requires_grad=True), torch.randn(17, 24, requires_grad=True))
    counts = torch.tensor([9], dtype=torch.int32).expand(3)
    out = memory_recall(row.expand(3, 2, 24), slots.expand(3, 17, 24), counts, softmax_scale=0.3, impl=impl)
    grads = torch.autograd.grad(out.recalled.sum() + out.lse.sum(), (row, slots))  # upstream gradients of stride 0
    copies = (row.detach().repeat(3, 2, 1).requires_grad_(), slots.detach().repeat(3, 1, 1).requires_grad_())
    recalled, lse, _ = oracles.recall(*copies, [9, 9, 9], 0.3)
    d_query, d_memory = torch.autograd.grad(recalled.sum() + lse.sum(), copies)
    torch.testing.assert_close(out.recalled, recalled)
    torch.testing.assert_close(grads[0], d_query.sum((0, 1)))
    torch.testing.assert_close(grads[1], d_memory.sum(0))


def test_reference_never_reads_values_on_the_host():
    # A meta tensor has no values: reading one, as .item() does, would raise.
    query, memory = (torch.empty(2, 3, 16, device="meta"), torch.empty(2, 5, 16, device="meta"))
    counts = torch.empty(2, dtype=torch.int32, device="meta")
    recalled, lse, slot = reference.forward(query, memory, counts, 0.25)
    d_query, d_memory = reference.backward(recalled, lse, query, memory, counts, recalled, lse, 0.25)
    assert d_query.shape == query.shape
    assert d_memory.shape == memory.shape
    assert slot.shape == (2, 3)
