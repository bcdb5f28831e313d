"""The CUDA kernels of memory_recall: on the CPU through the emulation, and on the device too where there is one."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import oracles
import pytest
import torch
from tolerance import assert_accurate

from hmt_kernels.memory_recall import cuda

ON_DEVICE = cuda.missing() is None
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, Q, N, D, num_valid; a queue is split from 8 slots, or 32 with several queries
CASES = {
    "one-slot": (1, 1, 1, 8, None),
    "no-slot": (1, 2, 0, 64, None),
    "seven": (3, 1, 7, 576, [7, 0, 3]),
    "batch": (8, 2, 7, 64, [0, 1, 2, 3, 4, 5, 6, 7]),
    "odd": (2, 1, 63, 72, [63, 50]),
    "paper": (1, 1, 300, 576, None),
    "out-of-range": (3, 2, 300, 960, [301, -1, 60]),
    "sixteen": (1, 16, 300, 64, None),
    "sixteen-wide": (3, 16, 7, 960, [7, 5, 0]),
    "long": (1, 1, 1000, 64, None),
    "long-pairs": (3, 2, 1000, 8, [1000, 0, 333]),
    "wide": (1, 1, 300, 4096, None),
    "wide-three": (1, 3, 7, 4096, [6]),
    "widest": (1, 2, 50, 8192, [49]),
    "most-slots": (1, 1, 24 * 1024, 8, None),
}


class Backend(NamedTuple):
    device: str
    module: object  # with set_seed and fail_next_launch, or the native module


@pytest.fixture
def emulated(emulate):
    return Backend("cpu", emulate(cuda))


@pytest.fixture(params=["emulated", "device"] if ON_DEVICE else ["emulated"])
def backend(request):
    return request.getfixturevalue("emulated") if request.param == "emulated" else Backend("cuda", cuda._C)


@contextlib.contextmanager
def poisoned():
    """torch.empty gives NaN: whatever a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def make_inputs(case, dtype, device):
    """query, memory with NaN in its dead slots, num_valid, softmax_scale."""
    batch, queries, slots, dim, num_valid = case
    query = torch.randn(batch, queries, dim, device=device).to(dtype)
    memory = torch.randn(batch, slots, dim, device=device).to(dtype)
    for b, count in enumerate(num_valid or []):
        memory[b, max(count, 0) :] = float("nan")
    counts = None if num_valid is None else torch.tensor(num_valid, dtype=torch.int32, device=device)
    return query, memory, counts, 1.5 * dim**-0.5


def run(query, memory, counts, scale, d_recalled, d_lse):
    """recalled, lse, slot, d_query, d_memory"""
    with poisoned():
        recalled, lse, slot = cuda.forward(query, memory, counts, scale)
        grads = cuda.backward(d_recalled, d_lse, query, memory, counts, recalled, lse, scale)
    return recalled, lse, slot, *grads


def oracle(query, memory, num_valid, scale, d_recalled, d_lse, dtype):
    query, memory = (x.to(dtype).requires_grad_() for x in (query, memory))
    recalled, lse, slot = oracles.recall(query, memory, num_valid, scale)
    grads = torch.autograd.grad((recalled, lse), (query, memory), (d_recalled.to(dtype), d_lse.to(dtype)))
    return recalled, lse, slot, *grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_accurate(case, dtype, backend):
    query, memory, counts, scale = make_inputs(CASES[case], dtype, backend.device)
    d_recalled, d_lse = torch.randn_like(query), torch.randn(query.shape[:2], device=backend.device)
    results = run(query, memory, counts, scale, d_recalled, d_lse)
    assert [x.dtype for x in results] == [dtype, torch.float32, torch.int32, dtype, dtype]

    arguments = (query, memory, CASES[case][4], scale, d_recalled, d_lse)
    exact, rounded = oracle(*arguments, torch.float64), list(oracle(*arguments, dtype))
    rounded[1] = oracle(*arguments, torch.float32)[1]  # lse is float32 whatever the inputs are
    for name, i in {"recalled": 0, "lse": 1, "d_query": 3, "d_memory": 4}.items():
        assert_accurate(results[i], rounded[i], exact[i], name)
    assert torch.equal(results[2], exact[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_slot_has_no_gradient_through_its_weight(dtype, backend):
    query, memory, counts, scale = make_inputs((2, 3, 1, 64, None), dtype, backend.device)
    recalled, _, _, d_query, d_memory = run(query, memory, counts, scale, torch.ones_like(query), None)
    assert torch.equal(recalled, memory.expand_as(recalled))
    assert torch.equal(d_query, torch.zeros_like(query))
    assert torch.equal(d_memory, torch.full_like(memory, 3.0))


def test_the_lowest_of_equal_slots_is_reported(backend):
    query, memory = torch.ones(1, 1, 16, device=backend.device), torch.zeros(1, 300, 16, device=backend.device)
    for slots in ([299], [250, 299], [7, 250], [6, 7], [0, 6]):
        memory[0, slots] = 1.0
        assert cuda.forward(query, memory, None, 1.0)[2].item() == slots[0]


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns-first": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat((x, x, x), dim=2)[:, :, x.shape[2] : 2 * x.shape[2]],
    "every-other-row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "unaligned": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
    "unaligned-rows": lambda x: torch.nn.functional.pad(x, (0, 1))[:, :, :-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout, backend):
    query, memory, counts, scale = make_inputs((2, 3, 100, 72, [100, 31]), torch.bfloat16, backend.device)
    d_recalled, d_lse = torch.randn_like(query), torch.randn(2, 3, device=backend.device)
    expected = run(query, memory, counts, scale, d_recalled, d_lse)
    change = LAYOUTS[layout]
    d_lse = d_lse.T.contiguous().T
    results = run(change(query), change(memory), counts, scale, change(d_recalled), d_lse)
    for result, same in zip(results, expected, strict=True):
        assert result.is_contiguous() and torch.equal(result, same)


def test_expanded_inputs_and_the_gradient_of_a_sum(backend):
    query, memory, _, scale = make_inputs((1, 1, 50, 64, None), torch.float32, backend.device)
    ones, zero, count = (torch.tensor(x, device=backend.device) for x in (1.0, 0.0, 40))
    expanded = (query.expand(3, 2, 64), memory.expand(3, 50, 64), count.int().expand(3), scale)
    results = run(*expanded, ones.expand(3, 2, 64), zero.expand(3, 2))
    copied = (*(x.contiguous() for x in expanded[:3]), scale)
    expected = run(*copied, torch.ones(3, 2, 64, device=backend.device), None)
    assert all(torch.equal(result, same) for result, same in zip(results, expected, strict=True))


def test_rows_may_lie_more_than_two_gigabytes_apart(backend):
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=backend.device)  # touched at its two ends only
    memory = storage.as_strided((1, 2, 64), (2**31, 2**31, 1))
    memory.copy_(torch.randn(1, 2, 64))
    query, d_recalled = torch.randn(2, 1, 1, 64, device=backend.device).bfloat16()
    results = run(query, memory, None, 0.125, d_recalled, None)
    expected = run(query, memory.contiguous(), None, 0.125, d_recalled, None)
    assert all(torch.equal(result, same) for result, same in zip(results, expected, strict=True))


@pytest.mark.parametrize("case", [CASES["batch"], CASES["long"], (2, 5, 100, 72, [100, 50])], ids=str)
def test_repeats_and_orders_give_the_same_bits(case, backend):
    query, memory, counts, scale = make_inputs(case, torch.float32, backend.device)
    arguments = (query, memory, counts, scale, torch.randn_like(query), None)
    expected = run(*arguments)
    for seed in range(1, 20):
        if backend.device == "cpu":
            backend.module.set_seed(seed)
        assert all(torch.equal(result, same) for result, same in zip(run(*arguments), expected, strict=True))


def test_empty_batch_and_no_queries(backend):
    for batch, queries in ((0, 1), (2, 0)):
        query, memory, _, scale = make_inputs((batch, queries, 5, 16, None), torch.float32, backend.device)
        recalled, lse, slot, d_query, d_memory = run(query, memory, None, scale, query, None)
        assert recalled.shape == d_query.shape == query.shape and lse.shape == slot.shape == (batch, queries)
        assert torch.equal(d_memory, torch.zeros_like(memory))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots, slot_index", [(100, [0, 99]), (100, [57, 24]), (3, [2, 1]), (100, [-1, 100])], ids=str)
def test_step_writes_the_slot_then_recalls(slots, slot_index, dtype, backend):
    query, memory, counts, scale = make_inputs((2, 1, slots, 72, [slots, slots // 2]), dtype, backend.device)
    new_memory = torch.randn(2, 72, device=backend.device).to(dtype)
    index = torch.tensor(slot_index, dtype=torch.int32, device=backend.device)
    expected = memory.clone()
    for b, n in enumerate(slot_index):
        if 0 <= n < slots:
            expected[b, n] = new_memory[b]
    out = torch.full((2, 9, 72), 5.0, dtype=dtype, device=backend.device)
    with poisoned():
        recalled, lse, slot = cuda.step(query, memory, new_memory, index, counts, scale, out)
        same = cuda.forward(query, expected, counts, scale)
    assert torch.equal(memory.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert all(torch.equal(x, y) for x, y in zip((recalled, lse, slot), same, strict=True))
    assert torch.equal(out[:, :1], recalled) and torch.equal(out[:, -1:], recalled)
    assert (out[:, 1:-1] == 5.0).all()


def test_step_takes_a_segment_of_one_row_and_strided_arguments(backend):
    query, memory, _, scale = make_inputs((2, 1, 50, 64, None), torch.float32, backend.device)
    new_memory = torch.randn(64, 2, device=backend.device).T
    index = torch.tensor([3, 0, 49, 0], dtype=torch.int32, device=backend.device)[::2]
    out = torch.empty(2, 3, 64, device=backend.device)[:, 1:2]
    recalled, _, _ = cuda.step(query.mT.contiguous().mT, memory, new_memory, index, None, scale, out)
    assert torch.equal(memory[[0, 1], [3, 49]], new_memory)
    assert torch.equal(recalled, cuda.forward(query, memory, None, scale)[0]) and torch.equal(out, recalled)


@pytest.mark.parametrize("name", ["memory", "out"])
def test_step_refuses_rows_that_it_cannot_write_in_place(name, backend):
    tensors = {
        "memory": torch.zeros(1, 4, 8, device=backend.device),
        "out": torch.zeros(1, 4, 8, device=backend.device),
    }
    tensors[name] = torch.zeros(1, 8, 4, device=backend.device).mT
    index, row = torch.zeros(1, dtype=torch.int32, device=backend.device), torch.zeros(1, 8, device=backend.device)
    with pytest.raises(ValueError, match=rf"{name} must have contiguous rows .*got strides \(32, 1, 4\)"):
        cuda.step(row[:, None], tensors["memory"], row, index, None, 1.0, tensors["out"])


def test_a_failed_launch_is_raised_with_kernel_and_shapes(emulated):
    query, memory, _, scale = make_inputs((2, 3, 7, 64, None), torch.bfloat16, "cpu")
    recalled, lse, _ = cuda.forward(query, memory, None, scale)
    emulated.module.fail_next_launch()
    with pytest.raises(RuntimeError, match=r"memory_recall_fwd\(B=2, Q=3, N=7, D=64, bfloat16\): a failure"):
        cuda.forward(query, memory, None, scale)
    emulated.module.fail_next_launch()
    with pytest.raises(RuntimeError, match=r"memory_recall_bwd\(B=2, Q=3, N=7, D=64, bfloat16\): a failure"):
        cuda.backward(query, None, query, memory, None, recalled, lse, scale)


def test_what_the_kernels_cannot_run_is_said(monkeypatch):
    assert cuda.unavailable(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)) == "it needs CUDA tensors, got cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, reason in (
        (None, "the native module hmt_kernels._C is not built"),
        (object(), "the native module was built without CUDA"),
        (type("_C", (), {"memory_recall_cuda_fwd": None}), "PyTorch sees no CUDA device"),
    ):
        monkeypatch.setattr(cuda, "_C", module)
        assert cuda.missing() == reason


if ON_DEVICE:

    def test_a_captured_step_replays():
        query, memory, counts, scale = make_inputs((2, 1, 300, 4096, [300, 20]), torch.bfloat16, "cuda")
        new_memory, index = torch.zeros_like(query[:, 0]), torch.zeros(2, dtype=torch.int32, device="cuda")
        out = torch.empty(2, 5, 4096, dtype=torch.bfloat16, device="cuda")
        cuda.step(query, memory, new_memory, index, counts, scale, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recalled, lse, slot = cuda.step(query, memory, new_memory, index, counts, scale, out)
        for replay in range(3):
            new_memory.normal_()
            index.fill_(5 * replay)
            graph.replay()
            expected = cuda.forward(query, memory, counts, scale)
            assert torch.equal(memory[:, 5 * replay], new_memory) and torch.equal(out[:, -1:], recalled)
            assert all(torch.equal(x, y) for x, y in zip((recalled, lse, slot), expected, strict=True))


@pytest.mark.parametrize("queries", [1, 5])
def test_weights_that_vanish_leave_nothing(queries, backend):
    query, memory, expected = (x.to(backend.device) for x in oracles.rising_queue(queries, 300, 72))
    recalled, _, slot = cuda.forward(query, memory, None, 200.0)
    assert torch.equal(recalled, expected) and slot.eq(299).all()
