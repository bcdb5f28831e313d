"""The C++ kernels of memory_recall on a CPU, in every instruction set that this machine has."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import oracles
import pytest
import torch
from tolerance import assert_accurate

from hmt_kernels import _C
from hmt_kernels.memory_recall import cpu

INSTRUCTION_SETS = ["portable", "avx2", "avx512", "avx512bf16"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, Q, N, D, num_valid
CASES = {
    "empty-queue": (3, 2, 0, 64, None),
    "one-slot": (1, 1, 1, 8, None),
    "few-slots": (8, 2, 7, 64, None),
    "narrow": (3, 16, 300, 8, [300, 0, 31]),
    "smollm": (1, 1, 300, 576, None),
    "smollm-batch": (3, 1, 300, 576, [1, 299, 0]),
    "part-of-a-block": (3, 3, 33, 24, [33, 8, 9]),
    "wide-batch": (8, 1, 7, 960, [7, 6, 5, 4, 3, 2, 1, 0]),
    "many-queries": (1, 16, 300, 960, None),
    "most-queries": (1, 64, 300, 72, [200]),
    "long": (3, 2, 1000, 64, [1000, 999, 33]),
    "long-wide": (1, 2, 1000, 576, None),
    "llama": (1, 1, 300, 4096, None),
    "llama-few-queries": (1, 5, 63, 4096, [50]),
}


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request, monkeypatch):
    """Runs the test on one instruction set, or skips it where the processor has not got it."""
    monkeypatch.setenv("HMT_KERNELS_CPU_ISA", request.param)
    try:
        assert _C.cpu_isa() == request.param
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def poisoned_outputs():
    """torch.empty returns NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(batch, queries, slots, dim, num_valid, dtype):
    query, memory = torch.randn(batch, queries, dim).to(dtype), torch.randn(batch, slots, dim).to(dtype)
    counts = None if num_valid is None else torch.tensor(num_valid, dtype=torch.int32)
    if counts is not None:  # dead slots must not be read
        memory[torch.arange(slots) >= counts[:, None]] = float("nan")
    return query, memory, counts, 1.5 * dim**-0.5


def run(query, memory, counts, scale, d_recalled, d_lse):
    recalled, lse, slot = cpu.forward(query, memory, counts, scale)
    grads = cpu.backward(d_recalled, d_lse, query, memory, counts, recalled, lse, scale)
    return {"recalled": recalled, "lse": lse, "slot": slot, "d_query": grads[0], "d_memory": grads[1]}


def oracle(query, memory, num_valid, scale, d_recalled, d_lse, dtype):
    query, memory = (x.to(dtype).nan_to_num().requires_grad_() for x in (query, memory))
    recalled, lse, slot = oracles.recall(query, memory, num_valid, scale)
    grads = torch.autograd.grad((recalled, lse), (query, memory), (d_recalled.to(dtype), d_lse.to(dtype)))
    return {"recalled": recalled, "lse": lse, "slot": slot, "d_query": grads[0], "d_memory": grads[1]}


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_accurate(case, dtype, isa):
    *sizes, num_valid = CASES[case]
    query, memory, counts, scale = make_case(*sizes, num_valid, dtype)
    upstream = torch.randn_like(query), torch.randn(query.shape[:2])
    actual = run(query, memory, counts, scale, *upstream)
    exact = oracle(query, memory, num_valid, scale, *upstream, torch.float64)
    rounded = oracle(query, memory, num_valid, scale, *upstream, dtype)
    # lse stays in float32 whatever the inputs are.
    rounded["lse"] = oracle(query, memory, num_valid, scale, *upstream, torch.float32)["lse"]
    assert torch.equal(actual["slot"], exact["slot"])
    for name in ("recalled", "lse", "d_query", "d_memory"):
        assert_accurate(actual[name], rounded[name], exact[name], name)
    for b, count in enumerate(num_valid or []):
        assert not actual["d_memory"][b, count:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_bit_identical_on_any_threads_and_in_any_batch(dtype, isa):
    query, memory, counts, scale = make_case(3, 2, 300, 1024, [300, 7, 170], dtype)
    upstream = torch.randn_like(query), torch.randn(query.shape[:2])
    expected = run(query, memory, counts, scale, *upstream)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(20):
            actual = run(query, memory, counts, scale, *upstream)
            assert all(torch.equal(actual[name], expected[name]) for name in expected), f"{threads} threads"
    torch.set_num_threads(before)
    for b in range(3):
        live = int(counts[b])
        alone = [query[b : b + 1], memory[b : b + 1, :live]]
        actual = run(*alone, None, scale, *(x[b : b + 1] for x in upstream))
        for name in ("recalled", "lse", "slot", "d_query"):
            assert torch.equal(actual[name][0], expected[name][b]), name
        assert torch.equal(actual["d_memory"][0], expected["d_memory"][b, :live])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, isa):
    query, memory, _, scale = make_case(3, 2, 33, 64, None, dtype)
    upstream = torch.randn_like(query), torch.randn(query.shape[:2])
    expected = run(query, memory, None, scale, *upstream)

    def sliced(x):
        return torch.cat((x, x, x), dim=-1)[..., 64:128]

    def transposed(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def features_first(x):
        return x.mT.contiguous().mT

    for view in (sliced, transposed, features_first):
        actual = run(view(query), view(memory), None, scale, view(upstream[0]), upstream[1].T.contiguous().T)
        for name, value in actual.items():
            assert value.is_contiguous()
            assert torch.equal(value, expected[name]), f"{view.__name__}: {name}"
    row = memory[:1, :1]
    actual = run(query, row.expand(3, 33, 64), None, scale, *upstream)
    repeated = run(query, row.repeat(3, 33, 1), None, scale, *upstream)
    assert all(torch.equal(actual[name], repeated[name]) for name in actual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_short_float_survives(dtype, isa):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    memory = torch.where(values.isfinite(), values, 1.0).view(8, 1, 8192)
    recalled, _, _ = cpu.forward(torch.zeros_like(memory), memory, None, 1.0)  # one slot: its weight is one
    assert torch.equal(recalled, memory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_to_nearest_even(dtype, isa):
    # With zero queries and memory, d_memory is the sum of d_recalled over the queries: from subnormals to infinity.
    d_recalled = torch.randint(-(2**15), 2**15, (8, 2, 8192), dtype=torch.int16).view(dtype)
    d_recalled = torch.where(d_recalled.isfinite(), d_recalled, 1.0)
    query, memory = torch.zeros(8, 2, 8192, dtype=dtype), torch.zeros(8, 1, 8192, dtype=dtype)
    recalled, lse, _ = cpu.forward(query, memory, None, 1.0)
    _, d_memory = cpu.backward(d_recalled, None, query, memory, None, recalled, lse, 1.0)
    assert torch.equal(d_memory, d_recalled.float().sum(1, keepdim=True).to(dtype))


def test_nan_and_infinity_are_not_hidden(isa):
    query, memory = torch.ones(1, 1, 8), torch.zeros(1, 300, 8)
    memory[0, 100, 3] = float("nan")
    assert cpu.forward(query, memory, None, 1.0)[0].isnan().any()
    memory[0, 100, 3] = -float("inf")  # its weight is zero, and 0 * inf is NaN, as in PyTorch
    recalled, lse, slot = cpu.forward(query, memory, None, 1.0)
    assert recalled[0, 0].isnan().tolist() == [False] * 3 + [True] + [False] * 4
    assert lse.item() == pytest.approx(torch.tensor(299.0).log().item())
    assert slot.item() == 0


def test_concurrent_calls_from_python_threads():
    cases = [make_case(1, 1, 300, dim, None, torch.float32) for dim in (64, 576, 1024, 2048)]
    expected = [cpu.forward(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for actual, wanted in zip(pool.map(lambda case: cpu.forward(*case), cases), expected, strict=True):
                assert torch.equal(actual[0], wanted[0])


def test_a_forked_child_computes_the_same():
    query, memory, counts, scale = make_case(1, 1, 1000, 2048, None, torch.float32)
    torch.set_num_threads(2)  # single_thread in conftest.py sets it back
    expected = cpu.forward(query, memory, counts, scale)[0]
    child = os.fork()
    if child == 0:  # a child that waited for its parent's threads would never exit
        same = torch.equal(cpu.forward(query, memory, counts, scale)[0], expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("HMT_KERNELS_CPU_ISA", "sse9")
    assert re.fullmatch("HMT_KERNELS_CPU_ISA must be one of .*portable on this machine, got 'sse9'", cpu.missing())
    with pytest.raises(ValueError, match="got 'sse9'"):
        cpu.forward(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), None, 1.0)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (torch.zeros(1, 1, 8, dtype=torch.float64), "it takes float32, float16 and bfloat16, got torch.float64"),
        (torch.zeros(1, 65, 8), "it takes at most 64 queries, got 65"),
        (torch.zeros(1, 1, 8, device="meta"), "it needs CPU tensors, got meta"),
    ],
    ids=["float64", "queries", "device"],
)
def test_says_why_it_cannot_run(query, reason):
    assert cpu.unavailable(query, query) == reason
    assert cpu.unavailable(torch.zeros(1, 64, 8), torch.zeros(1, 0, 8)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_weights_that_vanish_leave_nothing(queries, dtype, isa):
    query, memory, expected = oracles.rising_queue(queries, 60, 72)
    recalled, _, slot = cpu.forward(query.to(dtype), memory.to(dtype), None, 200.0)
    assert torch.equal(recalled, expected.to(dtype)) and slot.eq(59).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_gradients_of_memories_that_are_much_alike(queries, dtype, isa):
    query, memory, counts, scale = make_case(2, queries, 300, 72, [300, 41], dtype)
    common = 30 * torch.randn(72)
    memory = (memory.float() + common).to(dtype)
    upstream = torch.randn_like(query), torch.randn(query.shape[:2])
    actual = run(query, memory, counts, scale, *upstream)
    exact = oracle(query, memory, [300, 41], scale, *upstream, torch.float64)
    rounded = oracle(query, memory, [300, 41], scale, *upstream, dtype)
    assert_accurate(actual["d_query"], rounded["d_query"], exact["d_query"], "d_query")
