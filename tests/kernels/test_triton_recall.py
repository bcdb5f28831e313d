"""The Triton kernels of memory_recall, on a GPU or in the interpreter: results, gradients, strides, block order."""

from __future__ import annotations

import interpreter_bf16
import oracles
import pytest
import torch
from kernel_runs import poison_new_memory, shuffle_blocks
from tolerance import assert_accurate

from hmt_kernels import memory_recall
from hmt_kernels.memory_recall import triton as implementation
from hmt_kernels.memory_recall import triton_plans
from hmt_kernels.triton_launch import Target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if implementation.INTERPRETED:
    interpreter_bf16.install()
REPEATS = 5 if implementation.INTERPRETED else 20

# B, Q, N, D, dtype, num_valid, layout: every value that the contract names, with every other kind of value
CASES = [
    (1, 1, 0, 64, torch.float32, None, "contiguous"),
    (3, 1, 1, 8, torch.bfloat16, [1, 0, 1], "sliced"),
    (8, 1, 7, 64, torch.float16, [0, 1, 2, 3, 4, 7, 9, -1], "transposed"),
    (3, 1, 300, 576, torch.bfloat16, [300, 0, 17], "contiguous"),
    (1, 1, 300, 960, torch.float32, [299], "sliced"),
    (3, 1, 1000, 64, torch.float32, [1000, 1, 999], "expanded"),
    (1, 1, 1000, 8, torch.float16, None, "odd"),
    (1, 1, 300, 4096, torch.bfloat16, [211], "transposed"),
    (1, 1, 7, 4096, torch.float32, None, "contiguous"),
    (8, 2, 1, 8, torch.float16, [0, 1, 1, 1, 0, 1, 1, 1], "transposed"),
    (3, 2, 7, 576, torch.bfloat16, [7, 0, 3], "expanded"),
    (1, 2, 300, 64, torch.float32, [270], "odd"),
    (1, 2, 0, 960, torch.float16, None, "contiguous"),
    (1, 16, 300, 960, torch.bfloat16, None, "sliced"),
    (3, 16, 1000, 8, torch.float16, [0, 1000, 1], "contiguous"),
    (1, 16, 7, 4096, torch.bfloat16, [5], "contiguous"),
    (1, 16, 7, 576, torch.float32, None, "transposed"),
    (2, 35, 40, 64, torch.bfloat16, [40, 0], "contiguous"),
]


def case_name(case):
    batch, queries, slots, dim, dtype, num_valid, layout = case
    counts = "" if num_valid is None else "-num_valid"
    return f"B{batch}-Q{queries}-N{slots}-D{dim}-{str(dtype).removeprefix('torch.')}{counts}-{layout}"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_new_memory(monkeypatch)


def lay_out(x, layout):
    """The values of x [B, rows, D] (for "expanded", of its first batch row) under other strides, as a leaf."""
    if layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "expanded":
        x = x[:1].expand_as(x)
    elif layout in ("sliced", "odd"):
        before, after, step = (8, 16, 2) if layout == "sliced" else (1, 2, 1)
        batch, rows, dim = x.shape
        room = x.new_full((batch + 1, rows * step, before + dim + after), float("nan"))
        room[1:, ::step, before : before + dim] = x
        x = room[1:, ::step, before : before + dim]
    return x.detach().requires_grad_()


def make_case(batch, queries, slots, dim, dtype, num_valid, layout):
    memory = torch.randn(batch, slots, dim, dtype=dtype, device=DEVICE)
    for b, count in enumerate(num_valid or []):
        # Rows that share elements share their dead slots too.
        memory[b, max(num_valid if layout == "expanded" else [count, 0]) :] = float("nan")
    query = lay_out(torch.randn(batch, queries, dim, dtype=dtype, device=DEVICE), layout)
    counts = None if num_valid is None else torch.tensor(num_valid, dtype=torch.int32, device=DEVICE)
    return query, lay_out(memory, layout), counts, 1.5 * dim**-0.5


def oracle_with_gradients(query, memory, num_valid, softmax_scale, d_recalled, d_lse, dtype):
    query, memory = (x.detach().to(dtype).requires_grad_() for x in (query, memory))
    recalled, lse, slot = oracles.recall(query, memory, num_valid, softmax_scale)
    grads = torch.autograd.grad((recalled, lse), (query, memory), (d_recalled.to(dtype), d_lse.to(dtype)))
    return recalled, lse, slot, *grads


def lse_atol(case, exact):
    """lse is float32 whatever the inputs are, but tensor cores cut off the last bit of a sum with every 16 products."""
    queries, dim, dtype = case[1], case[3], case[4]
    if queries == 1 or dtype == torch.float32 or not exact.isfinite().any():
        return None
    largest = max(1.0, exact[exact.isfinite()].abs().max().item())
    return (4e-6 + dim / 16 * torch.finfo(torch.float32).eps / 2) * largest


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_forward_and_gradients_are_accurate(case):
    dtype, num_valid = case[4:6]
    query, memory, counts, scale = make_case(*case)
    out = memory_recall(query, memory, counts, softmax_scale=scale, impl="triton")
    d_recalled, d_lse = torch.randn_like(out.recalled), torch.randn_like(out.lse)
    grads = torch.autograd.grad((out.recalled, out.lse), (query, memory), (d_recalled, d_lse))

    arguments = (query, memory, num_valid, scale, d_recalled, d_lse)
    exact, rounded, rounded_lse = (
        oracle_with_gradients(*arguments, kind) for kind in (torch.float64, dtype, torch.float32)
    )
    assert_accurate(out.recalled, rounded[0], exact[0], "recalled")
    assert_accurate(out.lse, rounded_lse[1], exact[1], "lse", lse_atol(case, exact[1]))
    assert torch.equal(out.slot, exact[2])
    assert_accurate(grads[0], rounded[3], exact[3], "d_query")
    assert_accurate(grads[1], rounded[4], exact[4], "d_memory")


@pytest.mark.parametrize("queries", [1, 2])
def test_gradient_of_a_sum_alone(queries):
    # Its gradient is expanded from one number, and lse gets none.
    query, memory, counts, scale = make_case(2, queries, 9, 64, torch.float32, [9, 4], "contiguous")
    grads = torch.autograd.grad(
        memory_recall(query, memory, counts, softmax_scale=scale, impl="triton").recalled.sum(), (query, memory)
    )
    ones, zeros = torch.ones_like(query), query.new_zeros(2, queries)
    arguments = (query, memory, [9, 4], scale, ones, zeros)
    exact, rounded = (oracle_with_gradients(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert_accurate(grads[0], rounded[3], exact[3], "d_query")
    assert_accurate(grads[1], rounded[4], exact[4], "d_memory")


@pytest.mark.parametrize(
    ("queries", "dtype"),  # several queries in bfloat16: README's limits
    [(1, torch.float32), (3, torch.float32), (1, torch.bfloat16)],
    ids=["1-float32", "3-float32", "1-bfloat16"],
)
def test_gradients_of_memories_that_are_much_alike(queries, dtype):
    query, memory, counts, scale = make_case(2, queries, 300, 64, dtype, [300, 41], "contiguous")
    memory = (memory.detach().float() + 30 * torch.randn(64, device=DEVICE)).to(dtype).requires_grad_()
    out = memory_recall(query, memory, counts, softmax_scale=scale, impl="triton")
    d_recalled, d_lse = torch.randn_like(out.recalled), torch.randn_like(out.lse)
    grads = torch.autograd.grad((out.recalled, out.lse), (query, memory), (d_recalled, d_lse))
    arguments = (query, memory, [300, 41], scale, d_recalled, d_lse)
    exact, rounded = (oracle_with_gradients(*arguments, kind) for kind in (torch.float64, dtype))
    assert_accurate(grads[0], rounded[3], exact[3], "d_query")


@pytest.mark.parametrize("queries", [1, 3])
def test_ties_go_to_the_lowest_slot(queries):
    query = torch.randn(1, queries, 1024, device=DEVICE)
    memory = query[:, :1].expand(1, 70, 1024).clone()
    memory[:, [0, 1, 2, 68]] *= 0.5
    slot = memory_recall(query, memory, softmax_scale=0.1, impl="triton").slot
    assert slot[0, 0] == 3
    assert (memory_recall(query, memory * 0, softmax_scale=0.1, impl="triton").slot == 0).all()


@pytest.mark.parametrize(("queries", "slots", "parts"), [(1, 4500, 71), (2, 300, 9)], ids=["vector", "matrix"])
def test_repeats_in_random_block_order_give_the_same_bits(queries, slots, parts, monkeypatch):
    monkeypatch.setattr(implementation, "target_of", lambda device: Target(90, 132))
    splits = []
    num_splits = triton_plans.num_splits
    monkeypatch.setattr(triton_plans, "num_splits", lambda *args: splits.append(num_splits(*args)) or splits[-1])
    query, memory, counts, scale = make_case(1, queries, slots, 64, torch.float32, [slots - 9], "contiguous")
    results = []
    for _ in range(REPEATS):
        shuffle_blocks(monkeypatch)
        out = implementation.forward(query, memory, counts, scale)
        results.append((*out, *implementation.backward(out[0], out[1], query, memory, counts, *out[:2], scale)))
    assert set(splits) == {parts}
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    arguments = (query, memory, [slots - 9], scale, *results[0][:2])
    exact, rounded = (oracle_with_gradients(*arguments, dtype) for dtype in (torch.float64, torch.float32))
    for position, name in enumerate(("recalled", "lse", "slot", "d_query", "d_memory")):
        if name != "slot":
            assert_accurate(results[0][position], rounded[position], exact[position], name)


@pytest.mark.parametrize("queries", [1, 5])
def test_weights_that_vanish_leave_nothing(queries):
    query, memory, expected = (x.to(DEVICE) for x in oracles.rising_queue(queries, 300, 72))
    recalled, _, slot = memory_recall(query, memory, softmax_scale=200.0, impl="triton")
    assert torch.equal(recalled, expected) and slot.eq(299).all()
